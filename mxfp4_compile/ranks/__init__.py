"""Models that several processes hold together: parts of experts, agreement between ranks, one checkpoint of all.

shards.py: which experts or columns a rank holds; arithmetic only.
plans.py: what transformers made of a model's experts, read from the model; the one file that knows its styles.
agree.py: what fails on one rank fails on all, with the same words.
distribute.py: the nodes of a rewritten graph that make ids local and sum over ranks.
session.py: ``optimize`` and ``load`` on every rank.
gather.py: whole codes from those of all ranks.

Nothing of this is imported for a model in one process.
"""
