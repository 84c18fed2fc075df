"""What calibration takes away of MXFP4's loss, on the demo model and the whole of its held-out text.

    python benchmarks/calibration.py --train PLAYS.txt --out benchmarks/results/calibration-demo-cpu-DATE.json

KL(original || MXFP4) per byte, in thousandths of a nat, of windows of 256 bytes; both models in fp32, so that rounding
of weights is all that differs. ``--train``: the text the model was trained on, without what is held out
(``examples/tiny_moe/train.py --write-text FILE`` writes it); without it only text of the model's own is calibrated on.
Intervals: 95 %, paired bootstrap over windows. CPU seconds are those of the process, writing the
text included where the model writes it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mxfp4_compile
from mxfp4_compile import CalibrationReport
from mxfp4_compile.tools import demo
from mxfp4_compile.tools.environment import hardware, versions

WINDOW = 256
RESAMPLES = 4000


@dataclass(frozen=True)
class Row:
    """One model: mean KL and rise of the loss in thousandths of a nat per byte, ``ratio`` of KL to that of mse."""

    name: str
    kl: float
    ratio: float
    ratio_low: float
    ratio_high: float
    loss_rise: float
    perplexity: float
    cpu_seconds: float
    held_error: float | None = None
    nearest_held_error: float | None = None


class Judge:
    """The original model's log-probabilities on the held-out text, and what another makes of it."""

    def __init__(self, text: bytes) -> None:
        whole = len(text) // WINDOW * WINDOW
        self.ids = torch.tensor(list(text[:whole])).view(-1, WINDOW)
        self.truth = self._log_probabilities(demo.load(demo.MODEL_DIRECTORY).float())
        self.rows: list[Row] = []
        self.base: Tensor | None = None

    @torch.no_grad()
    def _log_probabilities(self, model: Any) -> Tensor:
        parts = [model(input_ids=ids, use_cache=False).logits[:, :-1] for ids in self.ids.split(16)]
        return torch.cat([p.float().log_softmax(-1) for p in parts])

    def _loss(self, log_p: Tensor) -> Tensor:
        return -log_p.gather(-1, self.ids[:, 1:, None]).squeeze(-1).double().mean(1)

    def judge(self, name: str, model: Any, seconds: float, report: CalibrationReport | None = None) -> None:
        """Add a row for ``model``, unquantized or restored, in any dtype."""
        log_q = self._log_probabilities(model.float())
        kl = (self.truth.exp() * (self.truth - log_q)).sum(-1).double().mean(1)
        rise = self._loss(log_q) - self._loss(self.truth)
        base = kl if self.base is None else self.base
        self.base = base
        some = torch.randint(len(kl), (RESAMPLES, len(kl)), generator=torch.Generator().manual_seed(0))
        ratios = kl[some].mean(1) / base[some].mean(1)
        low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        held = [] if report is None else report.sites
        row = Row(
            name, 1e3 * float(kl.mean()), float(kl.mean() / base.mean()), low, high, 1e3 * float(rise.mean()),
            math.exp(float(self._loss(log_q).mean())), seconds,
            sum(s.held_error for s in held) / len(held) if held else None,
            sum(s.nearest_held_error for s in held) / len(held) if held else None,
        )  # fmt: skip
        self.rows.append(row)
        print(
            f"{name:44s} KL {row.kl:.3f}, {row.ratio:.3f} of mse [{low:.3f}, {high:.3f}]; loss +{row.loss_rise:.3f}; "
            f"{seconds:.1f} CPU s",
            flush=True,
        )


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What ``work`` returns, and its CPU seconds."""
    started = time.process_time()
    result = work()
    return result, time.process_time() - started


def rounded(judge: Judge, rule: str) -> None:
    """Round to nearest."""
    model, seconds = timed(
        lambda: mxfp4_compile.optimize(demo.load(demo.MODEL_DIRECTORY), scale_rule=rule, verify=False)
    )
    judge.judge(f"nearest, {rule}", mxfp4_compile.restore(model), seconds)


def calibrated(judge: Judge, name: str, text: Any, tokens: int, seed: int, *, sequential: bool = False) -> None:
    """Calibrate on ``text``."""
    model = demo.load(demo.MODEL_DIRECTORY)
    report, seconds = timed(
        lambda: mxfp4_compile.calibrate(
            model, text, tokens=tokens, window=WINDOW, seed=seed, sequential=sequential, progress=False
        )
    )
    judge.judge(name, model, seconds, report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--train", type=Path, help="text that the model was trained on")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    judge = Judge((demo.MODEL_DIRECTORY / demo.TEXT_FILE).read_bytes())
    for rule in ("mse", "even", "floor"):
        rounded(judge, rule)
    for seed in range(args.seeds):
        calibrated(judge, f"own text, seed {seed}", None, args.tokens, seed)
    if args.train is not None:
        for seed in range(args.seeds):
            calibrated(judge, f"training text, seed {seed}", [args.train], args.tokens, seed)
        calibrated(judge, "training text, seed 0, layer after layer", [args.train], args.tokens, 0, sequential=True)
    result = {
        "model": "mxfp4_compile/demo_model",
        "judged_on": f"{demo.TEXT_FILE}, {judge.ids.numel()} bytes in windows of {WINDOW}",
        "calibration_tokens": args.tokens,
        "rows": [asdict(row) for row in judge.rows],
        "hardware": asdict(hardware()),
        "versions": versions(),
        "seconds": time.perf_counter() - started,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
