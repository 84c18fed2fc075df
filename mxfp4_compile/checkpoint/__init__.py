"""Checkpoints: load while quantizing, save canonical MXFP4, read others' MXFP4, convert without a model in memory."""

from .files import CheckpointError
from .forms import FORMATS

__all__ = ["FORMATS", "CheckpointError"]
