"""Decoding under CUDA graphs: how ``model.generate`` of an optimized model becomes fast by itself.

hook.py: what stands in for ``model.generate``, and ``capture``.
session.py: one call of ``generate``; loop.py: its plain loop.
state.py: what is recorded of a model, made when it is first needed.
eligibility.py: which models and calls may use it.
step.py: one decode step, recorded; layer_check.py: its check by the layer, probe.py: by its logits.
prompts.py: compiled layers for prompts, and recorded prompts.
layers.py: decoder layers, compiled.
attention.py: attention of one new token over a static cache; latent.py: over latents.
caches/: static caches, one file a kind.
graphs.py: recording a function for replay (CUDA graphs, or a stand-in that calls it).
sizes.py: batch sizes and cache lengths that are recorded.
"""

from .hook import attach, capture, detach, runtime_of

__all__ = ["attach", "capture", "detach", "runtime_of"]
