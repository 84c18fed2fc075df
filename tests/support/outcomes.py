"""What matching and rewriting made of a mutation, as a short text that stays the same as long as it means the same.

``outcomes.json`` holds the texts of outcomes that were found right by running them (the slow tier runs all of them
each time). An outcome that is in it need not be run again; any other one is. Another version of torch, or a matcher
that does more, may change texts: the tests then run what has changed, and this writes the texts anew:

    rm -f found.txt
    pytest -m slow tests/passes/match/test_mutations.py --record-outcomes=found.txt
    python tests/support/outcomes.py found.txt
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from paths import SUPPORT
from torch import fx

from mxfp4_compile.passes.build.rewrite import RewriteError, rewrite
from mxfp4_compile.passes.match import FusedMatch, NoMatch, SplitMatch
from mxfp4_compile.passes.trace.traced import Traced
from mxfp4_compile.passes.weights import projections_of

FILE = SUPPORT / "outcomes.json"


def known() -> dict[str, str]:
    """Texts by the mutation's id."""
    return dict(json.loads(FILE.read_text()))


def outcome(traced: Traced, found: FusedMatch | SplitMatch | NoMatch) -> str:
    """No match, a refusal, or what is computed of which weights: a digest of the rewritten graph and of its slots."""
    if isinstance(found, NoMatch):
        return "no match"
    counts = dict.fromkeys((p.slot for p in projections_of(found.spec)), 1)
    try:
        graph = rewrite(traced, found, counts, "reference", "canonical")
    except RewriteError:
        return "refused"
    return _text(found, _computation(graph))


def _text(found: FusedMatch | SplitMatch, computation: str) -> str:
    slots = [
        (p.slot, p.role, *p.shape, *p.source.parameters, p.source.transposed, *p.source.bias)
        for p in projections_of(found.spec)
    ]
    fused = isinstance(found, FusedMatch)
    # A factor of the output goes into the weights: it is in no graph.
    text = f"{slots} {(found.sentinels, float(found.scale)) if fused else ()} {computation}"
    return f"{'fused' if fused else 'split'} {hashlib.sha1(text.encode()).hexdigest()[:16]}"


def _computation(module: fx.GraphModule) -> str:
    """A digest of what the output is computed from; the order of nodes and their names do not matter."""
    forms: dict[Any, str] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            forms[node] = f"placeholder {node.target}"
        elif node.op == "get_attr":
            forms[node] = f"get_attr {getattr(module, node.target, None)}"
        else:
            args = fx.node.map_arg(node.args, lambda a: forms[a])
            kwargs = sorted(fx.node.map_arg(dict(node.kwargs), lambda a: forms[a]).items())
            forms[node] = hashlib.sha1(f"{node.op} {node.target} {(args, kwargs)}".encode()).hexdigest()
    (output,) = (n for n in module.graph.nodes if n.op == "output")
    inputs = [n.target for n in module.graph.nodes if n.op == "placeholder"]
    return hashlib.sha1((forms[output] + str(inputs)).encode()).hexdigest()


def main() -> None:
    """Add the lines that a run of tests recorded."""
    found = dict(line.split(": ") for line in Path(sys.argv[1]).read_text().splitlines())
    FILE.write_text(json.dumps({**known(), **found}, indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
