"""Pictures of maps: colours, overlays on the input, small line plots. For the report, exports and ``run.png``.

Matplotlib is used through its objects alone: no pyplot, no backend, no process-wide settings. It is imported where
something is drawn, because most runs draw nothing.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PERCENTILE = 99.0  # of |map|: a single hot pixel must not darken everything else
SIGNED, POSITIVE = "RdBu_r", "inferno"
GREY = "#808790"  # of axes and words in plots, legible on white and on black
# Tol's bright scheme, told apart by colour-blind readers and on white as on black.
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee8866", "#888888")


@dataclass(frozen=True)
class ColourScale:
    """How numbers become colours: -limit .. limit for signed maps, 0 .. limit otherwise."""

    signed: bool
    limit: float

    @property
    def colours(self) -> str:
        return SIGNED if self.signed else POSITIVE


def is_signed(map: np.ndarray) -> bool:
    """Whether ``map`` has negative values that are more than rounding."""
    finite = np.asarray(map, dtype=np.float64)[np.isfinite(map)]
    return bool(finite.size and finite.min() < -1e-6 * max(np.abs(finite).max(), 1e-30))


def scale(map: np.ndarray, signed: bool | None = None) -> ColourScale:
    """Symmetric limits for signed maps, by the 99th percentile of \\|map\\|. ``signed=None`` looks at the map."""
    magnitude = np.abs(np.asarray(map, dtype=np.float64)[np.isfinite(map)])
    limit = float(np.percentile(magnitude, PERCENTILE)) if magnitude.size else 0.0
    limit = limit or (float(magnitude.max()) if magnitude.size else 0.0)  # almost everything is 0
    return ColourScale(is_signed(map) if signed is None else signed, limit)


def _unit(map: np.ndarray, scale: ColourScale) -> np.ndarray:
    """``map`` / limit, cut to -1 .. 1 or 0 .. 1; NaN and a map of zeros become 0."""
    values = np.nan_to_num(np.asarray(map, dtype=np.float64), nan=0.0, posinf=scale.limit, neginf=-scale.limit)
    return np.clip(values / (scale.limit or 1.0), -1.0 if scale.signed else 0.0, 1.0)


def _colour(unit: np.ndarray, scale: ColourScale) -> np.ndarray:
    """Values in -1 .. 1 or 0 .. 1, any shape -> (..., 3) in 0 .. 1."""
    from matplotlib import colormaps

    return colormaps[scale.colours]((unit + 1) / 2 if scale.signed else unit)[..., :3]


def _bytes(rgb: np.ndarray) -> np.ndarray:
    return (np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8)


def heat(map: np.ndarray, signed: bool | None = None, *, size: tuple[int, int] | None = None) -> np.ndarray:
    """Colours of ``map`` (H, W), float -> (H, W, 3) uint8, or (h, w, 3) for ``size`` (h, w).

    Signed: blue negative, white 0, red positive. Otherwise dark to bright from 0.
    """
    found = scale(map, signed)
    return _bytes(_colour(_unit(_resized(map, size), found), found))


def overlay(
    picture: np.ndarray, map: np.ndarray, roi: np.ndarray | None = None, signed: bool | None = None
) -> np.ndarray:
    """``map`` (h, w) in colour over ``picture`` (H, W, 3) uint8 -> (H, W, 3) uint8.

    The picture turns grey so that every colour means attribution, and shows through where there is
    little of it. A map of another size is stretched. ``roi`` (H, W) bool is outlined. Raises ValueError
    for other shapes.
    """
    picture, map = np.asarray(picture), np.asarray(map)
    if picture.ndim != 3 or picture.shape[2] != 3 or map.ndim != 2:
        raise ValueError(f"overlay needs a picture (H, W, 3) and a map (H, W), got {picture.shape} and {map.shape}")
    found = scale(map, signed)
    unit = _unit(_resized(map, picture.shape[:2]), found)
    grey = picture.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255
    if found.signed:  # white, the middle of the scale, would bleach the picture: fade into the two ends instead
        grey = 0.25 + 0.6 * grey
        alpha, colour = 0.9 * np.abs(unit) ** 0.7, _colour(0.85 * np.sign(unit), found)
    else:
        alpha, colour = 0.2 + 0.65 * unit**0.7, _colour(unit, found)
    mixed = (1 - alpha[..., None]) * grey[..., None] + alpha[..., None] * colour
    return outlined(_bytes(mixed), roi)


def outlined(picture: np.ndarray, roi: np.ndarray | None) -> np.ndarray:
    """A copy of ``picture`` (H, W, 3) uint8 with the border of ``roi`` (H, W) bool drawn in it, seen on any colour."""
    picture = picture.copy()
    if roi is None or not np.any(roi):
        return picture
    roi = np.asarray(_resized(np.asarray(roi, dtype=np.float64), picture.shape[:2])) > 0.5
    width = max(1, round(min(roi.shape) / 112))
    inner = _shrunk(roi, width)
    picture[roi & ~inner] = (0, 255, 102)
    if min(roi.shape) >= 64:  # a dark inner line; tiny pictures have no room for it
        picture[inner & ~_shrunk(inner, 1)] = (0, 0, 0)
    return picture


def _shrunk(mask: np.ndarray, steps: int) -> np.ndarray:
    for _ in range(steps):
        p = np.pad(mask, 1)
        mask = p[1:-1, 1:-1] & p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]
    return mask


def _resized(map: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    if size is None or map.shape == tuple(size):
        return map
    image = Image.fromarray(np.nan_to_num(np.asarray(map, dtype=np.float32)))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))


@dataclass(frozen=True)
class Word:
    """A token of a text with its colours, ``#rrggbb``: of the ground, and of legible letters on it."""

    text: str
    ground: str
    ink: str
    special: bool  # [CLS], [SEP]: no word of the text


def words(
    tokens: Sequence[str], map: np.ndarray, signed: bool | None = None, numbers: np.ndarray | None = None
) -> list[Word]:
    """The tokens of a text in the colours of their map (T,): blue negative, white 0, red positive.

    ``numbers`` (T,), see ``Batch.words``: tokens numbered -1 have no colour and do not count for the scale.
    """
    real = np.ones(len(map), dtype=bool) if numbers is None else np.asarray(numbers) >= 0
    found = scale(np.asarray(map)[real], signed)
    # Not the dark end that positive maps of images start from: most of a text is near 0.
    white_to_red = ColourScale(True, found.limit)
    grounds = _bytes(_colour(np.where(real, 0.85 * _unit(map, white_to_red), 0.0), white_to_red))
    dark = grounds @ np.array([0.299, 0.587, 0.114]) < 110
    return [
        Word(str(t), "#" + bytes(g).hex() if r else "", ("#ffffff" if d else "#111111") if r else "", not r)
        for t, g, d, r in zip(tokens, grounds, dark, real)
    ]


def words_page(uid: str, tokens: Sequence[str], map: np.ndarray) -> str:
    """A text with coloured words as a page of its own."""
    spans = (
        f'<span style="background:{word.ground};color:{word.ink};padding:1px 3px">{escape(word.text)}</span>'
        for word in words(tokens, map)
    )
    policy = "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    return f"<!doctype html><meta charset=utf-8>{policy}<title>{escape(uid)}</title><p>{' '.join(spans)}</p>\n"


def coloured(unit: np.ndarray, signed: bool) -> np.ndarray:
    """Values in -1 .. 1 (signed) or 0 .. 1, of any shape -> (..., 3) uint8."""
    return _bytes(_colour(unit, ColourScale(signed, 1.0)))


def legend(signed: bool) -> np.ndarray:
    """The colours from the least to the greatest value, (1, 128, 3) uint8."""
    return coloured(np.linspace(-1.0 if signed else 0.0, 1.0, 128), signed)[None]


def png(picture: np.ndarray) -> bytes:
    """``picture`` (H, W, 3) uint8 as a file's content."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def shrunk(picture: np.ndarray, longest: int) -> np.ndarray:
    """``picture`` (H, W, 3) uint8 with at most ``longest`` pixels a side; as it is where it has no more."""
    if max(picture.shape[:2]) <= longest:
        return picture
    image = Image.fromarray(picture)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return np.asarray(image)


def data_uri(picture: np.ndarray, *, photo: bool = False, longest: int = 256) -> str:
    """``picture`` (H, W, 3) uint8 as a data: URI, at most ``longest`` pixels a side; JPEG for photos, else PNG."""
    image = Image.fromarray(shrunk(picture, longest))
    buffer = io.BytesIO()
    if photo:
        image.save(buffer, "JPEG", quality=86, optimize=True)
    else:
        image.save(buffer, "PNG", optimize=True)
    return f"data:image/{'jpeg' if photo else 'png'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True)
class PlotLine:
    """One line of a plot: ``y`` (S,) over equal steps of x, optionally a band ``lo``, ``hi`` (S,)."""

    y: np.ndarray
    colour: str
    lo: np.ndarray | None = None
    hi: np.ndarray | None = None
    width: float = 1.8
    dashed: bool = False


def plot(
    lines: Sequence[PlotLine],
    *,
    size: tuple[float, float] = (4.4, 2.8),
    x: str = "",
    y: str = "",
    unit_x: bool = True,
    ticks: Sequence[str] = (),
) -> str:
    """A line plot as an SVG data: URI, transparent, legible on white and on black. ``size`` is in inches.

    ``unit_x``: x runs from 0 to 1, else over the steps 0, 1, 2 ..., whose names ``ticks`` are, if any. There is no
    legend: the page has it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    for line in lines:
        steps = np.linspace(0, 1, len(line.y)) if unit_x else np.arange(len(line.y))
        if line.lo is not None and line.hi is not None:
            axes.fill_between(steps, line.lo, line.hi, color=line.colour, alpha=0.18, linewidth=0)
        dashes = "--" if line.dashed else "-"
        axes.plot(steps, line.y, color=line.colour, linewidth=line.width, linestyle=dashes, solid_capstyle="round")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY, labelsize=8)
    axes.grid(True, color=GREY, alpha=0.2, linewidth=0.6)
    axes.margins(x=0.01)
    if ticks:
        names = [_shortened(plain(name)) for name in ticks]
        axes.set_xticks(range(len(names)), names, rotation=30 if max(map(len, names)) > 3 else 0, parse_math=False)
    for text, name in ((axes.xaxis.label, x), (axes.yaxis.label, y)):
        text.set(text=plain(name), color=GREY, fontsize=8.5, parse_math=False)
    return svg_uri(figure)


def _shortened(name: str, most: int = 30) -> str:
    """Both ends of a long name: under a small plot it would leave no room for the plot."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}..{name[-(most // 2 - 1) :]}"


def svg_uri(figure: Figure) -> str:
    """The figure as an SVG data: URI, transparent, the same bytes at any time."""
    buffer = io.BytesIO()
    meta: Mapping[str, None] = {"Date": None, "Creator": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=dict(meta))
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def plain(text: str) -> str:
    """Only letters that matplotlib's own font has; others would warn and be drawn as boxes."""
    return "".join(c if c.isprintable() and ord(c) < 0x250 else "?" for c in text)
