"""STL-10 in the binary files of its authors, as torchvision leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from attrib.datasets.arrays import ArrayDataset, check_split, rows_of
from attrib.datasets.files import existing_folder
from attrib.datasets.transform import ImageTransform
from attrib.keys import digest
from attrib.types import UserError

_COUNT = {"train": 5_000, "test": 8_000}
_BYTES = 3 * 96 * 96


class STL10(ArrayDataset):
    """``{train,test}_{X,y}.bin`` and ``class_names.txt`` in ``root`` or ``root/stl10_binary`` (Coates et al., 2011).

    5,000 and 8,000 labelled images of 96 x 96 in ten classes; the unlabelled ones are not read. The pixels stay on
    disk until they are asked for.

    split  "test"; "val": a fixed tenth of the training images; "train": the other nine

    Raises UserError naming the file that is missing or damaged.
    """

    def __init__(self, root: str, transform: ImageTransform, split: Literal["train", "val", "test"] = "test") -> None:
        check_split(split)
        folder, part = existing_folder(root, "dataset.root"), "test" if split == "test" else "train"
        folder = folder / "stl10_binary" if (folder / "stl10_binary").is_dir() else folder
        count = _COUNT[part]
        pictures = _mapped(folder / f"{part}_X.bin", count * _BYTES).reshape(count, 3, 96, 96)
        labels = np.array(_mapped(folder / f"{part}_y.bin", count))
        if not (labels.min() >= 1 and labels.max() <= 10):
            wrong = int(np.argmax((labels < 1) | (labels > 10)))
            raise UserError(
                f"dataset.root: {folder / f'{part}_y.bin'}: label {labels[wrong]} of image {wrong}, not 1 to 10"
            )
        path = folder / "class_names.txt"
        try:
            names = path.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"dataset.root: {path} cannot be read: {error}") from error
        if len(names) != 10:
            raise UserError(f"dataset.root: {path} has {len(names)} class names, not 10")
        # A plane is stored column by column.
        pixels = pictures.transpose(0, 3, 2, 1)
        super().__init__(rows_of(split, count), pixels, labels - 1, transform, dict(enumerate(names)))
        self.key = digest(self.key, split)


def _mapped(path: Path, size: int) -> np.ndarray:
    """The bytes of a file of this size. Raises UserError."""
    try:
        there = path.stat().st_size
        if there != size:
            raise UserError(f"dataset.root: {path} has {there:,} bytes, not {size:,}: it is cut short, or another file")
        return np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise UserError(f"dataset.root: {path} cannot be read: {error.strerror or error}") from error
