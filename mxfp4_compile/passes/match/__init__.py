"""Match: what a traced graph computes, as a value (``match.py`` has the contract)."""

from .match import FusedMatch, NoMatch, SplitMatch, match

__all__ = ["FusedMatch", "NoMatch", "SplitMatch", "match"]
