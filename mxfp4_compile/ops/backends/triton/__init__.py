"""The native backend; importing this needs no Triton, using it does."""

from .backend import BACKEND, TritonBackend

__all__ = ["BACKEND", "TritonBackend"]
