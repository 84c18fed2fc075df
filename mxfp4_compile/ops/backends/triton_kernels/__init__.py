"""OpenAI's triton_kernels as a backend: its API generations, its layouts, the adapter."""

from .backend import BACKEND

__all__ = ["BACKEND"]
