"""Explanations as people see them: HTML for notebooks and files, figures of matplotlib. Drawn as the report draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from attrib.drawing import pictures, spectrogram
from attrib.report import gallery, trees
from attrib.results.formats import title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

signed = pictures.is_signed
MOST = 24  # samples that are drawn, of as many as there may be
INCH = 2.4  # of a picture in a figure
LINE = 72  # characters of a text in a line of a figure
LETTER = 0.602 * 8 / 72  # inches: width of a letter of matplotlib's monospace font at 8 points


@dataclass(frozen=True)
class Drawn:
    """What is drawn of one sample.

    name      of what is explained
    content   its image (H, W, 3), sound (L,), or the numbers of a text's words (T,), as ``info`` tells
    roi       its region of interest, or None
    signed    map -> whether it is drawn with two colours
    tree      a hierarchy as JSON in bytes, or None
    """

    uid: str
    name: str
    content: np.ndarray
    roi: np.ndarray | None
    info: Mapping[str, Any]
    maps: Mapping[str, np.ndarray]
    signed: Mapping[str, bool]
    method: str
    tree: np.ndarray | None = None

    @property
    def is_text(self) -> bool:
        return "tokens" in self.info

    def tile(self, kind: str) -> gallery.Tile:
        sound = "rate" in self.info
        return gallery.tile(self.maps[kind], self.content, self.roi, self.info, self.signed[kind], (), "", sound)

    @property
    def input(self) -> np.ndarray | None:
        """The sample itself as a picture; None of a text."""
        if self.is_text:
            return None
        if "rate" in self.info:
            return spectrogram.draw(self.content, int(self.info["rate"]), roi=self.roi)
        return pictures.outlined(self.content, self.roi)

    @property
    def input_uri(self) -> str:
        found = self.input
        return "" if found is None else pictures.data_uri(found, photo=max(found.shape) > 64, longest=gallery.SIZES[0])

    @property
    def hierarchy(self) -> trees.Hierarchy | None:
        if self.tree is None:
            return None
        return trees.hierarchy(self.method, self.uid, self.tree, self.content, {**self.info, "name": self.name})


def image(one: Drawn, kind: str) -> np.ndarray | None:
    """A map as (H, W, 3) uint8; None of a text."""
    if one.is_text:
        return None
    if "rate" in one.info:
        return spectrogram.draw(one.content, int(one.info["rate"]), one.maps[kind], one.roi, one.signed[kind])
    return pictures.overlay(one.content, one.maps[kind], one.roi, one.signed[kind])


# ---- HTML ---------------------------------------------------------------------------------------------


def html(drawn: Sequence[Drawn], table: str = "", of: int = 0, problems: Sequence[str] = ()) -> str:
    """A piece of a page that needs nothing else: the ``drawn`` samples ``of`` so many.

    ``table`` is HTML of our own, shown above the maps. ``problems``: what could not be done.
    """
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([here, Path(gallery.__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    hierarchies = [h for h in (one.hierarchy for one in drawn) if h is not None]
    template = environment.get_template("explanation.html.jinja")
    return template.render(drawn=drawn, hierarchies=hierarchies, table=table, of=of, problems=problems)


def page(drawn: Sequence[Drawn], title: str, table: str = "", of: int = 0, problems: Sequence[str] = ()) -> str:
    """A page of its own, which loads nothing."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
    return f"<!doctype html>{head}<title>{escape(title)}</title>{html(drawn, table, of, problems)}\n"


# ---- figures ------------------------------------------------------------------------------------------


def figure(drawn: Sequence[Drawn]) -> Figure:
    """A row for each sample, or of texts for each map."""
    return _of_texts(drawn) if drawn[0].is_text else _of_pictures(drawn)


def _of_pictures(drawn: Sequence[Drawn]) -> Figure:
    from matplotlib.figure import Figure

    columns = 1 + max(len(one.maps) for one in drawn)
    shapes = [one.input for one in drawn]
    heights = [s.shape[0] / s.shape[1] for s in shapes if s is not None]
    made = Figure(figsize=(INCH * columns, sum(INCH * h + 0.3 for h in heights)), layout="constrained")
    grid = made.subplots(len(drawn), columns, squeeze=False, height_ratios=heights)
    for row, one in zip(grid, drawn):
        _show(row[0], one.input, one.name or one.uid)
        for axes, kind in zip(row[1:], one.maps):
            _show(axes, image(one, kind), one.method if len(one.maps) == 1 else kind)
        for axes in row[1 + len(one.maps) :]:  # of methods that failed for this sample
            axes.set_axis_off()
    return made


def _show(axes: Axes, picture: np.ndarray | None, title: str) -> None:
    axes.set_axis_off()
    if picture is not None:
        axes.imshow(picture, interpolation="nearest" if max(picture.shape) < 64 else None)
    axes.set_title(pictures.plain(title)[:48], fontsize=8, parse_math=False)


def _of_texts(drawn: Sequence[Drawn]) -> Figure:
    from matplotlib.figure import Figure

    blocks = [(one, kind, _lines(one.tile(kind).words)) for one in drawn for kind in one.maps]
    height = sum(0.28 * (len(lines) + 1) + 0.1 for _, _, lines in blocks)
    width = LINE * LETTER + 0.2
    made = Figure(figsize=(width, height + 0.1))
    y = 1.0 - 0.15 / (height + 0.1)
    step = 0.28 / (height + 0.1)
    for one, kind, lines in blocks:
        said = title(one.name or one.uid, one.method if len(one.maps) == 1 else kind)
        made.text(0.01, y, pictures.plain(said), fontsize=7.5, color=pictures.GREY, va="center", parse_math=False)
        for line in lines:
            y -= step
            x = 0.01
            for word in line:
                box = {"facecolor": word.ground or "none", "edgecolor": "none", "pad": 1.5}
                text, ink = pictures.plain(word.text), word.ink or pictures.GREY
                made.text(
                    x, y, text, family="monospace", fontsize=8, color=ink, va="center", bbox=box, parse_math=False
                )
                x += (len(text) + 1) * LETTER / width
        y -= step + 0.1 / (height + 0.1)
    return made


def _lines(words: Sequence[pictures.Word]) -> list[list[pictures.Word]]:
    """Words in lines of at most ``LINE`` characters."""
    lines: list[list[pictures.Word]] = [[]]
    used = 0
    for word in words:
        if lines[-1] and used + len(word.text) > LINE:
            lines.append([])
            used = 0
        lines[-1].append(word)
        used += len(word.text) + 1
    return lines
