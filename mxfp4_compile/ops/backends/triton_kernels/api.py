"""triton_kernels' API generations: which one is there, and one product in the words of each.

The library renames its interface with every release of Triton and lives in several places; PyPI's
``triton-kernels`` is an unrelated package of the same import name. So it is known by its files:

    3.5.1  matmul_ogs.py, routing.py             sgl-kernel, vLLM (third_party)
    3.6    matmul_ogs.py, SparseMatrix in tensor.py   vLLM 0.18 (third_party), triton v3.6.0
    3.7    matmul.py                             tokenspeed-triton-kernels
    3.8    matmul.py, b_mx_tensor_scale          sglang-kernel

All are called in the same way: rows sorted by expert, gathered by the first product and left sorted by the
second; the sum over experts is ours, since the library's own is gone from 3.7 on.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from ....spec import Activation
from ...library import Finding, find, numbers

GENERATIONS = ("3.5.1", "3.6", "3.7", "3.8")
INSTALL = 'pip install "git+https://github.com/triton-lang/triton.git@v3.6.0#subdirectory=python/triton_kernels"'

# Where other packages carry a copy, below their own folder.
_VENDORS = (("vllm", "third_party/triton_kernels"),)


@dataclass(frozen=True)
class Library:
    """A copy of triton_kernels: its generation, or None with the reason why what was found is not one."""

    generation: str | None
    folder: Path | None
    vendor: str
    reason: str

    @property
    def installable(self) -> bool:
        """Whether installing it would help: not where another package holds its name."""
        return self.folder is None


def generation_of(found: Finding) -> str | None:
    """The API generation of a folder, by its files; None if it is another package."""
    if found.has("matmul.py", "tensor.py", "specialize.py"):
        return "3.8" if found.mentions("matmul.py", "b_mx_tensor_scale") else "3.7"
    if found.has("matmul_ogs.py", "tensor.py"):
        return "3.6" if found.mentions("tensor.py", "class SparseMatrix") else "3.5.1"
    return None


def locate() -> Library:
    """The copy that would be used, without importing anything."""
    own = find("triton_kernels", "triton-kernels")
    if own.folder is not None:
        generation = generation_of(own)
        if generation is None:
            return Library(
                None,
                own.folder,
                "",
                f"an unrelated package is installed under the name triton_kernels (version {own.version or 'unknown'}; "
                "PyPI's triton-kernels is not OpenAI's); uninstall it first",
            )
        return Library(generation, own.folder, "", f"generation {generation}{_age(generation)}")
    for package, below in _VENDORS:
        outer = find(package, package)
        folder = None if outer.folder is None else outer.folder / below
        if folder is not None and folder.is_dir():
            generation = generation_of(Finding(f"{package}.{below}", folder, outer.version))
            if generation is not None:
                return Library(generation, folder, package, f"generation {generation} of {package}{_age(generation)}")
    return Library(None, None, "", "triton_kernels is not installed")


def _age(generation: str) -> str:
    return " (wants triton >= 3.7)" if generation in ("3.7", "3.8") else ""


def triton_fits(generation: str, triton_version: str) -> bool:
    """Whether ``generation`` imports on this triton: the newer ones use what 3.6 does not have."""
    return generation not in ("3.7", "3.8") or numbers(triton_version) >= (3, 7)


@lru_cache(maxsize=1)
def load() -> Api:
    """Import the library. ImportError says what is wrong with what was found."""
    library = locate()
    if library.generation is None:
        raise ImportError(library.reason)
    if library.vendor and "triton_kernels" not in sys.modules:
        # A vendored copy imports itself by its absolute name, as its vendor arranges too.
        assert library.folder is not None
        spec = importlib.util.spec_from_file_location(
            "triton_kernels", library.folder / "__init__.py", submodule_search_locations=[str(library.folder)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["triton_kernels"] = module
        spec.loader.exec_module(module)
    return Api(library.generation)


class Api:
    """The calls of one generation."""

    def __init__(self, generation: str) -> None:
        self.generation = generation
        self.new = generation in ("3.7", "3.8")
        self._product = _module("matmul" if self.new else "matmul_ogs")
        self._tensor = _module("tensor")
        self._layout = _module("tensor_details.layout")
        self._specs = _module("matmul_ogs" if generation == "3.5.1" else "specialize").FnSpecs
        if self.new:
            self._ragged = _module("tensor_details.ragged_tensor")
        else:
            routing = _module("routing" if generation == "3.5.1" else "matmul_ogs")
            self._routing, self._gather = routing.RoutingData, routing.GatherIndx
            if generation == "3.6":
                self._ragged = _module("tensor_details.ragged_tensor")
            else:
                self._expert_data = routing.compute_expt_data

    def weight(self, values: Tensor, scales: Tensor, layout: str, n: int, k: int) -> tuple[Any, Any]:
        """(weight, PrecisionConfig) of prepared [e, ...] tensors; ``n``, ``k`` are the padded sizes."""
        e = values.shape[0]
        value_shape, scale_shape = [e, k // 2, n], [e, k // 32, n]
        if layout == "blackwell":
            scale_data = scales.reshape(1, -1, *scales.shape[2:])
        else:
            scale_data = scales.mT
        w = self._wrap(values.mT, self._value_layout(layout, value_shape), self._tensor.FP4, [e, k, n])
        s = self._wrap(scale_data, self._scale_layout(layout, scale_shape), None, scale_shape)
        config = self._product.PrecisionConfig
        if self.new:
            return w, config(b_mx_scale=s, b_microblock_size=32)
        return w, config(weight_scale=s)

    def _wrap(self, data: Tensor, layout: Any, dtype: Any, shape: list[int]) -> Any:
        if dtype is None:
            dtype = self._tensor.UINT8 if self.new else data.dtype
        return self._tensor.Tensor(self._tensor.Storage(data, layout), dtype=dtype, shape=shape)

    def _value_layout(self, layout: str, shape: list[int]) -> Any:
        details, given = self._layout, () if self.new else (shape,)
        if layout.startswith("hopper"):
            return details.HopperMXValueLayout(*given, mx_axis=-2 if self.new else 1, mma_version=3)
        if layout == "blackwell":
            return details.BlackwellMXValueLayout(*given)
        return details.StridedLayout(-2) if self.new else details.StridedLayout(shape)

    def _scale_layout(self, layout: str, shape: list[int]) -> Any:
        details, given = self._layout, () if self.new else (shape,)
        if layout.startswith("hopper"):
            return details.HopperMXScaleLayout(*given, mx_axis=-2 if self.new else 1, num_warps=int(layout[-1]))
        if layout == "blackwell":
            return details.BlackwellMXScaleLayout(*given)
        if layout == "cdna4":
            return details.CDNA4MXScaleLayout(*given)
        return details.StridedLayout(-2) if self.new else details.StridedLayout(shape)

    def activation(self, activation: Activation) -> Any:
        """The fused activation of a gated or plain up-projection."""
        from .epilogue import ARGUMENTS, EPILOGUES

        a = activation
        function = EPILOGUES[a.kind, a.gated]
        values = (a.alpha, a.beta, a.gate_limit, a.up_limit)
        # The library caches specializations by this name, for all of its users.
        name, reduction = f"mxfp4_compile_{function.__name__}", 2 if a.gated else 1
        if self.generation == "3.5.1":
            return self._product.FusedActivation(self._specs(name, function, ARGUMENTS), values, reduction)
        return self._product.FusedActivation(self._specs(name, function, ARGUMENTS, reduction_n=reduction), values)

    def groups(self, counts: Tensor, rows: int) -> Any:
        """What tells the product where each expert's rows are; counts int32 [E], ``rows`` in all."""
        e = counts.shape[0]
        if self.new:
            return self._ragged.make_ragged_tensor_metadata(counts, rows)
        if self.generation == "3.6":
            data = self._ragged.make_ragged_tensor_metadata(counts, rows)
        else:
            data = self._expert_data(counts, e, rows)
        # One expert per row, since gathering is by row: the top-k sum is not the library's.
        return self._routing(None, counts, e, 1, data)

    def multiply(
        self,
        x: Tensor,
        weight: tuple[Any, Any],
        bias: Tensor | None,
        groups: Any,
        gather: Tensor | None = None,
        activation: Any = None,
    ) -> Tensor:
        """x [rows or tokens, K] -> [rows, N], sorted by expert; ``gather`` int32 [rows]: the row of x for each."""
        w, config = weight
        given = {"precision_config": config, "fused_activation": activation}
        if self.new:
            out = self._product.matmul(x, w, bias, groups, gather_indx=gather, **given)
        else:
            index = None if gather is None else self._gather(gather, gather)
            out = self._product.matmul_ogs(x, w, bias, groups, gather_indx=index, **given)
        return out  # type: ignore[no-any-return]


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"triton_kernels.{name}")
