"""A model that brings its own code, its experts in a list: rewritten, generating, saved, loaded, converted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import codes
from paths import SUPPORT, TESTS
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import mxfp4_compile
from mxfp4_compile import CheckpointError, mx
from mxfp4_compile.checkpoint.convert import convert
from mxfp4_compile.hf_models import class_of
from mxfp4_compile.passes.build.module import mxfp4_sites
from mxfp4_compile.tools.compare import compare
from mxfp4_compile.tools.main import main
from mxfp4_compile.tools.model_shapes import model_shapes

OWN, CT = "mxfp4_compile", "compressed_tensors"
CODE = TESTS / "remote_code"
TRUST: dict[str, Any] = {"trust_remote_code": True}


def publish(directory: Path, **sizes: int) -> Path:
    """A directory as such a model is published: code, configuration, weights."""
    shutil.copytree(CODE, directory, ignore=shutil.ignore_patterns("__pycache__"))
    config = {
        "model_type": "remote_moe",
        "architectures": ["RemoteMoEForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_remote_moe.RemoteMoEConfig",
            "AutoModelForCausalLM": "modeling_remote_moe.RemoteMoEForCausalLM",
        },
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        **sizes,
    }
    (directory / "config.json").write_text(json.dumps(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory, **TRUST), **TRUST)
    state = {name: value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("remote") / "remote-moe")


def plain(directory: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **TRUST).eval()


def ids(length: int = 11, batch: int = 2) -> torch.Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(length))


def assert_same(a: Any, b: Any) -> None:
    first, second = codes(a), codes(b)
    assert first and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        assert torch.equal(a(ids()).logits, b(ids()).logits)


def test_rewritten_and_generating(original: Path) -> None:
    check_rewritten_and_generating(original)


def check_rewritten_and_generating(original: Path) -> None:
    """Also what transformers 4 must do."""
    model = mxfp4_compile.optimize(plain(original, torch.float32))
    assert [s.outcome for s in model.mxfp4_report.sites] == ["fused"]
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "use_cache": False}
    with torch.no_grad():
        logits = {n: model(ids(n)).logits for n in (1, 11, 30)}
        text = model.generate(ids(), **options)
        mxfp4_compile.restore(model)
        for n, ours in logits.items():
            torch.testing.assert_close(ours, model(ids(n)).logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(text, model.generate(ids(), **options))


@pytest.mark.slow
def test_loaded_saved_and_loaded_again(original: Path, tmp_path: Path) -> None:
    optimized = mxfp4_compile.optimize(plain(original))
    streamed = mxfp4_compile.load(original, **TRUST)
    assert_same(optimized, streamed)
    assert streamed.mxfp4_report.sites[0].error is None or streamed.mxfp4_report.sites[0].error < 0.1
    for form in (OWN, CT):
        mxfp4_compile.save(streamed, tmp_path / form, form)
        assert_same(optimized, mxfp4_compile.load(tmp_path / form, **TRUST))
    with pytest.raises(CheckpointError, match="gpt_oss"):
        mxfp4_compile.save(streamed, tmp_path / "gpt_oss", "gpt_oss")
    # No expert is left in bf16, and each expert's layers are told by name.
    tensors = load_file(tmp_path / CT / "model.safetensors")
    layer = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert layer not in tensors
    weight = mx.dequantize(tensors[f"{layer}_packed"], tensors[f"{layer}_scale"], 32, torch.bfloat16)
    (site,) = mxfp4_sites(optimized).values()
    down = site.projections[-1]
    assert torch.equal(weight, site.dequantized(down)["experts.3.down_proj.weight"])


@pytest.mark.slow
def test_a_fresh_process_restores_it(original: Path, tmp_path: Path) -> None:
    optimized = mxfp4_compile.optimize(plain(original))
    optimized.save_pretrained(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").glob("*.py")) == sorted(p.name for p in CODE.glob("*.py"))
    code = (
        "import sys, torch, mxfp4_compile\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype='auto').eval()\n"
        "ids = torch.randint(256, (2, 11), generator=torch.Generator().manual_seed(11))\n"
        "with torch.no_grad():\n"
        "    torch.save(model(ids).logits, sys.argv[2])\n"
        "print(model.mxfp4_report)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "saved"), str(tmp_path / "logits.pt")],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), optimized(ids()).logits)


@pytest.mark.slow
def test_memory_while_loading(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "n_routed_experts": 32, "num_hidden_layers": 7}
    block = 32 * 3 * 512 * 512 * 2
    publish(tmp_path / "model", **sizes, intermediate_size=512)
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "load_memory.py"), str(tmp_path / "model")],
        capture_output=True,
        text=True,
        # What malloc keeps for later differs between machines: large pieces go back to the kernel when they are freed.
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak, final, tensors = map(int, done.stdout.split())
    assert 6 * block // 4 < tensors < 6 * block // 2  # the interpreter's own memory is in the other two
    assert tensors < final
    assert peak <= final + block


@pytest.mark.slow
def test_converted_file_by_file(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        convert(original, tmp_path / "refused")
    out = tmp_path / "converted"
    assert main(["optimize", str(original), "--out", str(out), "--trust-remote-code", "--max-shard-size", "20KB"]) == 0
    assert len(list(out.glob("*.safetensors"))) > 1
    assert_same(mxfp4_compile.optimize(plain(original)), mxfp4_compile.load(out, **TRUST))
    convert(original, tmp_path / CT, format=CT, **TRUST)
    assert_same(mxfp4_compile.load(out, **TRUST), mxfp4_compile.load(tmp_path / CT, **TRUST))


@pytest.mark.slow
def test_commands(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(*argv: str) -> str:
        assert main([argv[0], str(original), "--trust-remote-code", *argv[1:]]) == 0
        return capsys.readouterr().out

    assert "model.layers.1.mlp" in says("explain", "--html", str(tmp_path / "page.html"))
    assert "experts.*.down_proj.weight" in (tmp_path / "page.html").read_text()
    assert "model.layers.1.mlp" in says("backends", "--arch", "sm_90")
    (shape,) = model_shapes(str(original), torch.bfloat16, **TRUST)
    assert (shape.sizes, shape.gated, shape.biased) == ((8, 3, 64, 32), True, False)
    (tmp_path / "text.txt").write_text("The cat sat on the mat. " * 40)
    says("compare", "--text", str(tmp_path / "text.txt"), "--tokens", "64", "--window", "64", "--json")


def test_compared_on_a_text(original: Path, tmp_path: Path) -> None:
    text = "The cat sat on the mat. " * 3
    (tmp_path / "text.txt").write_text(text)
    result = compare(original, tmp_path / "text.txt", tokens=64, window=64, **TRUST)
    model = plain(original)
    block, seen = model.model.layers[1].mlp, {}
    block.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    with torch.no_grad():
        model(torch.tensor([list(text.encode())[:64]]))
        x, y = seen["x"], seen["y"].double()
        for weight in block.experts.parameters():
            weight.data = mx.dequantize(*mx.quantize(weight.data), dtype=torch.bfloat16)
        noise = (block(x).double() - y).square().sum() / y.square().sum()
    (site,) = result.sites
    assert site.name == "model.layers.1.mlp" and site.error == pytest.approx(float(noise), rel=1e-3)


def test_the_class_that_the_configuration_names() -> None:
    own = {"AutoConfig": "c.C", "AutoModel": "m.RemoteModel", "AutoModelForCausalLM": "m.RemoteForCausalLM"}
    for architecture, cls in (
        ("RemoteForCausalLM", "AutoModelForCausalLM"), ("RemoteModel", "AutoModel"), ("Other", "AutoModelForCausalLM"),
    ):  # fmt: skip
        config = SimpleNamespace(architectures=[architecture], auto_map=own)
        assert class_of(config, trust_remote_code=True).__name__ == cls
    ours = SimpleNamespace(architectures=["MixtralForCausalLM"], auto_map=own)
    assert class_of(ours).__name__ == "MixtralForCausalLM"
    assert class_of(SimpleNamespace(architectures=None)).__name__ == "AutoModelForCausalLM"


def test_what_a_block_does_not_know_is_still_unexpected(original: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(original, bad)
    extra = {"model.layers.1.mlp.gate.correction": torch.zeros(8)}
    save_file({**load_file(original / "model.safetensors"), **extra}, bad / "model.safetensors", {"format": "pt"})
    _, info = mxfp4_compile.load(bad, output_loading_info=True, **TRUST)
    assert set(info["unexpected_keys"]) == set(extra) and not info["missing_keys"]


@pytest.mark.slow
def test_bad_experts_are_named(original: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(original, bad)
    tensors = load_file(original / "model.safetensors")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"

    def write(value: torch.Tensor | None) -> None:
        state = {**tensors, name: value} if value is not None else {n: t for n, t in tensors.items() if n != name}
        save_file(state, bad / "model.safetensors", {"format": "pt"})

    write(None)
    with pytest.raises(CheckpointError, match=f"nothing in .* is for {name}"):
        mxfp4_compile.load(bad, **TRUST)
    write(tensors[name][:, :32].contiguous())
    with pytest.raises(CheckpointError, match=f"{name}.*do not belong together"):
        mxfp4_compile.load(bad, **TRUST)
    broken = tensors[name].clone()
    broken[0, 0] = float("nan")
    write(broken)
    with pytest.raises(CheckpointError, match="NaN or Inf in expert 5"):
        mxfp4_compile.load(bad, **TRUST)
    with pytest.raises(CheckpointError, match="NaN or Inf in expert 5"):
        convert(bad, tmp_path / "out", **TRUST)
    assert not (tmp_path / "out").exists()
