"""Handwritten digits that come with scikit-learn, alone, and among clutter with an exact box or mask."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from attrib.datasets.arrays import ArrayDataset, PixelDataset, check_split
from attrib.datasets.images import ImageDataset
from attrib.datasets.transform import Box, ImageTransform
from attrib.keys import digest, stable_hash
from attrib.noise import Noise
from attrib.types import SampleError, UserError


def _split_of(index: int) -> str:
    """70 % train, 15 % val, 15 % test."""
    share = stable_hash(f"split/{index:04d}") / 2**64
    return "train" if share < 0.7 else "val" if share < 0.85 else "test"


class Digits(ArrayDataset):
    """The 1,797 digits of 8 x 8 pixels that scikit-learn ships, bright on black.

    They are the test set of *Optical Recognition of Handwritten Digits* (Alpaydin & Kaynak, 1998).
    The split is ours and does not separate the writers: new writers are harder than "test" says.

    Raises UserError if scikit-learn is not installed.
    """

    def __init__(self, transform: ImageTransform, split: Literal["train", "val", "test"] = "test") -> None:
        check_split(split)
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UserError("the digits come with scikit-learn; install it: pip install scikit-learn") from error
        found = load_digits()
        pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)  # stored as 0 .. 16
        rows = {f"{split}/{i:04d}": i for i in range(len(pixels)) if _split_of(i) == split}
        super().__init__(rows, pixels, found.target, transform, {i: str(i) for i in range(10)})
        self.key = digest(self.key, split)


class _Placed(NamedTuple):
    """A digit, cut to its ink, and the pixel of the canvas where its upper left corner lies."""

    ink: np.ndarray
    x: int
    y: int

    @property
    def box(self) -> Box:
        height, width = self.ink.shape
        return Box(self.x, self.y, self.x + width, self.y + height)


_GAP = 2  # pixels that stay black around a digit: a fragment that touches it could make a 7 of a 1
_FAINT = 16  # pixels darker than this cannot be seen; without them a digit's box is tight


class DigitsCanvas(PixelDataset):
    """Digits on a black canvas among fragments of other digits: the box says exactly where the evidence is.

    After the cluttered MNIST of Mnih et al. (*Recurrent Models of Visual Attention*, NeurIPS 2014, section
    4.1), except that no fragment touches a digit. Fragments come from all classes alike, so that neither
    their presence nor their absence tells the label. Every image of the source has ``views`` canvases,
    named ``test/0012/view-00``, and its label.

    source    a dataset of bright digits on black: called with ``transform`` and ``split``
    size      side of the canvas in pixels
    digit     side to which an image of the source is resized before it is cut to its ink
    digits    how many whole digits, all of the same class; each lies in a cell of a square grid and has a box
    clutter   how many fragments, and
    fragment  their side in pixels
    seed      of places and fragments; the digits keep their places when ``clutter`` changes
    regions   "boxes" around the digits, or "masks": the pixels of their ink

    Raises UserError for a canvas that is too small.
    """

    def __init__(
        self,
        transform: ImageTransform,
        split: Literal["train", "val", "test"] = "test",
        source: Callable[..., ImageDataset] = Digits,
        size: int = 64,
        digit: int = 28,
        digits: int = 1,
        clutter: int = 8,
        fragment: int = 10,
        views: int = 1,
        seed: int = 0,
        regions: Literal["boxes", "masks"] = "boxes",
    ) -> None:
        if regions not in ("boxes", "masks"):
            raise UserError(f"dataset.regions must be boxes or masks, not {regions!r}")
        for field, value, least in (
            ("size", size, 1), ("digit", digit, 1), ("digits", digits, 1),
            ("clutter", clutter, 0), ("fragment", fragment, 1), ("views", views, 1),
        ):  # fmt: skip
            if value < least:
                raise UserError(f"dataset.{field} must be at least {least}, not {value}")
        self._grid = math.isqrt(digits - 1) + 1
        self._cell = size // self._grid
        room = self._cell if digits < self._grid**2 else (self._cell - digit) // 2
        if self._cell < digit or (clutter and room < fragment + 2 * _GAP):
            what = f"{digits} of {digit} pixels" + (f" and fragments of {fragment}" if clutter else "")
            raise UserError(f"dataset.size: a canvas of {size} pixels has no room for dataset.digits={what}")
        self._source = source(transform=transform, split=split)
        self._size, self._digit, self._digits = size, digit, digits
        self._clutter, self._fragment, self._seed = clutter, fragment, seed
        self._base = {f"{uid}/view-{i:02d}": uid for uid in self._source.uids for i in range(views)}
        self._inks: dict[str, np.ndarray] = {}  # a fragment may come from any of them, again and again
        self._classes: dict[int, list[str]] = defaultdict(list)
        for uid in self._source.uids:
            self._classes[self._source.label(uid)].append(uid)
        super().__init__(self._base, transform, self._source.names, boxed=True)
        more = () if regions == "boxes" else (regions,)  # boxes were there first
        self._regions = regions
        self.key = digest(self.key, self._source.key, size, digit, digits, clutter, fragment, seed, *more)

    def label(self, uid: str) -> int:
        return self._source.label(self._base[uid])

    def boxes(self, uid: str) -> tuple[Box, ...]:
        return tuple(placed.box for placed in self._placed(uid, self._noise(uid)))

    def region(self, uid: str) -> np.ndarray | None:
        if self._regions == "boxes":
            return None
        inside = np.zeros((self._size, self._size), dtype=bool)
        for ink, x, y in self._placed(uid, self._noise(uid)):
            inside[y : y + ink.shape[0], x : x + ink.shape[1]] |= ink > 0
        return inside

    def pixels(self, uid: str) -> np.ndarray:
        noise = self._noise(uid)
        placed = self._placed(uid, noise)
        canvas = np.zeros((self._size, self._size), np.uint8)
        for ink, x, y in (*placed, *self._fragments(placed, noise.child("clutter"))):
            part = canvas[y : y + ink.shape[0], x : x + ink.shape[1]]
            np.maximum(part, ink, out=part)
        return canvas

    def file(self, uid: str) -> str:
        return self._source.file(self._base[uid])

    def _noise(self, uid: str) -> Noise:
        return Noise([uid], self._seed).child("canvas")

    def _ink(self, uid: str) -> np.ndarray:
        """(h, w) uint8: an image of the source, resized and cut to its ink."""
        if uid in self._inks:
            return self._inks[uid]
        image = self._source.image(uid).convert("L").resize((self._digit, self._digit), Image.Resampling.BICUBIC)
        pixels = np.array(image)
        pixels[pixels < _FAINT] = 0
        rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
        if not len(rows):
            raise SampleError(f"{self._source.file(uid)}: no pixel of it is bright enough to be seen")
        return self._inks.setdefault(uid, pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])

    def _placed(self, uid: str, noise: Noise) -> list[_Placed]:
        cells = noise.permutation(self._grid**2)[0, : self._digits].tolist()
        others = self._classes[self.label(uid)]
        picked = noise.integers(len(others), self._digits - 1)[0].tolist()
        places = noise.uniform(self._digits, 2)[0].tolist()
        found = []
        for cell, place, base in zip(cells, places, [self._base[uid], *(others[i] for i in picked)], strict=True):
            ink = self._ink(base)
            y, x = (
                n * self._cell + _below(self._cell - side + 1, u)
                for n, side, u in zip(divmod(cell, self._grid), ink.shape, place, strict=True)
            )
            found.append(_Placed(ink, x, y))
        return found

    def _fragments(self, digits: list[_Placed], noise: Noise) -> list[_Placed]:
        uids = self._source.uids
        found = []
        for which, down, right, where in noise.uniform(self._clutter, 4)[0].tolist():
            ink = self._ink(uids[_below(len(uids), which)])
            y, x = (_below(max(1, n - self._fragment + 1), u) for n, u in zip(ink.shape, (down, right), strict=True))
            part = ink[y : y + self._fragment, x : x + self._fragment]
            free = np.ones([self._size - side + 1 for side in part.shape], bool)
            for box in (placed.box for placed in digits):
                top, left = (max(0, int(e) - side - _GAP + 1) for e, side in zip((box.y1, box.x1), part.shape))
                free[top : int(box.y2) + _GAP, left : int(box.x2) + _GAP] = False
            places = np.flatnonzero(free)
            y, x = divmod(int(places[_below(len(places), where)]), free.shape[1])
            found.append(_Placed(part, x, y))
        return found


def _below(count: int, uniform: float) -> int:
    """A whole number in 0 .. count-1 from a uniform one on [0, 1)."""
    return int(uniform * count)
