"""Hierarchies of parts, which agglomerations find, as objects and as JSON."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from attrib.types import UserError

VERSION = 1  # of the JSON
Run = tuple[int, int]  # the units from the first to the last, both included


def runs(members: np.ndarray) -> tuple[Run, ...]:
    """(n,) bool -> the runs of units that are members."""
    ends = np.flatnonzero(np.diff(np.concatenate(([False], members.ravel(), [False])).astype(np.int8)))
    return tuple((int(a), int(b) - 1) for a, b in ends.reshape(-1, 2))


def node_id(members: Sequence[Run]) -> str:
    """An id that names the units: ``7``, ``3-5``, or where there are gaps, first and last with a digest.

    Equal members have equal ids, in every tree.
    """
    first, last = members[0][0], members[-1][1]
    if len(members) > 1:
        return f"{first}-{last}#{hashlib.sha256(repr(tuple(members)).encode()).hexdigest()[:8]}"
    return str(first) if first == last else f"{first}-{last}"


@dataclass(frozen=True)
class Node:
    """A part: one unit, or a component that was merged from others.

    step     the step in which it was formed; for a unit, the step in which it was chosen
    level    0 for a unit, else one more than the highest level among its parts
    parent   id of the component that it was merged into; None for the whole
    score    the score that the agglomeration went by, in logits, signed
    scores   the scores of ``Tree.classes``; () for units
    members  the runs of units that it consists of
    """

    id: str
    step: int
    level: int
    parent: str | None
    score: float
    scores: tuple[float, ...]
    members: tuple[Run, ...]

    @property
    def size(self) -> int:
        """How many units it has."""
        return sum(last - first + 1 for first, last in self.members)

    @property
    def units(self) -> list[int]:
        """The numbers of its units, in order."""
        return list(itertools.chain.from_iterable(range(first, last + 1) for first, last in self.members))


@dataclass(frozen=True)
class Tree:
    """A hierarchy over the units of one sample.

    shape    of the units: (n,) words or windows, or (rows, columns) of tiles, numbered row by row
    target   the class that is explained, or with several labels per sample a list of 0 and 1
    against  the class whose score is subtracted, or None
    classes  the classes of ``Node.scores``
    nodes    all units in their order, then the components in the order of their steps; the whole comes last
    """

    shape: tuple[int, ...]
    target: int | list[int]
    against: int | None
    classes: tuple[int, ...]
    nodes: tuple[Node, ...]

    @property
    def n(self) -> int:
        """How many units there are."""
        return int(np.prod(self.shape))

    @property
    def root(self) -> Node:
        """The whole: the node that all units are in."""
        return self.nodes[-1]

    @cached_property
    def _by_id(self) -> dict[str, Node]:
        return {node.id: node for node in self.nodes}

    @cached_property
    def _parts(self) -> dict[str, list[Node]]:
        found: dict[str, list[Node]] = {node.id: [] for node in self.nodes}
        for node in self.nodes:
            if node.parent is not None:
                found[node.parent].append(node)
        return {name: sorted(parts, key=lambda part: part.members) for name, parts in found.items()}

    def __getitem__(self, name: str) -> Node:
        return self._by_id[name]

    def parts(self, node: Node) -> list[Node]:
        """The nodes that it was merged from, in the order of their first units."""
        return self._parts[node.id]

    def cut(self, level: int) -> list[Node]:
        """The largest nodes of at most this level, in the order of their first units. Every unit is in one of them."""
        return self._largest(lambda node: node.level <= level)

    def after(self, step: int) -> list[Node]:
        """The components after a step; units that had not been chosen by then are in none."""
        return self._largest(lambda node: node.step <= step)

    def _largest(self, fits: Callable[[Node], bool]) -> list[Node]:
        found = [n for n in self.nodes if fits(n) and (n.parent is None or not fits(self[n.parent]))]
        return sorted(found, key=lambda node: node.members)

    def paint(self, nodes: Iterable[Node], values: Iterable[float], empty: float = 0.0) -> np.ndarray:
        """An array of the units' shape with each node's value at its units, and ``empty`` where there is no node."""
        flat = np.full(self.n, empty)
        for node, value in zip(nodes, values, strict=True):
            flat[node.units] = value
        return flat.reshape(self.shape)

    @property
    def unit_scores(self) -> np.ndarray:
        """Of the units' shape: each unit's own score."""
        return np.array([node.score for node in self.nodes[: self.n]]).reshape(self.shape)

    @property
    def ranks(self) -> np.ndarray:
        """Of the units' shape: the step in which each unit was chosen."""
        return np.array([node.step for node in self.nodes[: self.n]]).reshape(self.shape)

    # ---- JSON -------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The tree as values for ``json.dumps``; scores have six digits."""
        units, components = self.nodes[: self.n], self.nodes[self.n :]
        return {
            "version": VERSION,
            "shape": list(self.shape),
            "target": self.target,
            "against": self.against,
            "classes": list(self.classes),
            "units": {
                "score": [_short(u.score) for u in units],
                "step": [u.step for u in units],
                "parent": [u.parent for u in units],
            },
            "nodes": [
                {
                    "id": c.id,
                    "step": c.step,
                    "level": c.level,
                    "parent": c.parent,
                    "score": _short(c.score),
                    "scores": [_short(s) for s in c.scores],
                    "members": [list(run) for run in c.members],
                }
                for c in components
            ],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str = "tree") -> Tree:
        """The inverse of ``to_json``. Raises UserError, whose message begins with ``where``, for anything else."""
        try:
            if value["version"] != VERSION:
                raise UserError(f"{where} is of version {value['version']}, but this version of attrib reads {VERSION}")
            shape, units = tuple(int(s) for s in value["shape"]), value["units"]
            columns = zip(units["score"], units["step"], units["parent"], strict=True)
            nodes = [
                Node(str(i), int(step), 0, parent, float(score), (), ((i, i),))
                for i, (score, step, parent) in enumerate(columns)
            ]
            for node in value["nodes"]:
                members = tuple((int(a), int(b)) for a, b in node["members"])
                scores = tuple(float(s) for s in node["scores"])
                how = (str(node["id"]), int(node["step"]), int(node["level"]), node["parent"], float(node["score"]))
                nodes.append(Node(*how, scores, members))
            tree = cls(shape, value["target"], value["against"], tuple(value["classes"]), tuple(nodes))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where} is not the JSON of a tree: {error!r}") from error
        tree.check(where)
        return tree

    def check(self, where: str = "tree") -> None:
        """Raises UserError unless the nodes form a hierarchy over the units."""

        def demand(true: bool, what: str) -> None:
            if not true:
                raise UserError(f"{where}: {what}")

        demand(len(self.nodes) >= self.n, f"{len(self.nodes)} nodes for {self.n} units")
        if not self.nodes:  # a text without words
            return
        demand(len(self._by_id) == len(self.nodes), "two nodes have the same id")
        for node in self.nodes:
            places = node.units
            good = bool(places) and places[0] >= 0 and places[-1] < self.n and places == sorted(set(places))
            demand(good and node.id == node_id(node.members), f"the members of node {node.id} are not what it is named")
            demand(not node.scores or len(node.scores) == len(self.classes), f"node {node.id} lacks scores of classes")
        for node in self.nodes:
            demand((node.parent is None) == (node is self.root), f"node {node.id} has no parent, or is not the last")
            demand(node.parent is None or node.parent in self._by_id, f"node {node.id}: no parent {node.parent}")
        for node in self.nodes[: self.n]:
            demand(node.size == 1 and node.level == 0, f"node {node.id} stands in the place of a unit")
        for node in self.nodes[self.n :]:
            parts = self.parts(node)
            inside = sorted(itertools.chain.from_iterable(part.units for part in parts))
            demand(inside == node.units, f"the parts of node {node.id} are not its members")
            demand(node.level == 1 + max(p.level for p in parts), f"node {node.id} has level {node.level}")
            demand(node.step >= max(p.step for p in parts), f"node {node.id} is older than its parts")
        demand(self.root.size == self.n, "the last node is not the whole")


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def grow(
    shape: tuple[int, ...],
    units: np.ndarray,
    levels: Sequence[tuple[np.ndarray, Mapping[int, np.ndarray]]],
    whole: np.ndarray,
    weights: np.ndarray,
    classes: Sequence[int],
    target: int | list[int],
    against: int | None,
) -> Tree:
    """Make a tree of the components of every step.

    units    (n, K) scores of the units alone
    levels   for each step, from 1 on: (*shape) the number of each unit's component, 0 for none, and the (K,) scores of
             each component by its number
    whole    (K,) scores of all units together
    weights  (K,) the score of a node is scores @ weights
    classes  whose scores are kept in the nodes
    target, against   see ``Tree``
    """
    n, classes = len(units), list(classes)
    last = len(levels) + 1
    chosen = np.full(n, last)
    top = {i: str(i) for i in range(n)}  # unit -> the largest node that it is in so far
    level, parent = dict.fromkeys(top.values(), 0), dict.fromkeys(top.values())
    found: dict[str, Node] = {}

    def add(step: int, members: np.ndarray, scores: np.ndarray) -> None:
        places = np.flatnonzero(members)
        name = node_id(runs(members))
        chosen[places] = np.minimum(chosen[places], step)
        if name in level:
            return
        parts = dict.fromkeys(top[int(i)] for i in places)
        level[name], parent[name] = 1 + max(level[part] for part in parts), None
        parent.update(dict.fromkeys(parts, name))
        top.update(dict.fromkeys(places.tolist(), name))
        values = tuple(scores[classes].tolist())
        found[name] = Node(name, step, level[name], None, float(scores @ weights), values, runs(members))

    for step, (labels, scores) in enumerate(levels, start=1):
        for number in np.unique(labels[labels > 0]).tolist():
            add(step, labels.ravel() == number, scores[number])
    add(last, np.ones(n, dtype=bool), whole)
    alone = units @ weights
    nodes = [Node(str(i), int(chosen[i]), 0, parent[str(i)], float(alone[i]), (), ((i, i),)) for i in range(n)]
    components = [Node(**{**vars(node), "parent": parent[name]}) for name, node in found.items()]
    return Tree(shape, target, against, tuple(classes), (*nodes, *components))
