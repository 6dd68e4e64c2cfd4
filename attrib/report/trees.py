"""Hierarchies on the page: of a sentence, rows of merged phrases; of an image, its components step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attrib.agglomeration.trees import Node, Tree
from attrib.classes import shown_target
from attrib.drawing import pictures
from attrib.report.gallery import current_keys
from attrib.results.labels import Labelled
from attrib.store.cell import Arrays
from attrib.store.inputs import kept_input, stored_array
from attrib.store.inputs import known as known_inputs
from attrib.store.reading import parsed
from attrib.types import UserError

NAME = "tree"  # of the document
MOST_STEPS = 6  # pictures in the row of an image
MOST_NODES = 60  # components with a picture of their own, the last and so the largest ones
MOST_LEVELS = 60  # of a long text: rows, and how deep the tree opens
SIDE = 168  # pixels of a picture's longer side


@dataclass(frozen=True)
class Phrase:
    """A phrase in a row of a sentence's hierarchy, or a gap (no text)."""

    span: int
    text: str = ""
    ground: str = ""
    ink: str = ""
    about: str = ""


@dataclass(frozen=True)
class Branch:
    """A node and the nodes it was merged from, for the tree that can be opened and closed."""

    text: str
    score: str
    ground: str
    ink: str
    image: str
    about: str
    parts: Sequence[Branch]


@dataclass(frozen=True)
class Hierarchy:
    """One sample's tree: ``rows`` of a sentence from the whole to the words, or ``steps`` of an image."""

    method: str
    uid: str
    name: str
    limit: str = ""
    rows: Sequence[Sequence[Phrase]] = ()
    steps: Sequence[tuple[str, str]] = ()  # caption, picture
    branch: Branch | None = None
    problem: str = ""
    size: int = field(default=0, compare=False)  # bytes of its pictures


def hierarchies(
    root: Path, cells: Sequence[Labelled], frame: pd.DataFrame, samples: int, budget: int
) -> list[Hierarchy]:
    """The first ``samples`` of every method that wrote trees; fewer where pictures would exceed ``budget`` bytes."""
    found: list[Hierarchy] = []
    used = 0
    for item in cells:
        if NAME not in item.spec.get("documents", {}):
            continue
        inputs = [Arrays(root / "state" / f"pictures.{item.spec['pictures']}")]
        known = current_keys(item, frame)
        pictured = [uid for uid, key in known.items() if key in known_inputs(inputs[0])]
        for uid in (pictured or sorted(known))[:samples]:
            one = _hierarchy(item, uid, known[uid], inputs)
            used += one.size
            if used > budget and found:
                return found
            found.append(one)
    return found


def _hierarchy(item: Labelled, uid: str, key: tuple[str, str], inputs: Sequence[Arrays]) -> Hierarchy:
    stored = stored_array(item.cell.maps, key, NAME)
    content, _, info = kept_input(inputs, key)
    return hierarchy(item.method, uid, stored, content, info)


def hierarchy(
    method: str, uid: str, stored: np.ndarray | None, content: np.ndarray | None, info: Mapping[str, Any]
) -> Hierarchy:
    """A tree as it is shown. ``stored`` is its JSON in bytes; ``content`` and ``info`` as in ``gallery.tile``."""
    name = shown_target(str(info.get("name") or ""), info.get("target"))
    try:
        if stored is None:
            raise UserError("no tree stored")
        tree = Tree.from_json(parsed(stored.tobytes(), dict[str, Any]))
        if not tree.nodes:
            raise UserError("a text without words has no tree")
    except (UserError, ValueError, OverflowError, AttributeError, IndexError) as error:
        return Hierarchy(method, uid, name, problem=str(error))
    palette = _Palette(tree.nodes)
    if len(tree.shape) == 1:
        words = _words(tree, content, [str(t) for t in info.get("tokens", ())])
        rows, branch = (
            _rows(tree, words, palette),
            _branch(tree, tree.root, palette, lambda node: (_phrase(node, words), "")),
        )
        return Hierarchy(method, uid, name, palette.text, rows, branch=branch)
    image = content if content is not None and content.ndim == 3 else None
    drawing = _Drawing(tree, image, palette)
    shown = {node.id for node in tree.nodes[tree.n :][-MOST_NODES:]}
    steps = drawing.steps()
    branch = _branch(
        tree, tree.root, palette, lambda node: (f"{node.size} tiles", drawing.alone(node) if node.id in shown else "")
    )
    return Hierarchy(method, uid, name, palette.text, steps=steps, branch=branch, size=drawing.bytes)


class _Palette:
    """Colours of the scores of some nodes, on one scale: blue against the class, red for it."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._limit = max(abs(node.score) for node in nodes) or 1.0
        self.text = f"±{self._limit:.3g}"

    def rgb(self, score: Any) -> np.ndarray:
        """Scores of any shape -> (..., 3) uint8."""
        return pictures.coloured(0.85 * np.clip(np.asarray(score) / self._limit, -1, 1), True)

    def css(self, score: float) -> tuple[str, str]:
        """(ground, ink)"""
        (ground,) = self.rgb([score])
        return "#" + bytes(ground).hex(), "#ffffff" if ground @ np.array([0.299, 0.587, 0.114]) < 110 else "#111111"


def _about(tree: Tree, node: Node) -> str:
    values = ", ".join(f"{c}: {s:+.3g}" for c, s in zip(tree.classes, node.scores))
    return f"{node.id} · {node.score:+.3g} · level {node.level}, step {node.step}" + (f" · {values}" if values else "")


def _branch(tree: Tree, node: Node, palette: _Palette, describe: Any, depth: int = 0) -> Branch:
    """Single units are left out where they are tiles of a grid: there are too many."""
    below_it = tree.parts(node) if depth < MOST_LEVELS else ()
    parts = [part for part in below_it if part.level > 0 or len(tree.shape) == 1]
    text, image = describe(node)
    below = [_branch(tree, part, palette, describe, depth + 1) for part in parts]
    return Branch(text, f"{node.score:+.3g}", *palette.css(node.score), image, _about(tree, node), below)


# ---- sentences ------------------------------------------------------------------------------------


def _words(tree: Tree, numbers: np.ndarray | None, tokens: Sequence[str]) -> list[str]:
    """The text of each unit; its number where that is not known."""
    if numbers is None or len(numbers) != len(tokens) or numbers.max(initial=-1) + 1 != tree.n:
        return [str(i) for i in range(tree.n)]
    words = [""] * tree.n
    for number, token in zip(numbers.tolist(), tokens):
        if number >= 0:
            words[number] += token.removeprefix("##")
    return words


def _phrase(node: Node, words: Sequence[str]) -> str:
    return " ".join(words[i] for i in node.units)


def _rows(tree: Tree, words: Sequence[str], palette: _Palette) -> list[list[Phrase]]:
    """From the whole to the words, as figure 2 of the paper from top to bottom; each phrase at its own level.

    Of more than ``MOST_LEVELS`` levels so many are shown, evenly.
    """
    rows, highest = [], tree.root.level
    levels = {round(level) for level in np.linspace(0, highest, min(highest + 1, MOST_LEVELS))}
    for level in sorted(levels, reverse=True):
        row, place = [], 0
        for node in sorted((n for n in tree.nodes if n.level == level), key=lambda n: n.members):
            (first, last), *_ = node.members
            if first > place:
                row.append(Phrase(first - place))
            row.append(Phrase(node.size, _phrase(node, words), *palette.css(node.score), _about(tree, node)))
            place = last + 1
        rows.append([*row, *([Phrase(tree.n - place)] if place < tree.n else [])])
    return rows


# ---- images ---------------------------------------------------------------------------------------


def _caption(step: int, nodes: Sequence[Node]) -> str:
    return f"step {step}: " + ", ".join(f"{node.score:+.3g}" for node in nodes[:4]) + (" …" if len(nodes) > 4 else "")


class _Drawing:
    """Components in colour on a grey picture, each with an outline."""

    def __init__(self, tree: Tree, image: np.ndarray | None, palette: _Palette) -> None:
        self._tree, self._palette, self.bytes = tree, palette, 0
        image = np.full((*tree.shape, 3), 255, np.uint8) if image is None else image
        factor = max(1, SIDE // max(image.shape[:2]))
        self._image = image.repeat(factor, 0).repeat(factor, 1)
        self._at = [np.arange(new) * old // new for new, old in zip(self._image.shape[:2], tree.shape)]

    def _large(self, units: np.ndarray) -> np.ndarray:
        """An array over the units -> (H, W) of the drawn image."""
        return units[self._at[0]][:, self._at[1]]

    def _uri(self, drawn: np.ndarray, longest: int = SIDE) -> str:
        uri = pictures.data_uri(drawn, photo=True, longest=longest)
        self.bytes += len(uri)
        return uri

    def _drawn(self, nodes: Sequence[Node], palette: _Palette, outline: bool) -> np.ndarray:
        tree = self._tree
        number = self._large(tree.paint(nodes, range(1, len(nodes) + 1)))
        score = self._large(tree.paint(nodes, (node.score for node in nodes)))
        grey = self._image.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) * 0.6 + 64
        alpha = np.where(number > 0, 0.62, 0.0)[..., None]
        drawn = (1 - alpha) * grey[..., None] + alpha * palette.rgb(score)
        if outline:
            edge = np.zeros(number.shape, dtype=bool)
            edge[:, 1:] |= number[:, 1:] != number[:, :-1]
            edge[1:] |= number[1:] != number[:-1]
            drawn[edge] = 0
        return np.clip(drawn, 0, 255).astype(np.uint8)

    def steps(self) -> list[tuple[str, str]]:
        """The units' own scores, then the components after some of the steps."""
        tree = self._tree
        every = sorted({node.step for node in tree.nodes[tree.n :]})[:-1]
        some = (
            [every[i] for i in sorted({round(i) for i in np.linspace(0, len(every) - 1, MOST_STEPS)})] if every else []
        )
        units = tree.nodes[: tree.n]
        alone = _Palette(units)
        first = (f"tiles alone, limit {alone.text}", self._uri(self._drawn(units, alone, outline=False)))
        after = [(step, tree.after(step)) for step in some]
        return [
            first,
            *((_caption(step, nodes), self._uri(self._drawn(nodes, self._palette, True))) for step, nodes in after),
        ]

    def alone(self, node: Node) -> str:
        """A small picture of one component; the rest of the image is dark."""
        inside = self._large(self._tree.paint([node], [1.0])) > 0
        return self._uri(np.where(inside[..., None], self._image, self._image // 5), 72)
