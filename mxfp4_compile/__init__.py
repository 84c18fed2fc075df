"""MXFP4 experts with fused kernels for Hugging Face mixture-of-experts models, in place.

>>> model = mxfp4_compile.optimize(model)
>>> print(model.mxfp4_report)
>>> model.save_pretrained("model-mxfp4")
>>> model = mxfp4_compile.load("model-mxfp4")

or, for a model that stays as it is, ``torch.compile(model, backend="mxfp4_compile")``.

Importing the package imports neither torch nor transformers: a name is imported when it is asked for, and torch and
transformers learn of the package when they are there (``registration.py``).
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

from .registration import register as _register

if TYPE_CHECKING:
    from .calibration.model import calibrate
    from .calibration.report import CalibrationReport
    from .checkpoint import CheckpointError
    from .checkpoint.loading import load
    from .checkpoint.quantizer import Mxfp4CompileConfig
    from .checkpoint.writing import save
    from .dynamo.backend import compile_reports
    from .inspection import inspect
    from .lifecycle import restore
    from .pipeline import optimize
    from .planning import OptimizeError
    from .ranks.gather import gathered_state_dict
    from .report import Report, SiteReport
    from .runtime import capture

__all__ = [
    "CalibrationReport",
    "CheckpointError",
    "Mxfp4CompileConfig",
    "OptimizeError",
    "Report",
    "SiteReport",
    "__version__",
    "calibrate",
    "capture",
    "compile_reports",
    "gathered_state_dict",
    "inspect",
    "load",
    "optimize",
    "restore",
    "save",
]

# The module of each public name.
_MODULES = {
    "CalibrationReport": "calibration.report",
    "CheckpointError": "checkpoint",
    "Mxfp4CompileConfig": "checkpoint.quantizer",
    "OptimizeError": "planning",
    "Report": "report",
    "SiteReport": "report",
    "calibrate": "calibration.model",
    "capture": "runtime",
    "compile_reports": "dynamo.backend",
    "gathered_state_dict": "ranks.gather",
    "inspect": "inspection",
    "load": "checkpoint.loading",
    "optimize": "pipeline",
    "restore": "lifecycle",
    "save": "checkpoint.writing",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        from .text import missing_package

        said = missing_package(error, f"{__name__}.{name}")
        if not said:
            raise
        raise ModuleNotFoundError(said, name=error.name) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_register()
