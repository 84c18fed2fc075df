"""Every family that transformers decorates: rewritten, verified, and equal to the original on the same weights.

In fp32, families whose experts have the same code share a trace (support/remembered.py); in bf16 each is traced and
matched by itself, once for this and for test_models_doc.py (support/surveys.py).
"""

from __future__ import annotations

import copy

import pytest
import torch
from remembered import match_of
from surveys import group, surveyed
from torch import Tensor, nn

import mxfp4_compile
from mxfp4_compile.passes.build.module import MXFP4Experts, mxfp4_sites
from mxfp4_compile.passes.build.rewrite import count_ops
from mxfp4_compile.passes.find.discover import experts_implementation, find_candidates, record_calls
from mxfp4_compile.passes.match import FusedMatch
from mxfp4_compile.passes.trace.traced import call_pattern
from mxfp4_compile.tools.families import decorated_families, tiny_inputs, tiny_model

FAMILIES = decorated_families()

# The only families whose middle no fused kernel is asked to know; every other one is a single mxfp4::moe.
MAY_SPLIT = {"muse_spark", "beam", "inkling2"}

# Without biases, with them and transposed, without a gate, with two kinds of experts.
# One of each kind in the quick tier: halves, interleaved with biases, without a gate, two mixtures, split.
QUICK = {"qwen3_moe", "gpt_oss", "nemotron_h", "ernie4_5_vl_moe", "muse_spark"}
SOME = [pytest.param(f, marks=[] if f in QUICK else [pytest.mark.slow]) for f in FAMILIES]


def _routing(site: MXFP4Experts, tokens: int, seed: int, scale: float) -> list[Tensor]:
    """Fresh tensor arguments for a site: tokens of some size, random distinct experts, weights that sum to one."""
    generator = torch.Generator().manual_seed(seed)
    experts = site.projections[0].shape[0]
    out = []
    ids = next(i for i in site.plan.pattern.tensors if i.dtype == torch.int64)
    top_k = ids.shape[-1]
    for info in site.plan.pattern.tensors:
        if info.dtype == torch.int64:
            keys = torch.rand(tokens, experts, generator=generator)
            out.append(keys.argsort(dim=1)[:, :top_k].contiguous())
        elif info.shape[-1] == top_k:
            out.append(torch.rand(tokens, top_k, generator=generator).softmax(-1).to(info.dtype))
        else:
            out.append((torch.randn(tokens, info.shape[-1], generator=generator) * scale).to(info.dtype))
    return out


def _dequantized_original(site: MXFP4Experts, dtype: torch.dtype) -> nn.Module:
    """The original module with the site's dequantized weights, written without the library's verify pass."""
    module = copy.deepcopy(site.original)
    values = site.dequantized_biases()
    for projection in site.projections:
        values.update(site.dequantized(projection))
    for name, value in values.items():
        setattr(module, name, nn.Parameter(value.to(dtype), requires_grad=False))
    return module.to(dtype)


def _call(module: nn.Module, site: MXFP4Experts, tensors: list[Tensor]) -> Tensor:
    args, kwargs = site.plan.pattern.arrange(tensors)
    with torch.no_grad():
        return module(*args, **kwargs)


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def _check_sites(family: str, model: nn.Module) -> dict[str, MXFP4Experts]:
    report = model.mxfp4_report
    left = [s for s in report.sites if not s.rewritten]
    assert not left, f"left alone: {[(s.names, s.reason) for s in left]}"
    sites = mxfp4_sites(model)
    assert len(sites) == len(report.sites)
    for name, site in sites.items():
        counts = count_ops(site.rewritten)
        if family in MAY_SPLIT:
            assert counts in ({"moe": 1, "grouped_linear": 0}, {"moe": 0, "grouped_linear": 2}), name
        else:
            assert counts == {"moe": 1, "grouped_linear": 0}, name
        assert not any("grouped_mm" in str(n.target) for n in site.rewritten.graph.nodes)
    for entry in report.sites:
        assert entry.error is not None
        assert entry.bytes_after / entry.bytes_before <= (0.28 if report_dtype(model) == torch.bfloat16 else 0.14)
    return sites


def report_dtype(model: nn.Module) -> torch.dtype:
    return next(iter(mxfp4_sites(model).values())).plan.weight_dtype


def test_the_census_is_whole() -> None:
    assert len(FAMILIES) >= 60


@pytest.mark.parametrize("family", SOME)
def test_fp32(family: str) -> None:
    model = mxfp4_compile.optimize(tiny_model(family, dtype=torch.float32))
    sites = _check_sites(family, model)
    for name, site in sites.items():
        original = _dequantized_original(site, torch.float32)
        for tokens, scale, seed in ((1, 1.0, 0), (13, 1.0, 1), (29, 6.0, 2)):
            inputs = _routing(site, tokens, seed, scale)
            with experts_implementation(model, "grouped_mm"):
                original_out = _call(original, site, inputs)
            assert _relative(_call(site, site, inputs), original_out) <= 1e-5, (name, tokens)
    with torch.no_grad():
        out = model(**tiny_inputs(model))
    assert all(torch.isfinite(t).all() for t in [getattr(out, "logits", out[0])])


@pytest.mark.slow
@pytest.mark.matching
@pytest.mark.parametrize("family", [pytest.param(f, marks=group(f)) for f in FAMILIES])
def test_bf16(family: str) -> None:
    model, _ = surveyed(family)
    sites = _check_sites(family, model)
    ours = theirs = total = 0.0
    for site in sites.values():
        own, exact = _dequantized_original(site, torch.bfloat16), _dequantized_original(site, torch.float32)
        for seed in range(4):
            inputs = _routing(site, 64, seed, 1.0 + seed)
            truth = _call(exact, site, [t.float() if t.is_floating_point() else t for t in inputs]).double()
            ours += float((_call(site, site, inputs).double() - truth).square().sum())
            theirs += float((_call(own, site, inputs).double() - truth).square().sum())
            total += float(truth.square().sum())
    assert total > 0
    assert ours**0.5 <= 1.25 * theirs**0.5, (ours / total, theirs / total)


@pytest.mark.parametrize("family", SOME)
def test_the_same_sites_match_under_batched_mm(family: str) -> None:
    model = tiny_model(family, dtype=torch.float32, layers=2)
    candidates = find_candidates(model)
    record_calls(model, candidates)
    packed = [c for c in candidates if c.kind == "packed" and c.calls]
    assert packed
    # Equal layers trace alike: one of each class and shape is enough.
    distinct = {(type(c.module), tuple(p.shape for p in c.module.parameters())): c for c in packed}
    for candidate in distinct.values():
        pattern = call_pattern(candidate.calls[0], candidate.calls[-1])
        found = {}
        for implementation in ("grouped_mm", "batched_mm"):
            with experts_implementation(model, implementation):
                found[implementation] = match_of(candidate.module, pattern)[1]
        grouped, batched = found["grouped_mm"], found["batched_mm"]
        if isinstance(grouped, FusedMatch):
            assert isinstance(batched, FusedMatch), batched
            assert batched.spec == grouped.spec
        else:
            assert family in MAY_SPLIT
