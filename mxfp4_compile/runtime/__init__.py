"""Decoding under CUDA graphs: how ``model.generate`` of an optimized model becomes fast by itself.

graphs.py: recording a function for replay (CUDA graphs, or a stand-in that calls it).
sizes.py: batch sizes and cache lengths that are captured.
attention.py: attention of one new token over a static cache.
cache.py: static keys and values, and the cache object that moves into them after the prefill.
step.py: one decode step, compiled by the layer, recorded.
generation.py: ``generate`` and its loops; what may use the recorded step and what may not.
"""

from .generation import Runtime, attach, capture, detach, runtime_of

__all__ = ["Runtime", "attach", "capture", "detach", "runtime_of"]
