"""Contextual decomposition by graph: what a part of the input gives to the logits, for any net that can be traced."""

from attrib.decomposition.chunks import Decomposition, decompose
from attrib.decomposition.graph import Decomposer
from attrib.decomposition.values import Parts

__all__ = ["Decomposer", "Decomposition", "Parts", "decompose"]
