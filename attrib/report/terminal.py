"""Coloured words on a terminal: the texts of a work directory, a line for each method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.style import Style
from rich.table import Table
from rich.text import Text

from attrib.drawing import pictures
from attrib.errors import printable
from attrib.report.gallery import Gallery, gallery
from attrib.results import formats, labels, tables
from attrib.types import UserError


def coloured(words: Sequence[pictures.Word]) -> Text:
    """The words of a text, each in its colours."""
    line = Text()
    for i, word in enumerate(words):
        style = Style(dim=True) if word.special else Style(color=word.ink, bgcolor=word.ground)
        line.append(" " if i else "").append(printable(word.text), style)
    return line


def sentences(root: Path | str, samples: int = 8) -> list[tuple[str, Table]]:
    """(title, table) for every dataset and model with texts: methods x words, ``samples`` texts each.

    Raises UserError if the work directory holds none.
    """
    root = Path(root)
    frame, cells = tables.rows(root), labels.labelled(root)
    found = []
    for dataset, model in dict.fromkeys((c.dataset, c.model) for c in cells):
        own = [c for c in cells if (c.dataset, c.model) == (dataset, model)]
        part = frame[(frame["dataset"] == dataset) & (frame["model"] == model)]
        block = gallery(root, own, part, samples, budget=10**9)
        if block is not None and block.text:
            found.append((formats.title(dataset, model), _table(block)))
    if not found:
        raise UserError(f"{root} holds no maps of texts; those of images are in its report (`attrib report`)")
    return found


def _table(block: Gallery) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for sample in block.samples:
        table.add_row()
        table.add_row("", Text(printable(f"{sample.name}  {sample.uid}"), style="bold"))
        for (label, _, _), tile in zip(block.columns, sample.tiles):
            scores = "  ".join(f"{name} {value}" for name, value in tile.scores)
            words = coloured(tile.words) if tile.words else Text(printable(tile.problem))
            table.add_row(Text(printable(label)), words)
            table.add_row("", Text(printable(scores), style="dim"))
    return table
