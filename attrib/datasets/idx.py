"""MNIST and the sets that have the same file format."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from attrib.datasets.arrays import ArrayDataset, check_split, rows_of
from attrib.datasets.files import existing_folder
from attrib.datasets.transform import ImageTransform
from attrib.keys import digest
from attrib.types import UserError

_MOST = 2**31  # bytes; the largest of these sets, EMNIST, has 0.6 GB


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file of unsigned bytes, gzipped if its name ends so (format: <http://yann.lecun.com/exdb/mnist>).

    Raises UserError naming the file if it is damaged, cut short or longer than its header says, or if
    it holds anything but bytes in ``dimensions`` dimensions.
    """
    begin = 4 + 4 * dimensions
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(begin)
            magic = b"\0\0\x08" + bytes([dimensions])
            if header[:4] != magic:
                raise UserError(
                    f"dataset.root: {path} begins with {header[:4].hex() or 'nothing'}, not with {magic.hex()}, "
                    f"as an IDX file of bytes in {dimensions} dimension{'s'[: dimensions > 1]} does"
                )
            if len(header) < begin:
                raise UserError(f"dataset.root: {path} is cut short: it ends inside its header")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            promised, says = math.prod(shape), f"its header says {' x '.join(map(str, shape))} bytes"
            if promised > _MOST:
                raise UserError(f"dataset.root: {path} is damaged: {says}")
            content = file.read(promised + 1)  # one more to see whether it ends there, and no more, whatever gzip hides
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"dataset.root: {path} cannot be read: {error}") from error
    if len(content) != promised:
        wrong = "is cut short" if len(content) < promised else "is longer than it should be"
        raise UserError(f"dataset.root: {path} {wrong}: {says}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _file(root: Path, name: str, kind: str) -> Path:
    raw = root / kind / "raw"  # where torchvision leaves them
    for path in (root / name, root / f"{name}.gz", raw / name, raw / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(f"dataset.root: {root} has neither {name} nor {name}.gz; data/README.md says where to get them")


class IDX(ArrayDataset):
    """``{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]`` in ``root``, bright on black.

    They may also lie in ``<root>/<name of the class>/raw``, where torchvision leaves them.

    split  "test": the files t10k; "val": a fixed tenth of the files train; "train": the other nine
    NAMES  class index -> class name, of all labels that may occur

    Raises UserError naming the file that is missing, damaged or does not fit the other.
    """

    NAMES: ClassVar[Mapping[int, str]]

    def __init__(self, root: str, transform: ImageTransform, split: Literal["train", "val", "test"] = "test") -> None:
        check_split(split)
        folder, stem = existing_folder(root, "dataset.root"), "t10k" if split == "test" else "train"
        of = type(self).__name__
        pictures, names = (_file(folder, f"{stem}-{kind}-ubyte", of) for kind in ("images-idx3", "labels-idx1"))
        pixels, labels = read_idx(pictures, 3), read_idx(names, 1)
        if not pixels.size:
            raise UserError(f"dataset.root: {pictures} holds no images")
        if len(pixels) != len(labels):
            raise UserError(f"dataset.root: {pictures} holds {len(pixels)} images, {names} {len(labels)} labels")
        if labels.max() not in self.NAMES:
            raise UserError(
                f"dataset.root: {names}: label {labels.max()} of image {labels.argmax()} "
                f"is not one of the {len(self.NAMES)} classes of {type(self).__name__}"
            )
        super().__init__(rows_of(split, len(pixels)), pixels, labels, transform, self.NAMES)
        self.key = digest(self.key, split)


class MNIST(IDX):
    """Handwritten digits, 28 x 28: 60,000 and 10,000 (LeCun et al., 1998)."""

    NAMES = {i: str(i) for i in range(10)}


class FashionMNIST(IDX):
    """Zalando's articles, 28 x 28: 60,000 and 10,000 (Xiao et al., *Fashion-MNIST*, 2017)."""

    NAMES = dict(
        enumerate(
            ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
        )
    )
