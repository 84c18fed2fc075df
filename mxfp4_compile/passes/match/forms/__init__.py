"""Graph forms: how a graph spells "row r times the weight of its expert". One file per form.

Each form turns nodes of a graph into ``ExpertGemm`` anchors; everything else about a site is found by
running the regions between the anchors (``passes.match``).
"""

from __future__ import annotations

from ...trace.traced import Traced
from . import batched_mm, grouped_mm, loop
from .anchor import ExpertGemm

FORMS = (grouped_mm, batched_mm, loop)


def find_gemms(traced: Traced) -> list[ExpertGemm]:
    """All expert GEMMs of a traced graph, in graph order."""
    found = {gemm.node: gemm for form in FORMS for gemm in form.find(traced)}
    return [found[node] for node in traced.graph.nodes if node in found]


__all__ = ["FORMS", "ExpertGemm", "find_gemms"]
