"""What matching and rewriting made of a mutation, as a short text that stays the same as long as it means the same.

``outcomes.json`` holds the texts of outcomes that were found right by running them (the slow tier runs all of them
each time). An outcome that is in it need not be run again; any other one is. Another version of torch, or a matcher
that does more, may change texts: the tests then run what has changed, and this writes the texts anew:

    python -m pytest -m "slow or not slow" tests/passes/match/test_mutations.py --record-outcomes
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from paths import SUPPORT
from torch import fx

from mxfp4_compile.passes.build.experts import projections_of
from mxfp4_compile.passes.build.rewrite import RewriteError, rewrite
from mxfp4_compile.passes.match.match import FusedMatch, NoMatch, SplitMatch
from mxfp4_compile.passes.trace.capture import Captured

FILE = SUPPORT / "outcomes.json"


def known() -> dict[str, str]:
    """Texts by the mutation's id."""
    return dict(json.loads(FILE.read_text()))


def write(texts: dict[str, str]) -> None:
    FILE.write_text(json.dumps(texts, indent=0, sort_keys=True) + "\n")


def outcome(captured: Captured, found: FusedMatch | SplitMatch | NoMatch) -> str:
    """No match, a refusal, or what is computed of which weights: a digest of the rewritten graph and of its slots."""
    if isinstance(found, NoMatch):
        return "no match"
    spec = found.spec
    projections = projections_of(spec)
    try:
        graph = rewrite(captured, found, dict.fromkeys((p.slot for p in projections), 1), "reference", "canonical")
    except RewriteError:
        return "refused"
    slots = [
        (p.slot, p.role, tuple(p.shape), list(p.source.parameters), bool(p.source.transposed), list(p.source.bias or ()))
        for p in projections
    ]
    extra = (found.sentinels, float(found.scale), str(spec)) if isinstance(found, FusedMatch) else ()
    text = f"{slots} {extra} {_computation(graph)}"
    return f"{'fused' if extra else 'split'} {hashlib.sha1(text.encode()).hexdigest()[:16]}"


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
