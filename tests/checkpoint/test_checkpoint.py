"""Checkpoints: saved and loaded bit for bit in every form, others' forms read exactly, nothing half-written."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mx_oracle
import pytest
import torch
from checkpoints import assert_same, codes, loaded, logits, saved
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mxfp4_compile
from mxfp4_compile import CheckpointError, Mxfp4CompileConfig, mx
from mxfp4_compile.checkpoint import files
from mxfp4_compile.passes.build.module import mxfp4_sites
from mxfp4_compile.planning import OptimizeError
from mxfp4_compile.tools.families import decorated_families, tiny_model

OWN, GPT_OSS, CT = "mxfp4_compile", "gpt_oss", "compressed_tensors"
# Without the experts interface of transformers: loops over modules of a list, flattened matrices, dense products.
LOOPS = ["dbrx", "llama4", "longcat_flash", "nllb_moe", "step3p7", "switch_transformers"]
FORMS = {"qwen3_moe": (OWN, CT), "gpt_oss": (OWN, GPT_OSS), "mixtral": (OWN, CT)}


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def _config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def _listing(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


# round trips


def _round_trip(family: str, directory: Path) -> list[str]:
    """Load while quantizing, save in every form, load again; returns the forms that could express the family."""
    optimized = mxfp4_compile.optimize(loaded(family))
    streamed = mxfp4_compile.load(saved(family), dtype=torch.bfloat16)
    assert_same(optimized, streamed)
    assert [s.outcome for s in streamed.mxfp4_report.sites] == [s.outcome for s in optimized.mxfp4_report.sites]
    forms = []
    for form in (OWN, GPT_OSS, CT):
        out = directory / form
        try:
            mxfp4_compile.save(optimized, out, form)
        except CheckpointError as refusal:
            said = str(refusal)
            assert form != OWN
            assert form in said
            assert not out.exists() and not out.with_name(out.name + ".partial").exists()
            continue
        forms.append(form)
        again = mxfp4_compile.load(out, dtype=torch.bfloat16)
        assert_same(optimized, again)
        for name, site in mxfp4_sites(again).items():
            wanted = mxfp4_sites(optimized)[name].weight_errors  # six digits of it are in the file
            assert site.weight_errors == {n: pytest.approx(error, rel=1e-5) for n, error in wanted.items()}
    return forms


@pytest.mark.smoke
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_round_trip(family: str, tmp_path: Path) -> None:
    assert tuple(_round_trip(family, tmp_path)) == FORMS[family]


@pytest.mark.slow
@pytest.mark.parametrize("family", [*decorated_families(), *LOOPS])
def test_round_trip_of_every_family(family: str, tmp_path: Path) -> None:
    forms = _round_trip(family, tmp_path)
    assert OWN in forms and (GPT_OSS in forms) == (family == "gpt_oss")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    optimized = mxfp4_compile.optimize(loaded("mixtral", dtype))
    assert_same(optimized, mxfp4_compile.load(saved("mixtral", dtype)))
    optimized.save_pretrained(tmp_path / "m")
    assert_same(optimized, mxfp4_compile.load(tmp_path / "m"))


@pytest.mark.slow
def test_plain_from_pretrained_in_a_fresh_process(tmp_path: Path) -> None:
    optimized = mxfp4_compile.optimize(loaded("qwen3_moe"))
    optimized.save_pretrained(tmp_path / "m")
    torch.save(logits(optimized), tmp_path / "logits.pt")
    script = (
        "import sys, torch, mxfp4_compile\n"
        "assert 'transformers' not in sys.modules\n"
        "from mxfp4_compile import mx\n"
        "def forbidden(*a, **k): raise AssertionError('quantized again')\n"
        "mx.quantize = forbidden\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/m', dtype=torch.bfloat16)\n"
        "from mxfp4_compile.tools.families import tiny_inputs\n"
        "with torch.no_grad(): out = model(**tiny_inputs(model)).logits.float()\n"
        "assert torch.equal(out, torch.load(sys.argv[1] + '/logits.pt'))\n"
        "assert len(model.mxfp4_report.rewritten) == 2\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_from_pretrained_with_a_configuration(tmp_path: Path) -> None:
    options = {"scale_rule": "even", "skip": ["model.layers.0.*"]}
    optimized = mxfp4_compile.optimize(loaded("qwen3_moe"), **options)
    cls: Any = type(optimized)
    config = Mxfp4CompileConfig(**options)
    streamed = cls.from_pretrained(saved("qwen3_moe"), quantization_config=config, dtype=torch.bfloat16)
    assert_same(optimized, streamed)
    assert [s.outcome for s in streamed.mxfp4_report.sites] == ["skipped", "fused"]
    streamed.save_pretrained(
        tmp_path / "m"
    )  # the skipped site stays bf16 on disk, and is not quantized on the way back
    assert _config(tmp_path / "m")["mxfp4_compile"]["skip"] == ["model.layers.0.mlp.experts"]
    assert_same(optimized, cls.from_pretrained(tmp_path / "m", dtype=torch.bfloat16))


def test_the_base_model_of_a_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModel

    optimized = mxfp4_compile.optimize(loaded("qwen3_moe"), skip=["model.layers.0.*"])
    optimized.save_pretrained(tmp_path / "m")
    base = AutoModel.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    # Names differ by a prefix, and "skip" with them: what is not in MXFP4 on disk stays so all the same.
    assert {s.outcome for s in base.mxfp4_report.sites} == {"skipped", "fused"}
    ours, theirs = codes(base), codes(optimized.model)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_device_map_auto() -> None:
    pytest.importorskip("accelerate")
    optimized = mxfp4_compile.optimize(loaded("qwen3_moe"))
    for device_map in ("auto", {"": "cpu"}):
        streamed = mxfp4_compile.load(saved("qwen3_moe"), device_map=device_map, dtype=torch.bfloat16)
        assert_same(optimized, streamed.to("cpu"))


def test_hooks_of_an_offloaded_site() -> None:
    from mxfp4_compile.checkpoint.offloading import offload

    model = mxfp4_compile.optimize(loaded("qwen3_moe"))
    want, before = logits(model), codes(model)
    site = next(iter(mxfp4_sites(model).values()))
    offload(site, torch.device("cpu"))
    home = [t.data_ptr() for t in site.weights("up")]
    assert torch.equal(logits(model), want)
    assert [t.data_ptr() for t in site.weights("up")] == home
    assert all(torch.equal(a, before[n]) for n, a in codes(model).items())


def test_saving_survives_copy_pickle_and_restore(tmp_path: Path) -> None:
    model = mxfp4_compile.load(saved("qwen3_moe"), dtype=torch.bfloat16)
    twin = copy.deepcopy(model)
    assert twin.save_pretrained.__self__ is twin
    again = pickle.loads(pickle.dumps(model))
    again.save_pretrained(tmp_path / "m")
    assert_same(model, mxfp4_compile.load(tmp_path / "m", dtype=torch.bfloat16))
    want = logits(model)
    restored = mxfp4_compile.restore(model)
    restored.save_pretrained(tmp_path / "bf16")
    assert "quantization_config" not in _config(tmp_path / "bf16")
    plain = type(restored).from_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)
    assert float((logits(plain) - want).norm() / want.norm()) < 0.02


def test_what_a_checkpoint_says(tmp_path: Path) -> None:
    model = mxfp4_compile.optimize(loaded("qwen3_moe"), scale_rule="floor")
    model.save_pretrained(tmp_path / "m", max_shard_size=40_000, format=OWN)
    said = _config(tmp_path / "m")["quantization_config"]
    assert said["format"] == OWN and "quant_method" not in said
    assert said["scale_rule"] == "floor" and "torch" in said["versions"]
    original = loaded("qwen3_moe").model.layers[1].mlp.experts.down_proj
    packed, scales = mx.quantize(original, "floor")
    error = mx.relative_error(original, packed, scales)
    assert said["weight_errors"]["model.layers.1.mlp.experts.down_proj"] == pytest.approx(
        {"mean": float(error.mean()), "max": float(error.max())},
        rel=1e-5,  # files have six digits
    )
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "m" / files.INDEX).read_text())
    assert len(shards) > 2 and set(index["weight_map"].values()) == {s.name for s in shards}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in _tensors(tmp_path / "m").values())
    again = mxfp4_compile.load(tmp_path / "m", dtype=torch.bfloat16)
    assert again.mxfp4_report.scale_rule == "floor"
    assert_same(model, again)


# what the bits mean, by independent readers


def test_gpt_oss_form_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers import Mxfp4Config

    model = mxfp4_compile.optimize(loaded("gpt_oss"))
    mxfp4_compile.save(model, tmp_path / "m", GPT_OSS)
    theirs = type(model).from_pretrained(
        tmp_path / "m", quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    parameters = dict(theirs.named_parameters())
    count = 0
    for name, site in mxfp4_sites(model).items():
        values = site.dequantized_biases()
        for projection in site.projections:
            values.update(site.dequantized(projection))
        for leaf, value in values.items():
            assert torch.equal(parameters[f"{name}.{leaf}"], value), leaf
            count += 1
    assert count == 8


def _random_codes(shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes [..., K/2] and moderate scales [..., K/32]."""
    generator = torch.Generator().manual_seed(seed)
    *lead, k = shape
    packed = torch.randint(256, (*lead, k // 2), generator=generator, dtype=torch.uint8)
    scales = torch.randint(118, 124, (*lead, k // 32), generator=generator, dtype=torch.uint8)
    return packed, scales


def _publish_gpt_oss(directory: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A checkpoint in the layout OpenAI published, made without the library; name -> (codes, scales)."""
    shutil.copytree(saved("gpt_oss"), directory)
    tensors = _tensors(directory)
    known = {}
    for seed, name in enumerate([n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]):
        e, k, n = tensors.pop(name).shape  # stored [E, K, N]; blocks are [E, N, K / 32, 16]
        packed, scales = _random_codes((e, n, k), seed)
        tensors[f"{name}_blocks"] = packed.view(e, n, k // 32, 16)
        tensors[f"{name}_scales"] = scales
        known[name] = (packed, scales)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = _config(directory)
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    (directory / "config.json").write_text(json.dumps(config))
    return known


def _assert_known(model: Any, known: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    for name, site in mxfp4_sites(model).items():
        for projection in site.projections:
            packed, scales = site.canonical(projection)
            (leaf,) = projection.source.parameters
            assert torch.equal(packed, known[f"{name}.{leaf}"][0]) and torch.equal(scales, known[f"{name}.{leaf}"][1])
            value = site.dequantized(projection)[leaf]
            value = value.transpose(1, 2) if projection.source.transposed else value
            exact = mx_oracle.dequantize(packed[0].numpy(), scales[0].numpy(), projection.shape[2])
            assert torch.equal(value[0].double(), torch.as_tensor(exact).double())


def test_published_gpt_oss_is_read_exactly(tmp_path: Path) -> None:
    known = _publish_gpt_oss(tmp_path / "m")
    model = mxfp4_compile.load(tmp_path / "m", dtype=torch.bfloat16)
    _assert_known(model, known)
    assert all(s.weight_error_mean is None for s in model.mxfp4_report.sites)


@pytest.mark.parametrize("form", ["quark", CT])
def test_per_expert_forms_of_others_are_read_exactly(form: str, tmp_path: Path) -> None:
    codes_name, config = {
        "quark": (
            "weight",
            {
                "quant_method": "quark",
                "global_quant_config": {
                    "weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"},
                    "input_tensors": {"dtype": "fp4", "is_dynamic": True},
                },
                "exclude": ["lm_head"],
            },
        ),
        CT: (
            "weight_packed",
            {
                "quant_method": "compressed-tensors",
                "format": "mxfp4-pack-quantized",
                "config_groups": {
                    "group_0": {
                        "targets": ["Linear"],
                        "weights": {"num_bits": 4, "type": "float", "group_size": 32, "symmetric": True},
                        "input_activations": None,
                    }
                },
                "ignore": ["lm_head"],
            },
        ),
    }[form]
    directory = tmp_path / "m"
    shutil.copytree(saved("mixtral"), directory)
    tensors = _tensors(directory)
    known = {}
    for layer in range(2):
        stem = f"model.layers.{layer}.block_sparse_moe.experts"
        parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"w1": [], "w2": [], "w3": []}
        for expert in range(8):
            for which in parts:
                n, k = tensors.pop(f"{stem}.{expert}.{which}.weight").shape
                pair = _random_codes((n, k), 100 * layer + 10 * expert + int(which[1]))
                tensors[f"{stem}.{expert}.{which}.{codes_name}"], tensors[f"{stem}.{expert}.{which}.weight_scale"] = (
                    pair
                )
                parts[which].append(pair)
        stacked = {w: [torch.stack([p[i] for p in pairs]) for i in (0, 1)] for w, pairs in parts.items()}
        name = f"model.layers.{layer}.mlp.experts"
        known[f"{name}.gate_up_proj"] = tuple(torch.cat([stacked["w1"][i], stacked["w3"][i]], 1) for i in (0, 1))
        known[f"{name}.down_proj"] = tuple(stacked["w2"])
    # A layer that is no expert: dequantized, and said so.
    other = "model.layers.0.self_attn.q_proj"
    n, k = tensors.pop(f"{other}.weight").shape
    packed, scales = _random_codes((n, k), 7)
    tensors[f"{other}.{codes_name}"], tensors[f"{other}.weight_scale"] = packed, scales
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    said = _config(directory)
    said["quantization_config"] = config
    (directory / "config.json").write_text(json.dumps(said))
    model = mxfp4_compile.load(directory, dtype=torch.bfloat16)
    _assert_known(model, known)
    exact = torch.as_tensor(mx_oracle.dequantize(packed.numpy(), scales.numpy(), k))
    assert torch.equal(model.get_parameter(f"{other}.weight").double(), exact.double())
    notes = "\n".join(model.mxfp4_report.notes)
    assert f"{other}.weight is MXFP4" in notes and (form == CT or "quantized activations" in notes)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_compressed_tensors_decompresses_to_our_weights(family: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    model = mxfp4_compile.optimize(loaded(family))
    mxfp4_compile.save(model, tmp_path / "m", CT)
    declared = _config(tmp_path / "m")["quantization_config"]
    config = QuantizationConfig.model_validate(declared)
    scheme = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(declared["format"])
    tensors = _tensors(tmp_path / "m")
    first, second = {"qwen3_moe": ("gate_proj", "up_proj"), "mixtral": ("w1", "w3")}[family]
    last = {"qwen3_moe": "down_proj", "mixtral": "w2"}[family]
    block = {"qwen3_moe": "mlp", "mixtral": "block_sparse_moe"}[family]
    for name, site in mxfp4_sites(model).items():
        stem = name.replace("mlp", block)
        ours = {k: v for p in site.projections for k, v in site.dequantized(p).items()}
        for e in range(8):
            theirs = {}
            for which in (first, second, last):
                parts = {k: tensors[f"{stem}.{e}.{which}.{k}"] for k in ("weight_packed", "weight_scale")}
                theirs[which] = compressor.decompress(parts, scheme)["weight"]
            assert torch.equal(torch.cat([theirs[first], theirs[second]]), ours["gate_up_proj"][e])
            assert torch.equal(theirs[last], ours["down_proj"][e])
    # Every other matrix is on the ignore list, by the checkpoint's name and the model's, and no expert is.
    others = {n.removesuffix(".weight") for n, t in tensors.items() if n.endswith(".weight") and t.dim() == 2}
    assert others <= set(declared["ignore"]) and not any("experts" in n for n in declared["ignore"])


# refusals and bad input


def test_forms_refuse_by_name_before_writing(tmp_path: Path) -> None:
    model = mxfp4_compile.optimize(loaded("gpt_oss"))
    with pytest.raises(CheckpointError, match="gate_up_proj_bias is a bias"):
        mxfp4_compile.save(model, tmp_path / "m", CT)
    with pytest.raises(ValueError, match="unknown format 'gptq'; known: auto, mxfp4_compile, gpt_oss, compr"):
        mxfp4_compile.save(model, tmp_path / "m", "gptq")
    odd = mxfp4_compile.optimize(tiny_model("qwen3_moe", dtype=torch.bfloat16, moe_intermediate_size=40))
    with pytest.raises(CheckpointError, match=r"down_proj has K = 40, no multiple of 32"):
        mxfp4_compile.save(odd, tmp_path / "m", CT)
    with pytest.raises(CheckpointError, match="only implementations of gpt-oss read it"):
        mxfp4_compile.save(mxfp4_compile.optimize(loaded("qwen3_moe")), tmp_path / "m", GPT_OSS)
    with pytest.raises(CheckpointError, match=r"optimize\(\) it first"):
        mxfp4_compile.save(loaded("qwen3_moe"), tmp_path / "m")
    assert not list(tmp_path.iterdir())
    mxfp4_compile.save(odd, tmp_path / "m")  # our own form has no such limit
    assert_same(odd, mxfp4_compile.load(tmp_path / "m", dtype=torch.bfloat16))


def _copy(tmp_path: Path, form: str = OWN) -> Path:
    source = tmp_path / "good"
    mxfp4_compile.save(mxfp4_compile.optimize(loaded("qwen3_moe")), source, form)
    return source


def _edit(directory: Path, change: Any) -> None:
    tensors = _tensors(directory)
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


NAME = "model.layers.1.mlp.experts.down_proj"


def test_bad_tensors_are_named(tmp_path: Path) -> None:
    good = _copy(tmp_path)

    def broken(change: Any) -> Path:
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        _edit(bad, change)
        return bad

    def nan_scale(t: dict[str, torch.Tensor]) -> None:
        t[f"{NAME}_scales"][3, 5, 0] = 255

    def wrong_shape(t: dict[str, torch.Tensor]) -> None:
        t[f"{NAME}_packed"] = t[f"{NAME}_packed"][:, :-1].contiguous()

    def wrong_dtype(t: dict[str, torch.Tensor]) -> None:
        t[f"{NAME}_packed"] = t[f"{NAME}_packed"].to(torch.int32)

    cases = [
        (nan_scale, rf"model.safetensors: tensor '{NAME}_scales'.*expert 3 has scale bytes of 255"),
        (wrong_shape, rf"model.safetensors: tensor '{NAME}_packed'.*come out as"),
        (wrong_dtype, rf"{NAME}"),
        (lambda t: t.pop(f"{NAME}_scales"), rf"tensor '{NAME}_packed'.*has no scales beside it"),
        (lambda t: (t.pop(f"{NAME}_scales"), t.pop(f"{NAME}_packed")), rf"nothing in .* is for {NAME}"),
    ]
    for change, message in cases:
        with pytest.raises(CheckpointError, match=message):
            mxfp4_compile.load(broken(change), dtype=torch.bfloat16)


def test_nan_in_a_bf16_checkpoint_is_named(tmp_path: Path) -> None:
    shutil.copytree(saved("qwen3_moe"), tmp_path / "m")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    _edit(tmp_path / "m", lambda t: t[name].view(-1)[5:6].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=rf"'{name}'.*gate_up_proj holds NaN or Inf in expert 3"):
        mxfp4_compile.load(tmp_path / "m", dtype=torch.bfloat16)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    shutil.copytree(saved("qwen3_moe"), tmp_path / "m")
    _edit(tmp_path / "m", lambda t: t.pop("model.layers.0.mlp.experts.7.down_proj.weight"))
    with pytest.raises(CheckpointError, match=r"mlp.experts.0.down_proj.weight.* is one of 7 experts; the model has 8"):
        mxfp4_compile.load(tmp_path / "m", dtype=torch.bfloat16)


def test_truncated_corrupt_and_pickled_files(tmp_path: Path) -> None:
    for what in ("truncated", "garbage"):
        bad = tmp_path / what
        shutil.copytree(saved("qwen3_moe"), bad)
        data = (bad / "model.safetensors").read_bytes()
        (bad / "model.safetensors").write_bytes(data[:-100] if what == "truncated" else os.urandom(4096))
        with pytest.raises(CheckpointError, match=rf"{what}/model.safetensors cannot be read as safetensors"):
            files.Weights(files.weight_files(bad))
        with pytest.raises(CheckpointError, match=rf"{what}/model.safetensors cannot be read as safetensors"):
            mxfp4_compile.load(bad)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights only"):
        files.weight_files(pickled)
    with pytest.raises(CheckpointError, match="is a pickled checkpoint"):
        files.Weights([pickled / "pytorch_model.bin"])
    (pickled / files.INDEX).write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="which is no file of this directory"):
        files.weight_files(pickled)
    (pickled / files.INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match="is missing, though"):
        files.weight_files(pickled)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized with 'gptq'"),
        ({"quant_method": OWN, "format_version": 3}, "format_version 3"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "only mxfp4-pack-quantized"),
        (
            {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}},
            "'global_quant_config' has weights",
        ),
    ],
)
def test_unknown_forms_are_refused(declared: dict[str, Any], message: str) -> None:
    from mxfp4_compile.checkpoint.forms import declared_form

    with pytest.raises(CheckpointError, match=message):
        declared_form(declared, "config.json")


# writing is all or nothing


def test_a_failure_keeps_the_previous_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mxfp4_compile.optimize(loaded("qwen3_moe"))
    target = tmp_path / "m"
    model.save_pretrained(target)
    (target / "tokenizer.json").write_text("{}")
    before = _listing(target)
    for step in ("write_shard", "write_index", "staged", "install"):

        def fail(*a: Any, **k: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(f"mxfp4_compile.checkpoint.output.Output.{step}", fail)
            with pytest.raises(OSError, match="No space left"):
                model.save_pretrained(target, max_shard_size=40_000)
        assert _listing(target) == before
        assert [p.name for p in tmp_path.iterdir()] == ["m"]
    model.save_pretrained(target, max_shard_size=40_000)  # and other files of the directory stay
    assert (target / "tokenizer.json").read_text() == "{}" and not (target / "model.safetensors").exists()
    assert_same(model, mxfp4_compile.load(target, dtype=torch.bfloat16))


def test_a_full_disk_and_missing_permission_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mxfp4_compile.optimize(loaded("qwen3_moe"))

    def full(*a: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(CheckpointError, match=r"model.safetensors cannot be written: the disk is full"):
            model.save_pretrained(tmp_path / "m")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file is a file; a directory is needed"):
        model.save_pretrained(tmp_path / "file")
    if os.geteuid() != 0:
        closed = tmp_path / "closed"
        closed.mkdir()
        closed.chmod(0o500)
        with pytest.raises(CheckpointError, match="no permission to write"):
            model.save_pretrained(closed / "m")


def test_options_save_pretrained_does_not_have(tmp_path: Path) -> None:
    model = mxfp4_compile.optimize(loaded("qwen3_moe"))
    for name, value in {
        "push_to_hub": True, "variant": "fp16", "state_dict": {}, "save_original_format": False,
        "save_peft_format": False, "distributed_checkpoint": True, "safe_serialization": False,
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"takes no {name}="):
            model.save_pretrained(tmp_path / "m", **{name: value})
    with pytest.raises(TypeError, match="does not know colour"):
        model.save_pretrained(tmp_path / "m", colour="red")
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path / "m", True, None, False, "50GB", None, None, True, True, False)  # its defaults
    assert (tmp_path / "m" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="no size"):
        model.save_pretrained(tmp_path / "m", max_shard_size="much")


def test_strict_and_verify_while_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptimizeError, match="no mixture of experts was found"):
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
        )
        directory = saved("qwen3_moe").parent / "dense-llama"
        LlamaForCausalLM(config).save_pretrained(directory)
        mxfp4_compile.load(directory)
    # Wrong bits in the prepared weights are found by the verification on really loaded weights.
    from mxfp4_compile.passes.build import prep

    right = prep.run_prep

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out = right(*args, **kwargs)
        return prep.PreparedProjection([t.roll(1, 1) for t in out.tensors], out.errors)

    assert mxfp4_compile.load(saved("qwen3_moe")) is not None
    monkeypatch.setattr(
        "mxfp4_compile.ops.backends.cpu.CpuBackend.moe", lambda self, inputs: torch.zeros_like(inputs.x)
    )
    with pytest.raises(OptimizeError, match="failed verification"):
        mxfp4_compile.load(saved("qwen3_moe"))


def test_streamed_files_are_safetensors(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(12, dtype=torch.float32).view(3, 4),
        "b": torch.tensor(3.0, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 5),
        "flags": torch.tensor([True, False]),
    }
    units = [
        files.Unit(
            (files.Entry(n, t.dtype, tuple(t.shape)),),
            lambda n=n, t=t: [(n, p) for p in t.split(2)] if t.dim() else [(n, t)],
        )
        for n, t in tensors.items()
    ]
    files.write_shard(tmp_path / "x.safetensors", units)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    short = [files.Unit((files.Entry("a", torch.float32, (3, 4)),), lambda: [("a", tensors["a"][:2])])]
    with pytest.raises(CheckpointError, match="got fewer values"):
        files.write_shard(tmp_path / "y.safetensors", short)
    assert not (tmp_path / "y.safetensors").exists()
