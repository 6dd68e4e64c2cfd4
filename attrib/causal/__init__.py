"""Causal graphs of trained nets: the neurons without which a class's logit falls, found by interventions on edges.

The reference is the code of N. Béreux, *Interventional-Explanations* (tests/golden). ``structure`` reads from the
net's graph which channels feed which layer (``layers`` are its weighted layers, ``origins`` sets of channels, ``rules``
what each operation does to them), ``interventions`` computes logits under interventions, ``graph`` searches
the graph of a class and fits those of several, ``subnetwork`` keeps or removes a graph's paths, ``stability`` compares
graphs, ``exchange`` writes them as JSON and ``drawing`` draws them.
"""

from attrib.causal.graph import CausalGraphs, ClassGraph, GraphLayer, Search, find, from_state, to_state
from attrib.causal.interventions import Sites, intervene
from attrib.causal.structure import Structure

__all__ = [
    "CausalGraphs",
    "ClassGraph",
    "GraphLayer",
    "Search",
    "Sites",
    "Structure",
    "find",
    "from_state",
    "intervene",
    "to_state",
]
