"""The command line: demo, explain, env; exit codes, one-line errors, JSON that machines can read."""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import REPO
from transformers import LlamaConfig, LlamaForCausalLM

from mxfp4_compile import __version__, mx
from mxfp4_compile.ops.registry import known_backends
from mxfp4_compile.tools import demo
from mxfp4_compile.tools.environment import PURPOSES, environment
from mxfp4_compile.tools.explain import explain_model
from mxfp4_compile.tools.families import decorated_families, tiny_inputs, tiny_model
from mxfp4_compile.tools.main import main

PERPLEXITY_BYTES = demo.PERPLEXITY_BYTES  # of a whole run: the fixture below takes less
DEVELOPERS = {"dev", "docs", "lint", "package"}  # extras that nobody needs to use the package


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of one command."""
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a command that must fail with exit code 1."""
    code, out, err = run(capsys, *argv)
    assert code == 1
    assert out == ""
    assert err.startswith("mxfp4-compile: error: ")
    assert err.count("\n") == 1, "one line, no traceback"
    return err


# usage


def test_version_from_a_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mxfp4_compile", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"mxfp4-compile {__version__}"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["explain"],
        ["explain", "model", "--family", "qwen3_moe"],
        ["demo", "--tokens", "0"],
        ["demo", "--tokens", "100000"],
        ["demo", "--tokens", "many"],
    ],
)
def test_wrong_usage_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    assert "usage: mxfp4-compile" in capsys.readouterr().err


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("demo", "explain", "env"))


# demo


@pytest.fixture(scope="module")
def result() -> Iterator[demo.DemoResult]:
    """One run on the model that ships with the package, with less text and shorter measurements."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "PERPLEXITY_BYTES", 8 * 1024)
        patch.setattr(demo, "ROUND_SECONDS", 0.1)
        patch.setattr(demo, "ROUNDS", 2)
        yield demo.run_demo(tokens=24)


@pytest.fixture
def canned(result: demo.DemoResult, monkeypatch: pytest.MonkeyPatch) -> demo.DemoResult:
    """The commands print ``result`` instead of measuring again."""
    monkeypatch.setattr(demo, "run_demo", lambda tokens, **_: result)
    return result


@pytest.mark.slow
@pytest.mark.smoke
@pytest.mark.xdist_group("demo")
def test_demo_json(canned: demo.DemoResult, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "demo", "--json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert data["expert_bytes_ratio"] >= 3.7
    assert data["expert_bytes_before"] / data["expert_bytes_after"] == data["expert_bytes_ratio"]
    assert set(data["perplexity"]) == {"bf16", *mx.SCALE_RULES}
    assert data["perplexity_bytes"] == 8 * 1024
    assert set(data["samples"]) == {"bf16", "mxfp4"}
    assert all(len(text) > 0 for text in data["samples"].values())
    speeds = data["tokens_per_second"]
    assert set(speeds) == {"bf16", "mxfp4", "ratio"}
    assert min(speeds.values()) > 0
    assert speeds["ratio"] == speeds["mxfp4"] / speeds["bf16"]
    assert data["report"]["scale_rule"] == mx.DEFAULT_SCALE_RULE
    assert [site["outcome"] for site in data["report"]["sites"]] == ["fused"] * 4
    # The distribution's version: a build's own part ("+cu130") is not in the one that pip knows.
    assert data["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert data["hardware"]["cores"] >= 1


@pytest.mark.xdist_group("demo")
def test_demo_perplexities(result: demo.DemoResult) -> None:
    bf16 = result.perplexity["bf16"]
    assert 1 < bf16 < 10, "a trained model; 256 would be chance"
    for rule in mx.SCALE_RULES:
        assert math.isfinite(result.perplexity[rule])
        assert abs(result.change(rule)) < 0.1


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
def test_demo_text(canned: demo.DemoResult, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "demo")
    assert code == 0
    for expected in (
        "3.76x smaller",
        "4 of 4 MoE modules rewritten",
        "floor",
        "mse (default)",
        "a CPU is for checking",
    ):
        assert expected in out
    assert canned.samples["mxfp4"].splitlines()[0] in out


@pytest.mark.xdist_group("demo")
def test_demo_notes_explain_a_notable_loss(result: demo.DemoResult) -> None:
    worse = demo.DemoResult(**{**vars(result), "perplexity": {**result.perplexity, "floor": 99.0}})
    assert "under floor" in worse.notes[0]


def test_demo_samples_repeat_and_leave_the_random_state() -> None:
    model = demo.load(demo.MODEL_DIRECTORY)
    before = torch.get_rng_state()
    assert demo.sample(model, "TIMON:\n", 12) == demo.sample(model, "TIMON:\n", 12)
    assert torch.equal(torch.get_rng_state(), before)


def test_demo_without_its_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"heldout\.txt is missing"):
        demo.run_demo(directory=tmp_path)
    (tmp_path / "heldout.txt").write_bytes(b"x" * demo.WINDOW)
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        demo.run_demo(directory=tmp_path)


@pytest.mark.slow
def test_demo_from_a_process() -> None:
    """The whole demo: only JSON on stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "mxfp4_compile", "demo", "--json"], capture_output=True, text=True, check=True
    )
    data = json.loads(done.stdout)
    assert data["perplexity_bytes"] == PERPLEXITY_BYTES
    speeds = data["tokens_per_second"]
    assert speeds["ratio"] == pytest.approx(speeds["mxfp4"] / speeds["bf16"], rel=1e-2)


# explain


def explain_json(capsys: pytest.CaptureFixture[str], family: str) -> dict[str, Any]:
    code, out, err = run(capsys, "explain", "--family", family, "--json")
    assert (code, err) == (0, "")
    data: dict[str, Any] = json.loads(out)
    return data


def test_explain_qwen3_moe(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "explain", "--family", "qwen3_moe")
    assert (code, err) == (0, "")
    assert "2 MoE modules, 1 distinct" in out, "identical layers are printed once"
    assert out.count("prep program of up") == 1
    for expected in (
        "model.layers.0.mlp.experts, model.layers.1.mlp.experts",
        "called as (bfloat16[*, 64]",
        "8 experts, 2 for each token",
        "gate and up are the halves",
        "gate_up_proj, bfloat16, stored [E, N, K]",
        "backend on cpu: cpu",
        "not reference  ",
        "torch.ops.mxfp4.quantize.default(gate_up_proj, 'mse')",
        "torch.ops.mxfp4.moe.default(",
    ):
        assert expected in out


def test_explain_gpt_oss(capsys: pytest.CaptureFixture[str]) -> None:
    (site,) = explain_json(capsys, "gpt_oss")["sites"]
    assert site["outcome"] == "fused"
    assert "alpha=1.702" in site["spec"]
    assert [w["biases"] for w in site["weights"]] == [["gate_up_proj_bias"], ["down_proj_bias"]]
    assert {w["stored"] for w in site["weights"]} == {"[E, K, N]"}
    assert "transpose" in dict(site["prep"])["up"]
    assert site["rewritten"].count("mxfp4.moe") == 1


def test_explain_muse_spark_is_split(capsys: pytest.CaptureFixture[str]) -> None:
    (site,) = explain_json(capsys, "muse_spark")["sites"]
    assert site["outcome"] == "split"
    assert site["reason"]
    assert site["rewritten"].count("mxfp4.grouped_linear") == 2
    assert {name for name, _ in site["others"]} == set(known_backends()) - {site["backend"]}


def test_explain_shows_a_module_without_a_match(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("qwen3_moe")
    for module in model.modules():
        if type(module).__name__ == "Qwen3MoeExperts":
            module.forward = lambda x, ids, weights: x  # type: ignore[assignment]
    (site,) = explain_model(model, example_inputs=tiny_inputs(model)).sites
    assert site.outcome == "unmatched"
    assert len(site.names) == 2
    assert site.reason


def test_explain_changes_nothing() -> None:
    model = tiny_model("gpt_oss", dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    identities = [id(module) for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    implementation, random = model.config._experts_implementation, torch.get_rng_state()
    explain_model(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [id(module) for module in model.modules()] == identities
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.config._experts_implementation == implementation
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_explain_the_demo_models_directory(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "explain", str(demo.MODEL_DIRECTORY))
    assert (code, err) == (0, "")
    assert "4 MoE modules, 1 distinct" in out


def test_explain_a_dense_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    with demo.quiet():
        LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert "no mixture of experts was found" in fails(capsys, "explain", str(tmp_path))


def test_explain_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no directory" in fails(capsys, "explain", str(tmp_path / "nothing"))
    assert "there is no directory" in fails(capsys, "explain", "nothing")
    assert "config.json" in fails(capsys, "explain", str(tmp_path))
    (tmp_path / "file").touch()
    assert "is a file" in fails(capsys, "explain", str(tmp_path / "file"))
    (tmp_path / "config.json").write_text("{}")
    fails(capsys, "explain", str(tmp_path))


def test_explain_an_unknown_family_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    error = fails(capsys, "explain", "--family", "nonsense")
    assert all(family in error for family in decorated_families())


def test_traceback_on_request() -> None:
    with pytest.raises(FileNotFoundError):
        main(["explain", "/nothing/here", "--traceback"])


# env


def test_env_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "env", "--json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert data["versions"]["mxfp4_compile"] == __version__
    assert {"python", "torch", "triton", "transformers", "depyf", "safetensors"} <= set(data["versions"])
    on_cpu = {b["name"]: b for b in data["backends"] if b["device"] == "cpu"}
    assert set(on_cpu) == set(known_backends())
    assert on_cpu["cpu"]["available"]
    assert on_cpu["reference"]["available"]
    assert all(isinstance(r["reason"], str) for b in on_cpu.values() for r in b["requirements"])
    assert {"extra", "purpose", "missing", "install"} == set(data["optional"][0])
    assert data["hardware"]["cpu"]


def test_env_text(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "env")
    assert code == 0
    assert all(word in out for word in ("Versions", "Devices", "Backends", "Optional parts", "available"))


def test_env_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By the metadata of the installed package: both bounds, extras of extras, and what this Python needs not."""
    declared = [
        "torch>=2.11",
        'transformers>=5.17; extra == "hf"',
        'tqdm; extra == "hf"',
        'transformers<5,>=4.57; extra == "hf4"',
        'depyf>=0.20; extra == "inspect"',
        'mxfp4_compile[hf]; extra == "test"',
        'transformers<5.24; extra == "test"',
        'pytest; python_version < "3" and extra == "test"',
    ]
    have = {"transformers": "5.23.0", "tqdm": "4.0", "depyf": "0.19.1"}
    monkeypatch.setattr("importlib.metadata.requires", {"mxfp4_compile": declared}.__getitem__)
    monkeypatch.setattr("mxfp4_compile.tools.environment.installed", have.get)
    parts = {p.extra: p.missing() for p in environment().optional}
    assert parts == {
        "hf": (),
        "hf4": ("transformers<5,>=4.57 (found 5.23.0)",),
        "inspect": ("depyf>=0.20 (found 0.19.1)",),
        "test": (),
    }
    assert 'missing depyf>=0.20 (found 0.19.1): pip install "mxfp4_compile[inspect]"' in " ".join(
        run(capsys, "env")[1].split()
    )
    have["transformers"] = "5.24.1"
    assert {p.extra: p.missing() for p in environment().optional}["test"] == (
        "transformers<5.24,>=5.17 (found 5.24.1)",
    )


def test_env_of_a_package_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.requires", nowhere)
    assert "not known, as mxfp4_compile runs without being installed" in run(capsys, "env")[1]


@pytest.mark.smoke
def test_optional_parts_are_the_extras() -> None:
    """Every extra of pyproject.toml but those that developers alone need has its purpose told."""
    text = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", section, re.M))
    assert PURPOSES.keys() == extras - DEVELOPERS
