"""Read signatures, and results of pure layout functions, out of named wheels, without installing them.

    python tests/signatures/extract.py DIRECTORY     # of wheels, as `pip download --no-deps` leaves them

Writes ``extracted.json`` beside this file: for every function a backend calls its parameters, and for every
layout function of theirs that is plain torch the SHA-256 of what it makes of a fixed pattern, each with the
wheel's file name, version and hash. The tests bind our calls to the former and compare our permutations with
the latter. Functions are found by `ast` and only those layout functions are executed; nothing is imported.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULT = Path(__file__).with_name("extracted.json")

_MARLIN = "vllm/model_executor/layers/quantization/utils"

# distribution prefix of the wheel -> file in it -> functions and classes whose parameters are wanted
SIGNATURES: dict[str, dict[str, tuple[str, ...]]] = {
    "flashinfer_python-0.7.2": {
        "flashinfer/fused_moe/core.py": ("trtllm_fp4_block_scale_routed_moe", "cutlass_fused_moe"),
        "flashinfer/quantization/fp8_quantization.py": ("mxfp8_quantize",),
    },
    "vllm-0.33.0": {
        "vllm/model_executor/layers/fused_moe/experts/marlin_moe.py": ("fused_marlin_moe",),
    },
    "vllm-0.18.0": {
        "vllm/model_executor/layers/fused_moe/fused_marlin_moe.py": ("fused_marlin_moe",),
        "vllm/third_party/triton_kernels/matmul_ogs.py": ("matmul_ogs", "RoutingData", "GatherIndx", "PrecisionConfig"),
        "vllm/third_party/triton_kernels/specialize.py": ("FnSpecs",),
        "vllm/third_party/triton_kernels/tensor_details/ragged_tensor.py": ("make_ragged_tensor_metadata",),
    },
    "sgl_kernel-0.3.21": {
        "triton_kernels/matmul_ogs.py": ("matmul_ogs", "FnSpecs", "FusedActivation", "PrecisionConfig"),
        "triton_kernels/routing.py": ("compute_expt_data", "RoutingData", "GatherIndx"),
    },
    "tokenspeed_triton_kernels": {
        "triton_kernels/matmul.py": ("matmul", "PrecisionConfig", "FusedActivation"),
        "triton_kernels/specialize.py": ("FnSpecs",),
        "triton_kernels/tensor_details/ragged_tensor.py": ("make_ragged_tensor_metadata",),
    },
    "sglang_kernel-0.4.10": {
        "triton_kernels/matmul.py": ("matmul", "PrecisionConfig", "FusedActivation"),
        "triton_kernels/specialize.py": ("FnSpecs",),
        "triton_kernels/tensor_details/ragged_tensor.py": ("make_ragged_tensor_metadata",),
    },
    "humming_kernels-0.1.19": {
        "humming/forward.py": ("humming_forward", "may_process_input"),
        "humming/transform.py": ("prepare_layer_config",),
        "humming/tune/__init__.py": ("get_heuristics_config",),
        "humming/schema/mxfp4.py": ("Mxfp4WeightSchema.to_humming_schema",),
    },
    "amd_aiter": {"aiter/fused_moe.py": ("fused_moe",)},
}

N, K = 256, 512  # the sizes that layouts are compared at


def pattern(*shape: int, salt: int = 0) -> torch.Tensor:
    """A fixed uint8 tensor without structure."""
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.int64)
    return (((numbers * 2654435761 + salt * 40503) >> 11) & 255).to(torch.uint8).view(shape)


def scale_pattern(*shape: int) -> torch.Tensor:
    """As ``pattern``, in the range of scales that bf16 holds exactly."""
    return pattern(*shape, salt=1) // 2 + 64


def digest(x: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes, in order."""
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def main(directory: Path) -> dict[str, Any]:
    """Everything, from the wheels in ``directory``."""
    wheels = {prefix: _wheel(directory, prefix) for prefix in SIGNATURES}
    result: dict[str, Any] = {"wheels": {}, "signatures": {}, "layouts": {}}
    for prefix, wheel in wheels.items():
        result["wheels"][prefix] = {
            "file": wheel.name,
            "version": wheel.name.split("-")[1],
            "sha256": _hash(wheel),
        }
        with zipfile.ZipFile(wheel) as archive:
            for file, names in SIGNATURES[prefix].items():
                tree = ast.parse(archive.read(file))
                for name in names:
                    result["signatures"].setdefault(prefix, {})[name] = _parameters(tree, name)
    for name, (prefix, make) in LAYOUTS.items():
        with zipfile.ZipFile(wheels[prefix]) as archive:
            result["layouts"][name] = {"wheel": prefix, "sha256": digest(make(archive))}
    return result


def _wheel(directory: Path, prefix: str) -> Path:
    found = sorted(directory.glob(f"{prefix}*.whl"))
    if len(found) != 1:
        raise FileNotFoundError(f"{directory} holds {len(found)} wheels of {prefix}; one was expected")
    return found[0]


def _hash(path: Path) -> str:
    result = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            result.update(block)
    return result.hexdigest()


def _parameters(tree: ast.Module, name: str) -> list[list[Any]]:
    """[name, kind, has a default] of each parameter; of a dataclass the fields."""
    *outer, leaf = name.split(".")
    scope: Any = tree
    for part in outer:
        scope = next(n for n in scope.body if isinstance(n, ast.ClassDef) and n.name == part)
    kinds = (ast.FunctionDef, ast.ClassDef)
    node = [n for n in scope.body if isinstance(n, kinds) and n.name == leaf][-1]
    if isinstance(node, ast.ClassDef):
        return [
            [n.target.id, "POSITIONAL_OR_KEYWORD", _has_default(n.value)]
            for n in node.body
            if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
        ]
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    first_default = len(positional) - len(args.defaults)
    found: list[list[Any]] = [[a.arg, "POSITIONAL_OR_KEYWORD", i >= first_default] for i, a in enumerate(positional)]
    if args.vararg:
        found.append([args.vararg.arg, "VAR_POSITIONAL", False])
    found += [[a.arg, "KEYWORD_ONLY", d is not None] for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    if args.kwarg:
        found.append([args.kwarg.arg, "VAR_KEYWORD", False])
    return found


def _has_default(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "field":
        return any(k.arg in ("default", "default_factory") for k in value.keywords)
    return value is not None


def functions(archive: zipfile.ZipFile, file: str, *names: str, **given: Any) -> dict[str, Any]:
    """The named functions and constants of a file, alone, executed with torch and ``given`` in scope."""
    tree = ast.parse(archive.read(file))
    wanted: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.decorator_list = []
            node.returns = None
            for a in [*node.args.args, *node.args.kwonlyargs]:
                a.annotation = None
            wanted.append(node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in names:
            wanted.append(node)
    scope: dict[str, Any] = {"torch": torch, **given}
    exec(compile(ast.Module(wanted, []), file, "exec"), scope)
    return scope


# What the libraries' own functions make of one expert's [N, K] weights.


def _marlin_codes(archive: zipfile.ZipFile) -> torch.Tensor:
    import numpy as np

    scope = functions(
        archive, f"{_MARLIN}/marlin_utils_test.py", "get_weight_perm", "marlin_permute_weights", np=np,
        GPTQ_MARLIN_TILE=16,
    )  # fmt: skip
    packed = pattern(N, K // 2)
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1).T.contiguous().int()  # [K, N]
    codes = scope["marlin_permute_weights"](codes, K, N, scope["get_weight_perm"](4))
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for i in range(8):
        words |= codes[:, i::8].to(torch.int64) << (4 * i)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _marlin_scales(archive: zipfile.ZipFile) -> torch.Tensor:
    permute = functions(archive, f"{_MARLIN}/marlin_utils.py", "get_scale_perms", "marlin_permute_scales")
    process = functions(archive, f"{_MARLIN}/marlin_utils_fp4.py", "mxfp4_marlin_process_scales")
    scales = scale_pattern(N, K // 32).view(torch.float8_e8m0fnu).to(torch.bfloat16).T
    scales = permute["marlin_permute_scales"](scales, K, N, 32)
    out: torch.Tensor = process["mxfp4_marlin_process_scales"](scales)
    return out


def _marlin_bias(archive: zipfile.ZipFile) -> torch.Tensor:
    scope = functions(archive, f"{_MARLIN}/marlin_utils.py", "get_scale_perms", "marlin_permute_bias")
    out: torch.Tensor = scope["marlin_permute_bias"](pattern(N))
    return out


def _aiter(kind: str, gate_up: bool) -> Callable[[zipfile.ZipFile], torch.Tensor]:
    def make(archive: zipfile.ZipFile) -> torch.Tensor:
        scope = functions(archive, "aiter/ops/shuffle.py", "shuffle_weight_a16w4", "shuffle_scale_a16w4")
        if kind == "codes":
            out: torch.Tensor = scope["shuffle_weight_a16w4"](pattern(1, N, K // 2), 16, gate_up)
        else:
            out = scope["shuffle_scale_a16w4"](scale_pattern(N, K // 32), 1, gate_up)
        return out

    return make


def _trtllm_rows(archive: zipfile.ZipFile) -> torch.Tensor:
    scope = functions(
        archive, "flashinfer/utils.py", "srcToDstBlk16RowMap", "srcToDstBlk32RowMap", "get_shuffle_block_size",
        "get_shuffle_matrix_a_row_indices",
    )  # fmt: skip
    packed = pattern(N, K // 2)
    return packed[scope["get_shuffle_matrix_a_row_indices"](packed, 128)]


def _trtllm_gated_rows(archive: zipfile.ZipFile) -> torch.Tensor:
    """[up; gate] halves -> rows as the first product reads them."""
    shuffle = functions(
        archive, "flashinfer/utils.py", "srcToDstBlk16RowMap", "srcToDstBlk32RowMap", "get_shuffle_block_size",
        "get_shuffle_matrix_a_row_indices",
    )  # fmt: skip
    reorder = functions(archive, "flashinfer/fused_moe/core.py", "get_reorder_rows_for_gated_act_gemm_row_indices")
    packed = pattern(N, K // 2)
    first = reorder["get_reorder_rows_for_gated_act_gemm_row_indices"](packed)
    return packed[first[shuffle["get_shuffle_matrix_a_row_indices"](packed, 128)]]


def _cutlass_scales(archive: zipfile.ZipFile) -> torch.Tensor:
    scope = functions(archive, "flashinfer/fused_moe/prepare.py", "interleave_moe_scales_for_sm90_mixed_gemm")
    out: torch.Tensor = scope["interleave_moe_scales_for_sm90_mixed_gemm"](scale_pattern(1, N, K // 32), 32)
    return out


def _triton_kernels(file: str, name: str, kind: str, **options: Any) -> Callable[[zipfile.ZipFile], torch.Tensor]:
    """``swizzle_data`` of a layout class of the 3.6 generation."""

    def make(archive: zipfile.ZipFile) -> torch.Tensor:
        path = f"vllm/third_party/triton_kernels/tensor_details/layout_details/{file}.py"
        tree = ast.parse(archive.read(path))
        scope: dict[str, Any] = {"torch": torch, "Layout": _Layout, "math": math}
        # Layout classes and their plain helpers; what is decorated with triton.jit is left out.
        kept: list[ast.stmt] = []
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                node.decorator_list = []
                kept.append(node)
            elif (isinstance(node, ast.FunctionDef) and not node.decorator_list) or (
                isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            ):
                kept.append(node)
        exec(compile(ast.Module(kept, []), path, "exec"), scope)
        data = pattern(1, N, K // 2) if kind == "codes" else scale_pattern(1, N, K // 32)
        data = data.mT
        out: torch.Tensor = scope[name](list(data.shape), **options).swizzle_data(data)
        return out if file == "blackwell_scale" else out.mT

    return make


class _Layout:
    def __init__(self, shape: list[int]) -> None:
        self.initial_shape = shape


LAYOUTS: dict[str, tuple[str, Callable[[zipfile.ZipFile], torch.Tensor]]] = {
    "marlin codes": ("vllm-0.18.0", _marlin_codes),
    "marlin scales": ("vllm-0.18.0", _marlin_scales),
    "marlin bias": ("vllm-0.18.0", _marlin_bias),
    "aiter up codes": ("amd_aiter", _aiter("codes", True)),
    "aiter down codes": ("amd_aiter", _aiter("codes", False)),
    "aiter up scales": ("amd_aiter", _aiter("scales", True)),
    "aiter down scales": ("amd_aiter", _aiter("scales", False)),
    "trtllm rows": ("flashinfer_python-0.7.2", _trtllm_rows),
    "trtllm gated rows": ("flashinfer_python-0.7.2", _trtllm_gated_rows),
    "cutlass scales": ("flashinfer_python-0.7.2", _cutlass_scales),
    "hopper codes": ("vllm-0.18.0", _triton_kernels("hopper_value", "HopperMXValueLayout", "codes", mx_axis=1)),
    "hopper scales w8": (
        "vllm-0.18.0", _triton_kernels("hopper_scale", "HopperMXScaleLayout", "scales", mx_axis=1, num_warps=8)
    ),
    "hopper scales w4": (
        "vllm-0.18.0", _triton_kernels("hopper_scale", "HopperMXScaleLayout", "scales", mx_axis=1, num_warps=4)
    ),
    "blackwell codes": ("vllm-0.18.0", _triton_kernels("blackwell_value", "BlackwellMXValueLayout", "codes")),
    "blackwell scales": ("vllm-0.18.0", _triton_kernels("blackwell_scale", "BlackwellMXScaleLayout", "scales")),
    "cdna4 scales": ("vllm-0.18.0", _triton_kernels("cdna4_scale", "CDNA4MXScaleLayout", "scales")),
}  # fmt: skip


if __name__ == "__main__":
    RESULT.write_text(json.dumps(main(Path(sys.argv[1])), indent=1) + "\n")
    print(RESULT)
