"""Agglomeration: which units of a sample (words, tiles) belong together, by how much they add to each other's score.

Singh, Murdoch & Yu, *Hierarchical interpretations for neural network predictions*, ICLR 2019, algorithm 1. Nothing here
knows a network: a walk asks for the scores of sets of units, and the code that drives it answers.
"""

from attrib.agglomeration.rules import Rules, follow, smoothed, threshold
from attrib.agglomeration.walk import Agglomeration, Walk, agglomerate, drive

__all__ = ["Agglomeration", "Rules", "Walk", "agglomerate", "drive", "follow", "smoothed", "threshold"]
