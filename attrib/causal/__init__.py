"""Causal graphs of trained nets: which neurons hold a class's logit up, found by interventions on edges.

N. Béreux's *Interventional-Explanations* is the code that this is measured against (tests/golden). ``structure``
reads from the traced graph what feeds what, ``interventions`` computes them, ``graph`` searches a class's graph and
fits the graphs of several, ``subnetwork`` keeps or removes its paths, ``stability`` compares graphs, ``exchange``
and ``drawing`` write them down.
"""

from attrib.causal.graph import CausalGraphs, ClassGraph, Found, Search, find, from_state, to_state
from attrib.causal.interventions import Sites, intervene
from attrib.causal.structure import Structure

__all__ = [
    "CausalGraphs",
    "ClassGraph",
    "Found",
    "Search",
    "Sites",
    "Structure",
    "find",
    "from_state",
    "intervene",
    "to_state",
]
