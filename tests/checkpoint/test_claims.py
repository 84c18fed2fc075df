"""What a checkpoint says is held against its files before work; whatever it says, only our exceptions come out."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import saved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import mxfp4_compile
from mxfp4_compile import CheckpointError
from mxfp4_compile.checkpoint import claims, quantizer
from mxfp4_compile.checkpoint import convert as converting
from mxfp4_compile.checkpoint.convert import convert
from mxfp4_compile.checkpoint.files import INDEX, WEIGHTS, Weights, weight_files
from mxfp4_compile.checkpoint.forms import declared_form
from mxfp4_compile.checkpoint.note import facts_of
from mxfp4_compile.tools.main import main

Edit = Callable[[dict[str, Any]], Any]


def changed(directory: Path, config: Edit | None = None, tensors: Edit | None = None) -> Path:
    """The tiny Qwen3 MoE with something about it changed."""
    shutil.copytree(saved("qwen3_moe"), directory)
    if config:
        said = json.loads((directory / "config.json").read_text())
        config(said)
        (directory / "config.json").write_text(json.dumps(said))
    if tensors:
        held = load_file(directory / WEIGHTS)
        tensors(held)
        save_file(held, directory / WEIGHTS, {"format": "pt"})
    return directory


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning, which runs a forward and allocates what the configuration says, must not be reached."""

    def reached(*args: Any, **kwargs: Any) -> None:
        pytest.fail("it began to work")

    monkeypatch.setattr(converting, "plan_sites", reached)
    monkeypatch.setattr(quantizer, "plan_sites", reached)


def refused(source: Path, message: str, kind: Any = CheckpointError) -> None:
    """By the converter and by ``load``, in the same words."""
    for entry in (lambda: convert(source, source.parent / "out"), lambda: mxfp4_compile.load(source)):
        with pytest.raises(kind, match=message):
            entry()
    assert not (source.parent / "out").exists() and not (source.parent / "out.partial").exists()


def test_shapes_are_compared_before_work(tmp_path: Path, no_work: None) -> None:
    def wide(config: dict[str, Any]) -> None:
        config["moe_intermediate_size"] = 262144

    refused(changed(tmp_path / "wide", wide), r"by config\.json .* has \d+ values, and the files hold \d+")

    def narrow(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:5].contiguous()

    refused(changed(tmp_path / "narrow", None, narrow), r"'model\.norm\.weight' .* do not belong together")


@pytest.mark.parametrize(
    "name", ["mlp.gate.weight", "self_attn.q_proj.weight", "input_layernorm.weight", "experts.1.up_proj.weight"]
)
def test_every_parameter_must_be_there(tmp_path: Path, name: str, no_work: None) -> None:
    def drop(tensors: dict[str, Any]) -> None:
        del tensors[next(key for key in sorted(tensors) if key.endswith(name))]

    message = rf"nothing in .*model.safetensors is for .*{name}"
    if "experts" in name:
        message = r"is one of \d+ experts; the model has \d+"
    refused(changed(tmp_path / "m", None, drop), message)


def test_a_new_head_is_allowed_where_another_class_is_asked_for(tmp_path: Path) -> None:
    import transformers

    model = mxfp4_compile.load(saved("qwen3_moe"), model_class=transformers.Qwen3MoeForSequenceClassification)
    assert "score.weight is not in the checkpoint: it is new, with random values" in model.mxfp4_report.notes


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts", "num_attention_heads"])
@pytest.mark.parametrize("value", [10**9, 10**400, 1e300, float("inf"), "4", -7, 2.5])
def test_numbers_that_are_none_or_absurd(tmp_path: Path, key: str, value: Any, no_work: None) -> None:
    def edit(config: dict[str, Any]) -> None:
        config[key] = value

    source = changed(tmp_path / "m", edit)
    with Weights(weight_files(source)) as weights, pytest.raises(CheckpointError, match=rf"config\.json: {key} is "):
        claims.check_numbers(claims.read_config_file(source), weights, source / "config.json")
    if value in (10**9, "4"):
        refused(source, rf"config\.json: {key} is ")


def test_more_modules_than_the_files_could_fill_are_not_made(tmp_path: Path) -> None:
    source = changed(tmp_path / "m")
    made = 0
    with (
        Weights(weight_files(source)) as weights,
        pytest.raises(CheckpointError, match=r"more than \d+ modules"),
        claims.sober(weights, source / "config.json", "it"),
    ):
        for _ in range(10**6):
            torch.nn.LayerNorm(1, device="meta")
            made += 1
    assert made < 50_000
    torch.nn.Linear(1, 1)  # and nobody counts afterwards


DECLARED: list[Any] = [
    "mxfp4", [], ["mxfp4"], 5, {"quant_method": "mxfp4_compile", "format_version": "x"}, {"quant_method": 5}, {},
    {"quant_method": "compressed-tensors", "config_groups": "x"},
    {"quant_method": "compressed-tensors", "config_groups": [1]},
    {"quant_method": "compressed-tensors", "config_groups": {"g": None}},
    {"quant_method": "compressed-tensors", "format": {}, "config_groups": {"g": {"format": []}}},
    {"quant_method": "quark", "layer_quant_config": 3}, {"quant_method": "quark", "global_quant_config": [1]},
    {"quant_method": "quark", "layer_quant_config": {"a": {"weight": 3}}},
]  # fmt: skip


@pytest.mark.parametrize("declared", DECLARED, ids=str)
def test_quantization_configs_that_are_none(declared: Any) -> None:
    with pytest.raises(CheckpointError, match=r"x/config\.json"):
        declared_form(declared, "x/config.json")


def test_a_leftover_configuration_is_refused_in_both_entries(tmp_path: Path, no_work: None) -> None:
    for method in ("mxfp4_compile", "mxfp4"):

        def edit(config: dict[str, Any], method: str = method) -> None:
            config["quantization_config"] = {"quant_method": method}

        refused(changed(tmp_path / method, edit), r"says that the weights are MXFP4 .*, and no tensor is")


def test_an_adapter_beside_the_weights(tmp_path: Path, no_work: None) -> None:
    source = changed(tmp_path / "m")
    (source / "adapter_config.json").write_text("{}")
    refused(source, r"adapter_config\.json: an adapter lies beside the weights")


def test_a_single_file_goes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    source = changed(tmp_path / "m")
    (source / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    assert weight_files(source) == [source / WEIGHTS]


@pytest.mark.parametrize("text", ["[" * 20_000, "5", '"x"', "null", "[]", "{", '{"model_type": "qwen3_moe"', "\0"])
def test_configurations_that_are_no_objects(tmp_path: Path, text: str, no_work: None) -> None:
    source = changed(tmp_path / "m")
    (source / "config.json").write_text(text)
    refused(source, r"config\.json (cannot be read as JSON|is )")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = json.loads((saved("qwen3_moe") / "config.json").read_text())


EDITED = sorted({*KEYS, "quantization_config", "mxfp4_compile", "rope_scaling", "text_config", "auto_map"})
SAID = ["scale_rule", "versions", "weight_errors", "skip", "verify", "backend", "progress", "strict", "example_inputs"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(edits=st.dictionaries(st.sampled_from(EDITED), JSON, min_size=1, max_size=3))
def test_any_configuration_gives_a_model_or_an_error_of_ours(
    edits: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = changed(tmp_path_factory.mktemp("any") / "m", lambda config: config.update(edits))
    tracemalloc.start()
    try:
        with Weights(weight_files(source)) as weights, suppress(CheckpointError, ValueError):
            converting.skeleton(source, weights)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        shutil.rmtree(source.parent)
    assert peak < 1 << 28


@settings(max_examples=60, deadline=None)
@given(said=st.dictionaries(st.sampled_from(SAID), JSON))
def test_a_file_turns_nothing_off(said: dict[str, Any]) -> None:
    assert facts_of(said).keys() <= {"scale_rule", "versions", "weight_errors", "skip"}
    config = mxfp4_compile.Mxfp4CompileConfig.from_dict({**said, "quant_method": "mxfp4_compile"})
    plain = mxfp4_compile.Mxfp4CompileConfig()
    for name in ("backend", "verify", "strict", "progress", "skip", "example_inputs", "activation_dtype"):
        assert getattr(config, name) == getattr(plain, name)


HEADERS = st.dictionaries(
    st.text(max_size=6),
    st.fixed_dictionaries({
        "dtype": st.sampled_from(["BF16", "F32", "U8", "F4", "", "X"]),
        "shape": st.lists(st.integers(-1, 2**63), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 2**64), max_size=3),
    }) | JSON,
    max_size=3,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(header=HEADERS, size=st.integers(0, 2**64 - 1) | st.none())
def test_any_header_is_read_or_refused(header: Any, size: int | None, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "header.safetensors"
    text = json.dumps(header).encode()
    file.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + b"\0" * 16)
    with suppress(CheckpointError), Weights([file]) as weights:
        for name in weights.tensors:
            weights.read(name)


def test_scales_of_other_quantizations_are_named() -> None:
    form, _ = declared_form(
        {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "config_groups": {}}, "x"
    )
    from mxfp4_compile.checkpoint.files import Stored

    for name, dtype, message in (
        ("a.weight_scale", "F8_E4M3", "E8M0 bytes .*; these are NVFP4 has such|NVFP4 has such scales"),
        ("a.weight_scale", "BF16", "of another quantization"),
        ("a.weight_global_scale", "F32", "a global scale is part of NVFP4; MXFP4 has none"),
    ):
        with pytest.raises(CheckpointError, match=message):
            claims._split(form, Stored(Path("f"), name, dtype, (1,)))


def test_nothing_in_a_file_reaches_the_terminal_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "model.layers.0.\x1b]0;owned\x07\x1b[2J.weight"
    source = changed(tmp_path / "m", None, lambda tensors: tensors.update({evil: torch.zeros(2, dtype=torch.int32)}))
    (source / "\x1b[31mred.bin").write_text("x")
    assert main(["optimize", str(source), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "\\x1b[31mred.bin" in said.out and "\x1b" not in said.out + said.err
    assert main(["optimize", str(tmp_path / "no\x1b[2J"), "--out", str(tmp_path / "o")]) == 1
    assert "\x1b" not in capsys.readouterr().err
    assert "\x1b" not in str(CheckpointError(f"tensor {evil} is bad")) and "\\x1b" in str(CheckpointError(evil))


@pytest.mark.parametrize("command", [["explain"], ["backends"], ["compare", "--text", "text.txt"]])
def test_nobody_is_asked_whether_to_run_code(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def edit(config: dict[str, Any]) -> None:
        config.clear()  # transformers knows the model type, and no such class of it
        code = {"AutoModelForCausalLM": "modeling_unheard.Unheard"}
        config.update({"model_type": "clip", "architectures": ["Unheard"], "auto_map": code})

    source = changed(tmp_path / "m", edit)
    (source / "modeling_unheard.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "text.txt").write_text("the cat sat on the mat " * 50)
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda *a: asked.append("asked") or "y")
    monkeypatch.chdir(tmp_path)
    assert main([command[0], str(source), *command[1:]]) == 1
    assert not asked and not (tmp_path / "ran").exists()


def test_load_asks_nobody_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["model_type"] = "unheard"
        config["auto_map"] = {"AutoConfig": "modeling_unheard.Unheard"}

    source = changed(tmp_path / "m", edit)
    (source / "modeling_unheard.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("it asks"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        mxfp4_compile.load(source)
    assert not (tmp_path / "ran").exists()
