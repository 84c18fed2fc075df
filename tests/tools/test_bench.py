"""``mxfp4-compile bench`` and what benchmarks/ is made of: arguments, shapes, verification, peers that are absent."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import REPO

from mxfp4_compile import mx
from mxfp4_compile.ops.synthetic import LayerShape, parse_shape
from mxfp4_compile.timing import median_wall_us
from mxfp4_compile.tools import benchmark
from mxfp4_compile.tools.benchmark import Layer, Timing, measure, run_bench
from mxfp4_compile.tools.main import main

BENCHMARKS = REPO / "benchmarks"
CPU = torch.device("cpu")
SMALL = LayerShape(6, 2, 64, 48)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


# shapes


def test_parse_shape() -> None:
    assert parse_shape("128, 8,2048,768") == LayerShape(128, 8, 2048, 768)


@pytest.mark.parametrize("text", ["", "1,2,3", "8,2,64,x", "8,2,64,-1", "8,2,64,0", "2,3,64,64", "8,2,64,64,1"])
def test_what_is_no_shape(text: str) -> None:
    with pytest.raises(ValueError, match="E,K,H,I"):
        parse_shape(text)


# layers


def test_layer_is_the_same_for_every_provider() -> None:
    first, second = Layer(SMALL, CPU), Layer(SMALL, CPU)
    for role in ("up", "down"):
        for a, b in zip(first.canonical[role], second.canonical[role], strict=True):  # type: ignore[index]
            assert torch.equal(a, b)
    packed, scales = mx.quantize(first.original("up", 5))
    assert torch.equal(packed, first.canonical["up"][0][5]) and torch.equal(scales, first.canonical["up"][1][5])
    assert not torch.equal(first.original("up", 0), first.original("up", 1))
    assert not torch.equal(Layer(SMALL, CPU, seed=1).original("up", 0), first.original("up", 0))


def test_reference_against_the_dense_formula() -> None:
    layer = Layer(SMALL, CPU)
    x, ids, weights = layer.inputs(7)
    dense = torch.zeros(7, SMALL.hidden, dtype=torch.float64)
    for t in range(7):
        for j in range(SMALL.top_k):
            up, down = (layer.dequantized(r, int(ids[t, j]), torch.float64) for r in ("up", "down"))  # type: ignore[arg-type]
            gate, rest = (up @ x[t].double()).chunk(2)
            dense[t] += float(weights[t, j]) * (down @ (torch.nn.functional.silu(gate) * rest))
    assert benchmark.relative_error(layer.reference(x, ids, weights), dense) < 1e-6


def test_skew_concentrates_the_routing() -> None:
    layer = Layer(LayerShape(64, 2, 32, 32), CPU)
    even, skewed = (layer.inputs(512, skew)[1].flatten().bincount(minlength=64).max() for skew in (0.0, 2.0))
    assert skewed > 5 * even
    ids = layer.inputs(512, 2.0)[1]
    assert bool((ids[:, 0] != ids[:, 1]).all())


def test_wrong_results_are_not_timed() -> None:
    want = torch.randn(4, 4)
    timed: list[Any] = []
    timer = lambda run: timed.append(run) or 1.0
    assert measure("right", lambda: want.clone(), want, timer) == Timing("right", 1.0, 0.0)
    assert len(timed) == 1
    for bad in (want * 1.1, torch.full_like(want, float("nan"))):
        result = measure("wrong", lambda bad=bad: bad, want, timer)
        assert result.us is None and result.skipped.startswith("wrong: relative error")

    def failing() -> Any:
        raise RuntimeError("first line\nno kernel image")

    assert measure("failing", failing, want, timer).skipped == "RuntimeError: no kernel image"
    assert len(timed) == 1


def test_median_wall_time_is_positive() -> None:
    assert 0 < median_wall_us(lambda: sum(range(100))) < 1e6


# the command


def bench(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(["bench", *argv])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    "argv",
    [
        ["--shape", "8,2,64"],
        ["--shape", "8,2,64,32", "some/model"],
        ["--shape", "8,2,64,32", "--tokens", "0"],
        ["--shape", "8,2,64,32", "--tokens", "1,x"],
        ["--shape", "8,2,64,32", "--skew", "-1"],
        ["--shape", "8,2,64,32", "--skew", "nan"],
    ],
)
def test_wrong_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["bench", *argv])
    assert exit.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = bench(capsys, "--shape", "8,2,64,32")
    assert (code, out) == (1, "")
    assert err.startswith("mxfp4-compile: error: torch finds no GPU here") and "--device cpu" in err
    assert err.count("\n") == 1


def test_other_errors_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cpu = ("--device", "cpu")
    for argv, words in (
        (("--shape", "8,2,64,32", "--device", "tpu"), "tpu"),
        (("--shape", "8,2,64,32", *cpu, "--providers", "nobody"), "no provider 'nobody'"),
        (("--shape", "8,2,64,32", *cpu, "--plot", str(tmp_path / "none" / "x.png")), "there is no directory"),
        ((str(tmp_path / "nothing"), *cpu), "there is no directory"),
        ((str(tmp_path), *cpu), "holds no config.json"),
    ):
        code, out, err = bench(capsys, *argv)
        assert (code, out) == (1, ""), argv
        assert words in err and err.count("\n") == 1, err


def test_table_json_and_plot_on_the_cpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from transformers import MixtralConfig

    config = {"num_local_experts": 6, "num_experts_per_tok": 2, "hidden_size": 64, "intermediate_size": 48}
    MixtralConfig(**config).save_pretrained(tmp_path)
    common = ["--device", "cpu", "--tokens", "9,1", "--providers", "cpu,reference"]
    picture = tmp_path / "bench.png"
    code, out, err = bench(capsys, str(tmp_path), *common, "--plot", str(picture))
    assert code == 0, err
    assert "E=6 K=2 H=64 I=48, bfloat16, on cpu" in out and "wall clock" in out and "relative error" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, out, _ = bench(capsys, "--shape", "6,2,64,48", *common, "--json")
    (found,) = json.loads(out)["layers"]
    assert found["shape"] == {"num_experts": 6, "top_k": 2, "hidden": 64, "intermediate": 48, "gated": True,
                              "biased": False, "dtype": "bfloat16"}  # fmt: skip
    assert code == 0 and [r["tokens"] for r in found["rows"]] == [1, 9]
    assert found["device"] == "cpu" and found["rows"][0]["floor"] is None
    for row in found["rows"]:
        assert [t["provider"] for t in row["timings"]] == ["cpu", "reference"]
        assert all(t["us"] > 0 and t["error"] < 2e-2 and not t["skipped"] for t in row["timings"])


def test_layers_without_a_gate_and_with_biases() -> None:
    shape = LayerShape(4, 2, 64, 32, gated=False, biased=True)
    result = run_bench(shape, [3], CPU, ["cpu", "hf_grouped"])
    assert result.rows[0].timings[0].error < 2e-2
    assert any("biases" in note for note in result.notes)
    assert any("without a gate" in note for note in result.notes)


def test_what_cannot_run_is_noted() -> None:
    result = run_bench(SMALL, [1], CPU, ["cpu"])
    assert any(note.startswith("triton left out: device") for note in result.notes)


def test_hugging_face_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(SMALL, CPU)
    case = layer.inputs(5)
    got = layer.hf("grouped_mm", compiled=False)(*case)()
    assert benchmark.relative_error(got, layer.reference(*case, original=True)) < 1e-2
    assert benchmark.relative_error(got, layer.reference(*case)) > 5e-2, "original weights, not the quantized ones"


# benchmarks/


@pytest.mark.parametrize("name", ["triton_kernels", "humming"])
def test_absent_peers_are_skipped_with_a_reason(name: str, scripts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import moe_layer

    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        moe_layer.PROVIDERS[name](Layer(SMALL, CPU))


def test_shapes_of_the_script(scripts: None) -> None:
    import moe_layer

    assert moe_layer.shape_of("mixtral-8x7b") == (LayerShape(8, 2, 4096, 14336), 0.0)
    assert moe_layer.shape_of("olmoe@1.5") == (LayerShape(64, 8, 2048, 1024), 1.5)
    assert moe_layer.shape_of("6x2x64x48") == (SMALL, 0.0)
    with pytest.raises(ValueError, match="unknown shape"):
        moe_layer.shape_of("nothing")


@pytest.mark.slow
def test_script_runs_and_skips(scripts: None, tmp_path: Path) -> None:
    """Processes of their own, one of which finds its library missing."""
    import subprocess

    command = [sys.executable, str(BENCHMARKS / "moe_layer.py"), "--device", "cpu", "--shapes", "6x2x64x48"]
    command += ["--tokens", "1,9", "--providers", "mxfp4,humming", "--out", str(tmp_path), "--name", "t"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "skipped: humming: " in done.stdout
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert all(r["mxfp4"] > 0 and r["mxfp4_error"] < 2e-2 and "humming_skipped" in r for r in rows)
    assert (tmp_path / "t.png").exists()


def test_sanitizer_logs(scripts: None) -> None:
    import sanitize

    clean = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitize.check("memcheck", clean) == ""
    assert "3 errors" in sanitize.check("memcheck", clean.replace("0 errors", "3 errors"))
    races = "========= RACECHECK SUMMARY: {} hazards displayed (0 errors, 0 warnings)\n"
    assert sanitize.check("racecheck", races.format(0)) == ""
    assert sanitize.check("racecheck", races.format(2)) != ""
    with pytest.raises(RuntimeError, match="no summary"):
        sanitize.check("memcheck", "nothing of the kind")
    with pytest.raises(RuntimeError, match="not supported"):
        sanitize.check("memcheck", "========= Error: Device not supported\n" + clean)
