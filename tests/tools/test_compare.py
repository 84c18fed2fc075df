"""compare: the figures against a computation of the test's own; the command; suggestions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import mxfp4_compile
from mxfp4_compile import mx
from mxfp4_compile.calibration.driver import Options
from mxfp4_compile.checkpoint.convert import convert
from mxfp4_compile.tools import main as cli
from mxfp4_compile.tools.compare import Comparison, SiteError, compare, plot, suggest_skip
from mxfp4_compile.tools.families import tiny_model

DEMO = Path(mxfp4_compile.__file__).parent / "demo_model"
TEXT = DEMO / "heldout.txt"


def _model() -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16).eval()


@pytest.mark.slow
def test_figures_against_our_own(tmp_path: Path) -> None:
    first, second = _model(), mxfp4_compile.optimize(_model())
    ids = torch.tensor(list(TEXT.read_bytes()[:192])).view(3, 64)
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits[:, :-1].double().log_softmax(-1) for m in (first, second))
    target = ids[:, 1:, None]
    kl = (p.exp() * (p - q)).sum(-1)
    result = compare(DEMO, TEXT, tokens=192, window=64, bound=1e-4)
    assert result.tokens == 192 and len(result.kl) == 189
    assert result.perplexity == pytest.approx(math.exp(-float(p.gather(2, target).mean())), rel=5e-3)
    assert result.perplexity_mxfp4 == pytest.approx(math.exp(-float(q.gather(2, target).mean())), rel=5e-3)
    assert result.kl_mean == pytest.approx(float(kl.mean()), rel=0.1)
    assert result.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=0.02)
    assert 0 < result.kl_median <= result.kl_p99 <= result.kl_max
    assert [s.name for s in result.sites] == [f"model.layers.{i}.mlp.experts" for i in range(4)]
    assert result.suggested_skip and set(result.suggested_skip) <= {s.name for s in result.sites}

    # The first site's inputs are the same in both models: its error can be had from outside.
    seen = {}
    first.model.layers[0].mlp.experts.register_forward_hook(
        lambda m, a, k, o: seen.update(a=a, k=k, o=o), with_kwargs=True
    )
    noise = power = 0.0
    experts = first.model.layers[0].mlp.experts
    for row in ids:
        with torch.no_grad():
            first(input_ids=row[None])
            args, kwargs, out = seen["a"], seen["k"], seen["o"]
            kept = {n: w.data for n, w in experts.named_parameters()}
            for n, w in experts.named_parameters():
                w.data = mx.dequantize(*mx.quantize(kept[n]), dtype=torch.bfloat16)
            other = experts(*args, **kwargs)
            for n, w in experts.named_parameters():
                w.data = kept[n]
        noise += float((other.double() - out.double()).square().sum())
        power += float(out.double().square().sum())
    assert result.sites[0].error == pytest.approx(noise / power, rel=1e-3)


@pytest.mark.slow
def test_against_a_checkpoint_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mxfp4_compile.optimize(_model(), scale_rule="floor").save_pretrained(tmp_path / "m")
    command = ["compare", str(DEMO), "--text", str(TEXT), "--tokens", "256", "--window", "64", "--json"]
    assert cli.main([*command, "--against", str(tmp_path / "m")]) == 0
    saved = json.loads(capsys.readouterr().out)
    assert cli.main([*command, "--scale-rule", "floor"]) == 0
    memory = json.loads(capsys.readouterr().out)
    assert saved.pop("against") == str(tmp_path / "m") and memory.pop("against")
    assert saved == memory  # the same bits, the same figures
    assert saved["suggested_skip"] is None


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sites = (SiteError("a", 0.01), SiteError("b", 0.03))
    numbers = {"tokens": 4, "window": 4, "perplexity": 3.0, "perplexity_mxfp4": 3.1, "kl_mean": 0.2}
    numbers |= {"kl_median": 0.1, "kl_p99": 0.5, "kl_max": 0.5, "top1_agreement": 0.75}
    result = Comparison("m", "n", "t", sites=sites, kl=(0.0, 0.1, 0.5), bound=0.1, suggested_skip=("b",), **numbers)
    assert "by estimate: skip=['b']" in str(result) and "+3.33%" in str(result)
    plot(result, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_suggestions() -> None:
    sites = (SiteError("a", 0.01), SiteError("b", 0.03), SiteError("c", 0.02))
    assert suggest_skip(sites, 0.6, 0.7) == ()
    assert suggest_skip(sites, 0.6, 0.35) == ("b",)
    assert suggest_skip(sites, 0.6, 0.2) == ("b", "c")
    assert suggest_skip(sites, 0.6, 1e-9)[:3] == ("b", "c", "a")


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(ValueError, match="has 1 tokens"):
        compare(DEMO, tmp_path / "short.txt")
    with pytest.raises(ValueError, match="bound must be above 0"):
        compare(DEMO, TEXT, bound=-1.0)
    assert cli.main(["compare", str(DEMO), "--text", str(tmp_path / "none.txt")]) == 1
    assert "none.txt" in capsys.readouterr().err


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A byte-level model's directory, its calibrated MXFP4 form, and the text it was calibrated on."""
    folder = tmp_path_factory.mktemp("compare")
    tiny_model("qwen3_moe", vocab_size=256, dtype=torch.bfloat16).save_pretrained(folder / "model")
    text = folder / "calibration.txt"
    text.write_text("what it was calibrated on. " * 40)
    other = folder / "other.txt"
    other.write_text("one more file")
    convert(folder / "model", folder / "mxfp4", calibration=Options([text, other], tokens=1000, window=50))
    return folder / "model", folder / "mxfp4", text


def test_the_calibration_text_is_no_judge(calibrated: tuple[Path, Path, Path]) -> None:
    model, against, text = calibrated
    with pytest.raises(ValueError, match=r"was calibrated on .*calibration\.txt .*: judge it on another text"):
        compare(model, text, against=against, tokens=64, window=32)


def test_damage_of_each_site_and_a_checkpoints_own_weights(calibrated: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, against, _ = calibrated
    text = tmp_path / "judge.txt"
    text.write_text("what it was calibrated on, and now is not. " * 8)
    nearest = compare(model, text, tokens=256, window=64, bound=1e-9)
    ours = compare(model, text, against=against, tokens=256, window=64)
    for site, plain in zip(ours.sites, nearest.sites, strict=True):
        assert site.name == plain.name and site.error < 0.9 * plain.error
        assert site.damage is not None and plain.damage is not None and site.damage < plain.damage
    total = sum(site.damage or 0.0 for site in nearest.sites)
    assert total == pytest.approx(nearest.kl_mean, rel=0.3)  # what each does alone adds up
    assert f"{nearest.sites[0].damage:.6f} nats" in str(nearest)
    worst = max(nearest.sites, key=lambda s: s.damage or 0.0)
    assert nearest.suggested_skip is not None and nearest.suggested_skip[0] == worst.name


def test_suggestions_follow_damage_where_it_was_measured() -> None:
    sites = (SiteError("a", 0.9, 0.001), SiteError("b", 0.1, 0.004), SiteError("c", 0.2, 0.005))
    assert suggest_skip(sites, 0.01, 0.006) == ("c",)
    assert suggest_skip(sites, 0.01, 0.002) == ("c", "b")
    assert suggest_skip(tuple(SiteError(s.name, s.error) for s in sites), 0.01, 0.006) == ("a",)
