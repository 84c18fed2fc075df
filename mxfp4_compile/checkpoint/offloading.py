"""Models of which a part lies in CPU memory (accelerate's hooks): what a rewritten site needs of it.

Contract: weights that were prepared stay where ``device_map`` puts them and are brought to the device for a forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..passes.build.module import MXFP4Experts


def offloaded(module: nn.Module) -> dict[str, Tensor]:
    """Tensors of a module that accelerate keeps elsewhere and brings in for a forward."""
    found = {}
    for prefix, child in module.named_modules():
        weights_map = getattr(getattr(child, "_hf_hook", None), "weights_map", None)
        if weights_map is not None:
            for name, tensor in (*child._parameters.items(), *child._buffers.items()):
                if tensor is not None and tensor.device.type == "meta" and name in weights_map:
                    found[f"{prefix}.{name}".lstrip(".")] = weights_map[name]
    return found


def take_offloaded(built: nn.Module, values: Mapping[str, Tensor], device: torch.device) -> None:
    """Small tensors a rewritten site still reads (a norm's weight) stay on the device it runs on."""
    for name, value in values.items():
        owner, _, leaf = name.rpartition(".")
        try:
            module = built.get_submodule(owner)
        except AttributeError:
            continue
        old = module._parameters.get(leaf)
        if old is not None:
            module._parameters[leaf] = nn.Parameter(value.to(device), requires_grad=old.requires_grad)
        elif module._buffers.get(leaf) is not None:
            module._buffers[leaf] = value.to(device)


class Offload:
    """Forward hooks of a site whose prepared weights lie in CPU memory: bring them in for each forward.

    accelerate's own hooks leave out buffers that are not saved, which prepared weights are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.home: dict[str, Tensor] = {}

    def before(self, site: MXFP4Experts, args: Any) -> None:
        """Copy to the device."""
        self.home = {name: site._buffers[name] for name in site._tensor_names}  # type: ignore[misc]
        for name, tensor in self.home.items():
            site._buffers[name] = tensor.to(self.device, non_blocking=True)

    def after(self, site: MXFP4Experts, args: Any, output: Any) -> None:
        """Drop the copies; also where the forward failed."""
        for name, tensor in self.home.items():
            site._buffers[name] = tensor
        self.home = {}


def offload(site: Any, device: torch.device) -> None:
    """Keep a site's prepared weights in CPU memory; each forward copies them to ``device``."""
    for name in site._tensor_names:
        site._buffers[name] = site._buffers[name].to("cpu")
    hooks = Offload(device)
    site.register_forward_pre_hook(hooks.before)
    site.register_forward_hook(hooks.after, always_call=True)
