"""MXFP4 experts with fused kernels for Hugging Face mixture-of-experts models, in place.

>>> model = mxfp4_compile.optimize(model)
>>> print(model.mxfp4_report)
>>> model.save_pretrained("model-mxfp4")
>>> model = mxfp4_compile.load("model-mxfp4")

or, for a model that stays as it is, ``torch.compile(model, backend="mxfp4_compile")``.
"""

from typing import Any

__version__ = "0.1.0"

from .checkpoint import CheckpointError
from .checkpoint.registration import register as _register
from .dynamo.backend import compile_reports, register_where_needed
from .inspection import inspect
from .lifecycle import restore
from .pipeline import optimize
from .planning import OptimizeError
from .report import Report, SiteReport
from .runtime import capture

__all__ = [
    "CheckpointError",
    "Mxfp4CompileConfig",
    "OptimizeError",
    "Report",
    "SiteReport",
    "__version__",
    "capture",
    "compile_reports",
    "inspect",
    "load",
    "optimize",
    "restore",
    "save",
]

_register()
register_where_needed()


def __getattr__(name: str) -> Any:
    # These need transformers, which is imported when they are asked for.
    if name in ("Mxfp4CompileConfig", "load"):
        from .checkpoint import loading

        return getattr(loading, name)
    if name == "save":
        from .checkpoint.writing import save

        return save
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
