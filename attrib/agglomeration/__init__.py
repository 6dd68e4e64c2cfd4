"""Agglomeration: which units of a sample belong together, by how much they add to each other's score.

Singh, Murdoch & Yu, *Hierarchical interpretations for neural network predictions*, ICLR 2019, algorithm 1.
Nothing here knows a network: a walk asks for the scores of sets of units, and whoever drives it answers.
"""

from attrib.agglomeration.rules import Rules, follow, smoothed, threshold
from attrib.agglomeration.walk import Agglomeration, Walk, agglomerate, together

__all__ = ["Agglomeration", "Rules", "Walk", "agglomerate", "follow", "smoothed", "threshold", "together"]
