"""``load``, and what a plain ``from_pretrained`` learns of checkpoints of ours; the work is ``quantizer.py``'s."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import mx
from ..circumstances import exclusive
from ..hf_models import class_of, read_config
from ..processes import OneProcess
from .claims import check_numbers, read_config_file, sober
from .files import CheckpointError, Weights, weight_files
from .forms import declared_form
from .note import facts_of, note_of
from .quantizer import PROCESSES, Mxfp4CompileConfig
from .requirements import require_transformers_5


def wrap_get_hf_quantizer(modeling_utils: Any) -> None:
    """Have transformers' ``from_pretrained`` read what ``save`` wrote with our quantizer, whatever the form.

    Our own form names no method; of the forms of others transformers would keep the name and not the bits.
    """
    original = modeling_utils.get_hf_quantizer

    @functools.wraps(original)
    def dispatch(config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
        if quantization_config is None or isinstance(quantization_config, Mxfp4CompileConfig):
            for holder in (config, config.get_text_config(decoder=True)):
                declared = getattr(holder, "quantization_config", None)
                if isinstance(declared, Mapping) and isinstance(note_of(config, declared), Mapping):
                    facts = facts_of(note_of(config, declared))
                    facts.pop("skip", None)
                    quantization_config = quantization_config or Mxfp4CompileConfig(**facts)
                    quantization_config.source = dict(declared)
                    del holder.quantization_config
                    break
        return original(config, quantization_config, *args, **kwargs)

    modeling_utils.get_hf_quantizer = dispatch


@exclusive
def load(path: str | os.PathLike[str], *, model_class: Any = None, experts: str = "auto", **options: Any) -> Any:
    """Load a model with MXFP4 experts: a bf16 checkpoint is quantized while it is read, an MXFP4 one kept as it is.

    path: a directory or a hub id; bf16, fp16 or fp32, or MXFP4 in any of the forms of ``mxfp4_compile``,
    gpt-oss, compressed-tensors and Quark, whose bits are kept exactly. model_class: a transformers class, by
    default the one the checkpoint names. Options of ``Mxfp4CompileConfig`` go there, all others
    (``device_map``, ``dtype``, ...) to ``from_pretrained``.

    With ``tp_plan="auto"`` or ``distributed_config``, called on every rank of a torch.distributed job: attention is
    split by transformers' plan, and of the experts each rank reads and quantizes its part. experts: "expert" (whole
    experts, as many on each rank), "tensor" (columns of every expert, cut at multiples of 32), or "auto", the first
    where the experts divide by the ranks.

    Raises CheckpointError for files that cannot be read, OptimizeError as ``optimize`` does.
    """
    require_transformers_5("loading a checkpoint with MXFP4 experts")
    known = [
        n
        for n in inspect.signature(Mxfp4CompileConfig.__init__).parameters
        if n not in ("self", "source", "checkpoint")
    ]
    own = {name: options.pop(name) for name in known if name in options}
    hub = {
        n: options[n]
        for n in ("revision", "cache_dir", "token", "local_files_only", "trust_remote_code")
        if n in options
    }
    options.setdefault("trust_remote_code", False)  # left out, transformers would ask on the terminal
    here = Path(path) if Path(path).is_dir() and not {"subfolder", "variant", "gguf_file"} & options.keys() else None
    with contextlib.ExitStack() as stack:
        if here is not None:  # a bad file is named here; transformers' own errors do not name it
            raw = read_config_file(here)
            with Weights(weight_files(here)) as weights:
                check_numbers(raw, weights, here / "config.json")
            stack.enter_context(sober(weights, here / "config.json", "transformers cannot read it"))
        config: Any = options.pop("config", None) or read_config(path, **hub)
    holder = config
    declared = getattr(config, "quantization_config", None)
    if declared is None:
        holder = config.get_text_config(decoder=True)
        declared = getattr(holder, "quantization_config", None)
    facts: dict[str, Any] = {}
    if declared is not None:
        declared = declared if isinstance(declared, Mapping) or not hasattr(declared, "to_dict") else declared.to_dict()
        declared_form(declared, f"{path}/config.json")
        del holder.quantization_config
        facts = facts_of(note_of(config, declared))
        facts.pop("skip", None)
        if own.get("calibration"):
            facts.pop("calibration", None)
        own.setdefault("scale_rule", facts.pop("scale_rule", mx.DEFAULT_SCALE_RULE))
    if model_class is None:
        model_class = class_of(config, trust_remote_code=bool(options["trust_remote_code"]))
    options.setdefault("dtype", "auto")
    processes = OneProcess()
    if any(options.get(name) is not None for name in ("distributed_config", "tp_plan", "tp_size")):
        from ..ranks.load import start

        processes = start(options, experts, config, model_class, own)
    elif experts != "auto":
        raise ValueError(f'experts={experts!r} is for several ranks: pass tp_plan="auto" or distributed_config too')
    quantization = Mxfp4CompileConfig(**own, source=declared, **facts)

    def from_pretrained() -> Any:
        token = PROCESSES.set(processes)
        try:
            return model_class.from_pretrained(path, config=config, quantization_config=quantization, **options)
        finally:
            PROCESSES.reset(token)

    try:
        return processes.together("load", from_pretrained)
    except (AttributeError, TypeError, KeyError, OverflowError, RecursionError) as error:
        if quantization.met:  # the model was made: what fails then is no matter of the configuration
            raise
        raise CheckpointError(f"{path}/config.json: no model can be made of it: {error}") from error
