"""CIFAR-10 in the binary version of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from attrib.datasets.arrays import ArrayDataset, check_split, rows_of
from attrib.datasets.files import existing_folder
from attrib.datasets.transform import ImageTransform
from attrib.keys import digest
from attrib.types import UserError

_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
_RECORDS, _BYTES = 10_000, 1 + 3 * 32 * 32  # of a file; of a record: the label, then the red, green and blue plane


def _read(path: Path, classes: int) -> np.ndarray:
    """(10000, 3073) uint8. Raises UserError naming the file."""
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f"dataset.root: {path} cannot be read: {error.strerror or error}") from error
    if content.size != _RECORDS * _BYTES:
        raise UserError(
            f"dataset.root: {path} has {content.size:,} bytes, not {_RECORDS * _BYTES:,}: "
            "it is cut short, or not a file of CIFAR-10's binary version"
        )
    records = content.reshape(_RECORDS, _BYTES)
    labels = records[:, 0]
    if labels.max() >= classes:
        raise UserError(f"dataset.root: {path}: record {labels.argmax()} has the label {labels.max()}, not 0 to 9")
    return records


def _names(path: Path) -> list[str]:
    try:
        names = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"dataset.root: {path} cannot be read: {error}") from error
    if len(names) != 10:
        raise UserError(f"dataset.root: {path} has {len(names)} class names, not 10")
    return names


class CIFAR10(ArrayDataset):
    """The folder ``cifar-10-batches-bin``: 50,000 and 10,000 images of 32 x 32 (Krizhevsky, 2009).

    split  "test": test_batch.bin; "val": a fixed tenth of data_batch_{1..5}.bin; "train": the other nine

    Raises UserError naming the file that is missing, damaged or of the pickled Python version, which is never
    read: unpickling can run code.
    """

    def __init__(self, root: str, transform: ImageTransform, split: Literal["train", "val", "test"] = "test") -> None:
        check_split(split)
        folder = existing_folder(root, "dataset.root")
        files = ("test_batch.bin",) if split == "test" else _TRAIN
        missing = [name for name in files if not (folder / name).is_file()]
        if missing and (folder / missing[0]).with_suffix("").exists():
            raise UserError(
                f"dataset.root: {folder} holds the Python version of CIFAR-10. Its files are pickles, which can run "
                "code, and are not read; get the binary version, cifar-10-binary.tar.gz (data/README.md)"
            )
        if missing:
            raise UserError(f"dataset.root: {folder} has no {missing[0]}; data/README.md says where to get it")
        names = _names(folder / "batches.meta.txt")
        records = np.concatenate([_read(folder / name, len(names)) for name in files])
        pixels = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        super().__init__(rows_of(split, len(records)), pixels, records[:, 0], transform, dict(enumerate(names)))
        self.key = digest(self.key, split)
