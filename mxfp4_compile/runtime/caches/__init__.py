"""Static caches of recorded decode steps, and the cache object that moves into them after the prompt.

A generation begins with transformers' own dynamic cache, so that its prompt is the eager one, whatever the model. After
it the contents move into static tensors, layer by layer::

    DynamicCache --HandoverCache.lend--> StepCache --(recorded steps)--> HandoverCache.settle--> DynamicCache
      layers  ----------forms_of-------->  views

base.py: what a kind of cache is (``LayerForm``, ``LayerView``), the clock that all layers share, and their memory.
full.py, ring.py, ...: one kind each. kinds.py: the list of them. step_cache.py: all layers together. handover.py: the
cache that lends its contents to a ``StepCache``.
"""
