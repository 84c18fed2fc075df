"""What becomes of every mixture-of-experts family of the installed transformers: writes docs/models.md.

    python docs/generate_models.py            all families: updates docs/models-<version>.json, renders models.md
    python docs/generate_models.py dbrx ...   these families only
    python docs/generate_models.py --check    changes nothing; says what differs and exits with 1

Each family is built tiny (hidden size 64, 8 experts, 2 layers, random weights in bf16), optimized and verified on the
CPU. There is one table per transformers version; an environment fills in that of its own version. Outcomes,
forms, numbers of sites and reasons are compared exactly. Errors depend a little on the machine's instructions:
they are compared within ``TOLERANCE``, and a figure within it is not written anew.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE / "models.md"
TOLERANCE = 0.25
"""Relative difference within which two errors are the same."""

Rows = dict[str, list[dict[str, Any]]]
"""Family -> one row per kind of site."""


def installed_version() -> str:
    """Major and minor version of the installed transformers."""
    import transformers

    return ".".join(transformers.__version__.split(".")[:2])


def families() -> list[str]:
    """Every mixture-of-experts family of the installed transformers."""
    from mxfp4_compile.tools.families import decorated_families, listed_families, undecorated_families

    return sorted({*decorated_families(), *undecorated_families(), *listed_families()})


def table_file(version: str) -> Path:
    """Where the table of a version is kept."""
    return HERE / f"models-{version}.json"


# what one family becomes


def survey(family: str) -> list[dict[str, Any]]:
    """The rows of one family: sites that differ in their number only are one row."""
    return surveyed(family)[1]


def surveyed(family: str) -> tuple[Any, list[dict[str, Any]]]:
    """The optimized model of a family, None where there is none, and the rows of its report."""
    import torch

    import mxfp4_compile
    from mxfp4_compile.tools.families import tiny_inputs, tiny_model

    torch.set_num_threads(1)
    try:
        model = tiny_model(family, dtype=torch.bfloat16)
    except RuntimeError as error:
        return None, [_row("", "not built", reason=str(error))]
    try:
        mxfp4_compile.optimize(model, backend="cpu", strict=False, example_inputs=tiny_inputs(model), progress=False)
    except Exception as error:  # whatever it is, it is what a user would see
        return None, [_row("", "error", reason=f"{type(error).__name__}: {error}")]
    if not model.mxfp4_report.sites:
        return model, [_row("", "none found")]
    rows: list[dict[str, Any]] = []
    for site in model.mxfp4_report.sites:
        if site.rewritten:
            row = _rewritten_row(model.get_submodule(site.names[0]), site)
        else:
            row = _row(site.module_class, site.outcome, reason=site.reason)
        same = next((r for r in rows if _facts(r) == _facts(row)), None)
        if same is None:
            rows.append(row)
        else:
            same["sites"] += 1
            for key in ("error", "original"):
                same[key] = max(same[key], row[key]) if row[key] is not None else None
    return model, rows


def _row(cls: str, outcome: str, **more: Any) -> dict[str, Any]:
    blank: dict[str, Any] = {"weights": "", "activation": "", "gate": "", "biases": "", "weighted": "", "reason": ""}
    row = {"class": cls, "sites": 1, "outcome": outcome, **blank, "error": None, "original": None, **more}
    # Reasons may quote addresses of objects and torch's numbers of sizes; neither is a property of the family.
    row["reason"] = re.sub(r" at 0x[0-9a-f]+|(?<=\bs)\d+\b", "", " ".join(str(row["reason"]).split()))
    return row


def _facts(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("sites", "error", "original")}


def _rewritten_row(module: Any, site: Any) -> dict[str, Any]:
    from mxfp4_compile.spec import MoESpec

    spec = module.plan.spec
    projections = module.projections
    row = _row(
        site.module_class,
        site.outcome,
        weights=_storage(projections),
        biases="yes" if any(p.source.bias for p in projections) else "no",
        error=_rounded(site.error),
        original=_rounded(site.original_error),
    )
    if not isinstance(spec, MoESpec):
        return {**row, "reason": spec.reason}
    p = spec.params
    half = "first" if p.activated_half == 0 else "second"
    parts = "apart" if len(spec.up.parameters) > 1 else p.gate_layout
    return {
        **row,
        "activation": str(p.activation),
        "gate": "not gated" if p.gate_layout == "none" else f"{parts}, {half} activated",
        "weighted": "input" if p.weight_on_input else "output",
    }


def _storage(projections: Iterable[Any]) -> str:
    """How the original module holds its experts' weights."""
    names = [name for p in projections for name in p.source.parameters]
    if any("*" in name.split(".") for name in names):
        return "a module per expert, called in a loop"
    if any("#" in name for name in names):
        return "flattened [E*N, K], read in a loop"
    turned = {p.source.transposed for p in projections}
    return "packed " + " and ".join("[E, K, N]" if t else "[E, N, K]" for t in sorted(turned))


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.1e}")


def survey_all(names: Sequence[str], jobs: int) -> Rows:
    """The rows of several families, in processes that end after a few so that their memory is given back."""
    found: Rows = {}
    for start in range(0, len(names), _PER_PROCESS * jobs):
        some = names[start : start + _PER_PROCESS * jobs]
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            found.update(zip(some, pool.map(survey, some), strict=True))
        print(f"{len(found)} of {len(names)} families", file=sys.stderr)
    return found


_PER_PROCESS = 12


# tables and the page


def read_table(version: str) -> Rows:
    """The committed table of a version; empty if there is none."""
    file = table_file(version)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def close(a: float | None, b: float | None) -> bool:
    """Whether two errors are the same up to a machine's rounding."""
    if a is None or b is None:
        return a is b
    return abs(a - b) <= TOLERANCE * max(a, b)


def differences(old: Rows, new: Rows) -> list[str]:
    """What differs, in words."""
    out = [f"{name}: not in the table" for name in new if name not in old]
    out += [f"{name}: in the table, not installed" for name in old if name not in new]
    for name in sorted(old.keys() & new.keys()):
        before, after = old[name], new[name]
        if len(before) != len(after):
            out.append(f"{name}: {len(before)} kinds of sites in the table, {len(after)} now")
            continue
        for a, b in zip(before, after, strict=True):
            for key in b:
                same = close(a.get(key), b[key]) if key in ("error", "original") else a.get(key) == b[key]
                if not same:
                    out.append(f"{name} [{b['class']}]: {key} was {a.get(key)!r}, is {b[key]!r}")
    return out


def settled(old: Rows, new: Rows) -> Rows:
    """The new rows with the old ones' errors where they are the same, so that files change with facts only."""
    return {name: old[name] if name in old and not differences({name: old[name]}, {name: rows}) else rows
            for name, rows in sorted(new.items())}  # fmt: skip


_HEAD = """# Models

What `mxfp4_compile.optimize` does to the mixture-of-experts families of transformers. Written by
`python docs/generate_models.py`, which builds each family tiny (hidden size 64, 8 experts, 2 layers, random weights
in bf16), optimizes and verifies it on the CPU; `pytest -m slow tests/models/test_models_doc.py` compares.

- **sites**: experts modules of the tiny model, of one kind.
- **outcome**: *fused*: one `mxfp4::moe` call per site; *split*: a `mxfp4::grouped_linear` per projection around a
  middle that no fused kernel knows; *dense*: every token meets every expert, nothing is routed; *unmatched*: refused,
  with the reason (`strict=True` raises it).
- **weights**: how the original module holds them. E experts, N outputs, K inputs.
- **gate**: where the activated half of the up-projection lies: in halves, interleaved, or in a parameter apart.
- **weight on**: whether routing weights scale an expert's output or its input.
- **error**: relative error of the rewritten module against an fp32 run of the original on the same dequantized weights;
  **own**: that of the original module in bf16. Quantization itself is not in it: both sides have the same weights.
"""
_COLUMNS = (
    "family", "module", "sites", "outcome", "weights", "activation", "gate", "biases", "weight on", "error", "own",
)  # fmt: skip
_FACTS = ("class", "sites", "outcome", "weights", "activation", "gate", "biases", "weighted")


def page() -> str:
    """docs/models.md from the tables of all versions, newest first."""
    versions = [f.stem.removeprefix("models-") for f in HERE.glob("models-*.json")]
    versions.sort(key=lambda v: [int(n) for n in v.split(".")], reverse=True)
    return _HEAD + "".join(_section(v, read_table(v)) for v in versions)


def _section(version: str, rows: Rows) -> str:
    whole = [name for name, kinds in rows.items() if all(k["outcome"] in ("fused", "split") for k in kinds)]
    lines = [f"\n## transformers {version}\n", f"{len(whole)} of {len(rows)} families are rewritten and verified.\n"]
    lines += ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    reasons = []
    for family, kinds in rows.items():
        for k in kinds:
            facts = [k[c] for c in _FACTS]
            cells = [family, *facts, _number(k["error"]), _number(k["original"])]
            lines.append("| " + " | ".join(_cell(c) for c in cells) + " |")
            if k["reason"]:
                reasons.append(f"- {family}, {k['class'] or 'model'} ({k['outcome']}): {_cell(k['reason'])}")
    if reasons:
        lines += ["\nReasons for what is not fused:\n", *reasons]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="these only (default: all that are installed)")
    parser.add_argument("--check", action="store_true", help="compare with the committed tables, change nothing")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    arguments = parser.parse_args()
    started = time.perf_counter()
    version, known = installed_version(), families()
    unknown = set(arguments.families) - set(known)
    if unknown:
        parser.error(f"not a family of transformers {version}: {', '.join(sorted(unknown))}")
    new, old = survey_all(arguments.families or known, arguments.jobs), read_table(version)
    if arguments.families:
        new = {**old, **new}
    found = differences(old, new)
    print("\n".join(found) or "nothing differs")
    print(f"transformers {version}: {len(new)} families, {time.perf_counter() - started:.0f} s", file=sys.stderr)
    if not arguments.check:
        rows = settled(old, new)
        table_file(version).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
        found.append("docs/models.md")
        print("docs/models.md is not what the tables render to")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
