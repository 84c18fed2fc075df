"""MXFP4 experts with fused kernels for Hugging Face mixture-of-experts models, in place.

>>> model = mxfp4_compile.optimize(model)
>>> print(model.mxfp4_report)

or, for a model that stays as it is, ``torch.compile(model, backend="mxfp4_compile")``.
"""

from .compile_backend import compile_reports, register_where_needed
from .inspection import inspect
from .pipeline import OptimizeError, optimize, restore
from .report import Report, SiteReport

__version__ = "0.1.0"

__all__ = ["OptimizeError", "Report", "SiteReport", "__version__", "compile_reports", "inspect", "optimize", "restore"]

register_where_needed()
