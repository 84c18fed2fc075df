"""README's picture: memory and tokens per second of one model, in bf16 as transformers runs it, and optimized.

    python benchmarks/picture.py benchmarks/results/generate-qwen3-30b-a3b-nvidia_h200-2026-11-23.json IMAGE

The file is what ``generate.py --json`` wrote; all bars are of that one run. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

# Name in the file -> name for readers, colour.
MODES = {
    "hf_eager": ("transformers,\nbf16", "#9aa5b1"),
    "hf_static": ("transformers, bf16,\ncompiled", "#52606d"),
    "ours": ("mxfp4_compile", "#d9480f"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("image", type=Path)
    args = parser.parse_args()
    data = json.loads(args.results.read_text(encoding="utf-8"))
    draw(data, args.image)


def value(data: dict[str, Any], mode: str, batch: int, key: str) -> float:
    """One figure of the file; KeyError where it was not measured."""
    for row in data["modes"][mode]["decode"]:
        if row["batch"] == batch:
            return float(row[key])
    raise KeyError(f"{mode} at batch {batch}")


def draw(data: dict[str, Any], image: Path) -> None:
    """Three panels of bars from 0, each bar with its value."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        ("GPU memory at the peak, batch 1\n(lower is better)", "GiB", 1, "peak_memory_gib", "{:.1f}"),
        ("Generated tokens per second, batch 1\n(higher is better)", "tokens/s", 1, "tokens_per_second", "{:.0f}"),
        ("Generated tokens per second, batch 8\n(higher is better)", "tokens/s", 8, "tokens_per_second", "{:.0f}"),
    ]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 4.1), layout="constrained")
    for axis, (title, unit, batch, key, form) in zip(axes, panels, strict=True):
        values = [value(data, mode, batch, key) for mode in MODES]
        bars = axis.bar(range(len(MODES)), values, color=[colour for _, colour in MODES.values()], width=0.66)
        axis.bar_label(bars, [form.format(v) for v in values], padding=2, fontsize=12, fontweight="bold")
        axis.set_xticks(range(len(MODES)), [name for name, _ in MODES.values()], fontsize=8.5)
        axis.set_title(title, fontsize=10.5)
        axis.set_ylabel(unit)
        axis.set_ylim(0, max(values) * 1.14)
        axis.spines[["top", "right"]].set_visible(False)
    prompt = data["arguments"]["prompt"]
    torch, transformers = data["torch"].partition("+")[0], data["transformers"]
    figure.suptitle(
        f"Qwen3-30B-A3B (random weights) on one {data['device']}: generate(), greedy, {prompt} prompt tokens; "
        f"torch {torch}, transformers {transformers}",
        fontsize=10,
        color="#52606d",
    )
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
