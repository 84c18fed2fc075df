"""What is put around methods of PEFT's ``LoraModel``: on models without rewritten experts they do what they did.

Imports nothing of ours until such a model comes.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

_MARK = "_mxfp4_compile"


def _ours() -> Any:
    """The part that knows rewritten experts; None while no model has any."""
    if "mxfp4_compile.passes.build.module" not in sys.modules:
        return None
    return importlib.import_module("mxfp4_compile.adapters.lora")


def install(lora_model: Any) -> None:
    """Have ``peft.tuners.lora.LoraModel`` serve rewritten experts; a second time changes nothing."""
    if _MARK in lora_model.__dict__:
        return
    inject, replace = lora_model._inject_parameters, lora_model._replace_module
    create, allowed = lora_model._create_new_module, lora_model._check_merge_allowed

    @functools.wraps(inject)
    def _inject_parameters(self: Any, peft_config: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        ours = _ours()
        sites = ours.sites_of(model) if ours else {}
        if not sites:
            return inject(self, peft_config, model, *args, **kwargs)
        with ours.Shown(sites, list(peft_config.target_parameters)):
            return inject(self, peft_config, model, *args, **kwargs)

    @functools.wraps(create)
    def _create_new_module(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        ours = _ours()
        given = {k: v for k, v in kwargs.items() if k != "device_map"}
        new = ours.wrapped(target, adapter_name, lora_config, **given) if ours else None
        return create(lora_config, adapter_name, target, **kwargs) if new is None else new

    @functools.wraps(replace)
    def _replace_module(self: Any, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        ours = _ours()
        if ours and isinstance(new_module, ours.ParamWrapper):
            setattr(parent, child_name, new_module)  # its tensors lie where the experts' do
        else:
            replace(self, parent, child_name, new_module, child)

    @functools.wraps(allowed)
    def _check_merge_allowed(self: Any) -> None:
        ours = _ours()
        if ours:
            ours.refuse_merge(self.model)
        allowed(self)

    lora_model._inject_parameters, lora_model._replace_module = _inject_parameters, _replace_module
    lora_model._create_new_module, lora_model._check_merge_allowed = (
        staticmethod(_create_new_module),
        _check_merge_allowed,
    )
    setattr(lora_model, _MARK, True)


__all__ = ["install"]
