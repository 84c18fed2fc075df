"""What reading and writing checkpoints needs of transformers."""

from __future__ import annotations

import importlib
import importlib.util

from ..text import missing_package
from .files import CheckpointError


def require_transformers_5(what: str) -> None:
    """CheckpointError where transformers cannot say which tensors of a checkpoint make up which parameters.

    ModuleNotFoundError, with what to install, where there is none.
    """
    try:
        importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(missing_package(error, what) or str(error), name=error.name) from error
    if importlib.util.find_spec("transformers.core_model_loading") is None:
        version = importlib.import_module("transformers").__version__
        raise CheckpointError(
            f"{what} needs transformers 5 (5.17 or later was tested), which says how checkpoints become parameters; "
            f"this is {version}. With it optimize(), restore() and generate() work in memory, and the state_dict of an "
            "optimized model can be saved and loaded"
        )
