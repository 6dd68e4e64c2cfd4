"""Images that are arrays of pixels, not files, and how the small public sets among them are split."""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np

from attrib.datasets.images import ImageDataset
from attrib.datasets.transform import ImageTransform
from attrib.keys import stable_hash
from attrib.types import UserError

SPLITS = ("train", "val", "test")


def check_split(split: str, known: Sequence[str] = SPLITS) -> None:
    """Raises UserError for a split that is not ``known``."""
    if split not in known:
        raise UserError(f"dataset.split must be {', '.join(known[:-1])} or {known[-1]}, not {split!r}")


def rows_of(split: str, count: int) -> dict[str, int]:
    """uid -> row in the set's training or test file, whichever ``split`` is from; it has ``count`` rows.

    For sets whose authors named no validation images: a fixed tenth of the training file is "val", the rest "train".
    """
    file = "test" if split == "test" else "train"
    rows = {f"{file}/{i:05d}": i for i in range(count)}
    if split == "test":
        return rows
    # A hash of its own: one of the uid alone would put all of "val" into the same shard.
    return {uid: i for uid, i in rows.items() if (stable_hash(f"split/{uid}") % 10 == 0) == (split == "val")}


def netpbm(pixels: np.ndarray) -> bytes:
    """A PGM or PPM file of (H, W) or (H, W, 3) uint8: a short header, then the pixels as they are."""
    height, width = pixels.shape[:2]
    return b"P%d\n%d %d\n255\n" % (5 if pixels.ndim == 2 else 6, width, height) + pixels.tobytes()


class PixelDataset(ImageDataset):
    """Images whose pixels a subclass provides. The fingerprint covers size and pixels, the label and the boxes."""

    @abstractmethod
    def pixels(self, uid: str) -> np.ndarray:
        """(H, W) or (H, W, 3) uint8."""

    def open(self, uid: str) -> BinaryIO:
        return io.BytesIO(netpbm(self.pixels(uid)))


class ArrayDataset(PixelDataset):
    """Images and labels in memory.

    rows    uid -> row of ``pixels`` and ``labels``
    pixels  (N, H, W) or (N, H, W, 3) uint8
    labels  (N,) integers
    """

    def __init__(
        self,
        rows: Mapping[str, int],
        pixels: np.ndarray,
        labels: np.ndarray,
        transform: ImageTransform,
        names: Mapping[int, str] | None = None,
    ) -> None:
        self._rows, self._pixels, self._labels = rows, pixels, labels
        super().__init__(rows, transform, names)

    def pixels(self, uid: str) -> np.ndarray:
        return self._pixels[self._rows[uid]]

    def label(self, uid: str) -> int:
        return int(self._labels[self._rows[uid]])
