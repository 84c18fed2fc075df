"""MXFP4 experts with fused kernels for Hugging Face mixture-of-experts models, in place.

>>> model = mxfp4_compile.optimize(model)
>>> print(model.mxfp4_report)
"""

from .pipeline import OptimizeError, optimize, restore
from .report import Report, SiteReport
from .runtime import capture

__version__ = "0.1.0"

__all__ = ["OptimizeError", "Report", "SiteReport", "__version__", "capture", "optimize", "restore"]
