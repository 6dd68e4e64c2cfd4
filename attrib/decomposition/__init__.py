"""Contextual decomposition: what a part of the input contributes to the logits, for any net that torch can export."""

from attrib.decomposition.chunks import Decomposition, decompose
from attrib.decomposition.graph import Decomposer
from attrib.decomposition.values import LogitParts

__all__ = ["Decomposer", "Decomposition", "LogitParts", "decompose"]
