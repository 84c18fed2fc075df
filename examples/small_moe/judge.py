"""What MXFP4 costs a trained model: divergence from the original and rise of the loss, on text of packages held out.

KL(original || MXFP4) and the loss per token, both models in fp32 on bf16 weights, so that rounding of weights is all
that differs; the last rows are what runs on a GPU, in bf16 and with fp8 activations. Intervals: 95 %, paired bootstrap
over windows of 512 tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mxfp4_compile
from mxfp4_compile import mx
from mxfp4_compile.calibration import sites, solver
from mxfp4_compile.tools.environment import hardware, versions

WINDOW = 512
RESAMPLES = 4000
TEXTS = {"held-code": "code", "held-prose": "prose"}


class Judge:
    """The original's log-probabilities on both held-out texts, and what other weights make of them."""

    def __init__(self, model: Any, text: Any, args: argparse.Namespace) -> None:
        self.exact = copy.deepcopy(model).float()
        self.exact.set_experts_implementation("eager")
        self.original = {n: p.detach().clone() for n, p in model.named_parameters() if ".experts." in n}
        self.ids = {name: text.windows(name, args.judged_windows, WINDOW) for name in TEXTS}
        self.bytes = {name: text.header["bytes"][name] / text.header["tokens"][name] for name in TEXTS}
        self.truth = {name: self.log_probabilities(self.exact, name) for name in TEXTS}
        self.base: dict[str, Tensor] = {}

    @torch.no_grad()
    def log_probabilities(self, model: Any, name: str) -> Tensor:
        """[windows, 511, vocabulary] fp32."""
        parts = [model(input_ids=ids, use_cache=False).logits[:, :-1].float() for ids in self.ids[name].split(16)]
        return torch.cat([p.log_softmax(-1) for p in parts])

    def weights(self, experts: dict[str, Tensor]) -> Any:
        """The fp32 model with other experts; what is not named is the original's."""
        with torch.no_grad():
            for name, parameter in self.exact.named_parameters():
                if name in self.original:
                    parameter.copy_(experts.get(name, self.original[name]))
        return self.exact

    def row(self, name: str, model: Any) -> dict[str, Any]:
        """One model on both texts; the first that is judged is what others are held against."""
        found: dict[str, Any] = {"name": name}
        for text, short in TEXTS.items():
            kl, loss, rise = self._windows(self.log_probabilities(model, text), text)
            base = self.base.setdefault(text, kl)
            generator = torch.Generator().manual_seed(0)
            some = torch.randint(len(kl), (RESAMPLES, len(kl)), generator=generator)
            at = torch.tensor([0.025, 0.975], dtype=torch.float64)
            ratio = (kl[some].mean(1) / base[some].mean(1)).quantile(at).tolist()
            found[short] = {
                "kl_mnat_per_token": 1e3 * float(kl.mean()),
                "kl_mnat_per_byte": 1e3 * float(kl.mean()) / self.bytes[text],
                "of_nearest": float(kl.mean() / base.mean()), "of_nearest_interval": ratio,
                "loss_nats_per_token": float(loss.mean()),
                "loss_rise_mnat_per_token": 1e3 * float(rise.mean()),
                "loss_rise_interval": (1e3 * rise[some].mean(1)).quantile(at).tolist(),
            }  # fmt: skip
        return found

    def _windows(self, log_q: Tensor, text: str) -> tuple[Tensor, Tensor, Tensor]:
        """By window, fp64 on the host: KL, loss, and its rise over the original's."""
        truth, next_ids = self.truth[text], self.ids[text][:, 1:, None]
        kl = torch.cat([(t.exp() * (t - q)).sum(-1).double().mean(1) for t, q in zip(truth, log_q, strict=True)
                        for t, q in ((t[None], q[None]),)])  # fmt: skip
        loss, before = (-p.gather(-1, next_ids).squeeze(-1).double().mean(1) for p in (log_q, truth))
        return kl.cpu(), loss.cpu(), (loss - before).cpu()


def rounded(original: dict[str, Tensor], rule: str) -> dict[str, Tensor]:
    """Experts rounded to nearest; the last dimension of each is the one multiplied along."""
    found = {}
    for name, weight in original.items():
        packed, scales = mx.quantize(weight, rule)
        found[name] = mx.dequantize(packed, scales, weight.shape[-1], weight.dtype)
    return found


@contextmanager
def without_descent() -> Iterator[None]:
    """Within the block calibration ends with GPTQ."""
    before = sites.solve
    sites.solve = partial(solver.solve, sweeps=0)
    try:
        yield
    finally:
        sites.solve = before


def judge(model: Any, text: Any, facts: dict[str, Any], args: argparse.Namespace) -> None:
    """Row after row, until the time is used up; what is there is written after each."""
    run = _Run(model, text, facts, args)
    try:
        run.all()
    finally:
        draw(run.result["rows"], args.out / "results.png")


class _Run:
    def __init__(self, model: Any, text: Any, facts: dict[str, Any], args: argparse.Namespace) -> None:
        self.started = time.monotonic()
        self.model, self.text, self.args = model, text, args
        self.judge = Judge(model, text, args)
        self.longest, self.torch_alone = 0.0, False
        self.result: dict[str, Any] = {
            "model": facts, "judged_on": f"windows of {WINDOW} tokens, {[len(i) for i in self.judge.ids.values()]}",
            "hardware": asdict_(hardware()), "versions": versions(), "rows": [], "not_reached": [], "failed": {},
        }  # fmt: skip

    @property
    def left(self) -> float:
        """Seconds."""
        return float(self.args.judge_seconds) - (time.monotonic() - self.started)

    def row(self, name: str, make: Callable[[], tuple[Any, dict[str, Any]]], *, slow: bool = True) -> None:
        """Judge what ``make`` returns, a model and facts about it; a failure is written down and the next one comes."""
        if self.left < (self.longest if slow else 1.0):
            self.result["not_reached"].append(name)
            self.write()
            return
        started = time.monotonic()
        try:
            model, about = make()
            if self.args.device != "cpu":
                torch.cuda.synchronize()
            about["seconds"] = time.monotonic() - started
            row = {**self.judge.row(name, model), **about}
        except Exception as error:  # the others are worth having all the same
            self.result["failed"][name] = f"{type(error).__name__}: {error}"[:2000]
            print(f"{name}: {self.result['failed'][name]}", flush=True)
        else:
            self.result["rows"].append(row)
            print(line(row), flush=True)
        if slow:
            self.longest = max(self.longest, time.monotonic() - started)
        self.write()

    def calibrated(self, ids: Tensor | None, tokens: int, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Experts calibrated on ids, or on what the model writes; facts of the report."""
        try:
            model, report = self._calibrate(ids, tokens, options)
        except Exception as error:
            if self.args.device == "cpu" or self.torch_alone:
                raise
            self.torch_alone = True  # the comparison of methods is worth having without the kernels, and says so
            solver._kernels = lambda _: None
            self.result["failed"]["the solver's kernels"] = f"{type(error).__name__}: {error}"[:2000]
            print(f"solving without kernels from here on: {error}", flush=True)
            model, report = self._calibrate(ids, tokens, options)
        experts = {n: p.detach() for n, p in model.named_parameters() if n in self.judge.original}
        held = report.sites
        return experts, {
            "tokens": tokens, "nll": report.nll, "own_nll": report.own_nll, "warnings": report.warnings,
            "held_error": sum(s.held_error for s in held) / len(held),
            "nearest_held_error": sum(s.nearest_held_error for s in held) / len(held),
            "least_tokens_of_an_expert": min(s.tokens_min for s in held),
            "median_tokens_of_an_expert": sorted(s.tokens_median for s in held)[len(held) // 2],
            "kept_nearest": sum(len(s.kept_nearest) for s in held),
            "solving_seconds": sum(s.seconds for s in held),
        }  # fmt: skip

    def _calibrate(self, ids: Tensor | None, tokens: int, options: dict[str, Any]) -> tuple[Any, Any]:
        model = copy.deepcopy(self.model)
        return model, mxfp4_compile.calibrate(
            model, ids, tokens=tokens, window=self.args.window, seed=self.args.seed, progress=False, **options
        )

    def all(self) -> None:
        """Every row, the most telling first."""
        args, weights = self.args, self.judge.weights
        original = self.judge.original
        nearest = rounded(original, "mse")
        self.row("nearest, mse", lambda: (weights(nearest), {}), slow=False)
        self.row("nearest, even", lambda: (weights(rounded(original, "even")), {}), slow=False)
        windows = args.calibration_tokens // args.window
        torch.manual_seed(args.seed)
        both = self.text.batch(windows, args.window)
        both = both[torch.randperm(len(both), device=both.device)].flatten().cpu()  # an eighth, of both, is held back
        kept: dict[str, dict[str, Tensor]] = {}

        def full(key: str, *given: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
            kept[key], about = self.calibrated(*given, **options)
            return weights(kept[key]), about

        def only(text: str) -> Tensor:
            return self.text.windows(text, windows, args.window).flatten().cpu()

        def gptq() -> tuple[Any, dict[str, Any]]:
            with without_descent():
                return full("gptq", both, args.calibration_tokens)

        self.row("calibrated on training text", lambda: full("full", both, args.calibration_tokens))
        for part, label in (("gate_up", f"K = {args.hidden}"), ("down", f"K = {args.width}")):
            pick = lambda experts, part=part: {n: w for n, w in experts.items() if part in n}
            self.row(f"nearest, {part} alone ({label})", lambda p=pick: (weights(p(nearest)), {}), slow=False)
            if "full" in kept:
                self.row(
                    f"calibrated, {part} alone ({label})", lambda p=pick: (weights(p(kept["full"])), {}), slow=False
                )
        self.row("GPTQ alone, training text", gptq)
        self.row(f"calibrated on {args.own_tokens} tokens of its own", lambda: full("own", None, args.own_tokens))
        self.row(
            "calibrated on training text, layer after layer",
            lambda: full("sequential", both, args.calibration_tokens, sequential=True),
        )
        if args.device != "cpu":
            self.row("original, in bf16", lambda: (self.model, {}), slow=False)
            for activations in ("bf16", "fp8"):
                for key, experts in (("nearest", None), ("calibrated", kept.get("full"))):
                    if key == "nearest" or experts is not None:
                        made = partial(self.optimized, experts, activations)
                        self.row(f"{key}, by this library's kernels, {activations} activations", made)
        self.row("calibrated on prose alone", lambda: full("prose", only("prose"), args.calibration_tokens))
        self.row("calibrated on code alone", lambda: full("code", only("code"), args.calibration_tokens))
        self.row(
            f"calibrated on {args.own_tokens} tokens of training text",
            lambda: full("few", both[: args.own_tokens], args.own_tokens),
        )

    def optimized(self, experts: dict[str, Tensor] | None, activations: str) -> tuple[Any, dict[str, Any]]:
        """What ``optimize`` makes of the model."""
        model = copy.deepcopy(self.model)
        if experts is not None:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in experts:
                        parameter.copy_(experts[name])
        return mxfp4_compile.optimize(model, activation_dtype=activations, verify=False), {}

    def write(self) -> None:
        """``results.json`` and ``results.md``."""
        out: Path = self.args.out
        self.result["seconds"] = time.monotonic() - self.started
        (out / "results.json").write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
        columns = ("KL, mnat/token", "of nearest's [95 %]", "loss + mnat [95 %]")
        head = "| | " + " | ".join(f"{short}: {column}" for short in TEXTS.values() for column in columns) + " |"
        table = [head, "|---" * 7 + "|", *(line(row) for row in self.result["rows"])]
        (out / "results.md").write_text("\n".join(table) + "\n", encoding="utf-8")


def asdict_(value: Any) -> dict[str, Any]:
    """A dataclass as a dict."""
    from dataclasses import asdict

    return asdict(value)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [row["name"]]
    for short in TEXTS.values():
        at = row[short]
        low, high = at["of_nearest_interval"]
        least, most = at["loss_rise_interval"]
        cells += [
            f"{at['kl_mnat_per_token']:.2f}", f"{at['of_nearest']:.3f} [{low:.3f}, {high:.3f}]",
            f"{at['loss_rise_mnat_per_token']:.2f} [{least:.2f}, {most:.2f}]",
        ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def draw(rows: list[dict[str, Any]], image: Path) -> None:
    """Bars of KL from 0, each with its value, of code and of prose."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 0.8 + 0.36 * len(rows)), layout="constrained", sharey=True)
    for axis, short in zip(axes, TEXTS.values(), strict=True):
        values = [row[short]["kl_mnat_per_token"] for row in rows]
        colours = ["#9aa5b1" if "calibrated" not in row["name"] else "#d9480f" for row in rows]
        bars = axis.barh(range(len(rows)), values, color=colours)
        axis.bar_label(bars, [f"{v:.2f}" for v in values], padding=3, fontsize=9)
        axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=9)
        axis.set_title(f"KL from the original on {short} held out\nmnat per token (lower is better)", fontsize=10)
        axis.set_xlim(0, max(values) * 1.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(image, dpi=150)
    pyplot.close(figure)


__all__ = ["judge"]
