"""CIFAR-10 and CIFAR-100, in the binary or the Python version of their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from attrib.datasets.arrays import ArrayDataset, check_split, rows_of
from attrib.datasets.cifar_pickle import read_pickle
from attrib.datasets.files import existing_folder
from attrib.datasets.transform import ImageTransform
from attrib.keys import digest
from attrib.types import UserError

_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_PIXELS = 3 * 32 * 32  # the red, green and blue plane

Split = Literal["train", "val", "test"]


def _records(path: Path, count: int, classes: Sequence[int], what: str) -> np.ndarray:
    """(count, labels + 3072) uint8 of a binary file; ``classes``: how many each label has. Raises UserError."""
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f"dataset.root: {path} cannot be read: {error.strerror or error}") from error
    whole = count * (len(classes) + _PIXELS)
    if content.size != whole:
        raise UserError(
            f"dataset.root: {path} has {content.size:,} bytes, not {whole:,}: "
            f"it is cut short, or not a file of {what}'s binary version"
        )
    records = content.reshape(count, -1)
    for column, known in enumerate(classes):
        labels = records[:, column]
        if labels.max() >= known:
            raise UserError(
                f"dataset.root: {path}: record {labels.argmax()} has the label {labels.max()}, not 0 to {known - 1}"
            )
    return records


def _unpickled(path: Path, count: int, fields: dict[str, int]) -> tuple[np.ndarray, list[np.ndarray]]:
    """(count, 3072) pixels and the labels of a file of the Python version; ``fields``: how many classes each has."""
    found = read_pickle(path)
    pixels = found.get("data")
    if not isinstance(pixels, np.ndarray) or pixels.shape != (count, _PIXELS):
        shape = pixels.shape if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise UserError(f"dataset.root: {path}: data is {shape}, not {(count, _PIXELS)}")
    return pixels, [_labels(found.get(field), count, known, f"{path}: {field}") for field, known in fields.items()]


def _labels(given: Any, count: int, known: int, where: str) -> np.ndarray:
    good = isinstance(given, list) and len(given) == count and all(type(n) is int and 0 <= n < known for n in given)
    if not good:
        raise UserError(f"dataset.root: {where}: not {count:,} whole numbers from 0 to {known - 1}")
    return np.array(given, np.uint8)


def _names(path: Path, count: int) -> list[str]:
    try:
        names = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"dataset.root: {path} cannot be read: {error}") from error
    return _checked(names, count, path)


def _checked(names: Any, count: int, path: Path) -> list[str]:
    if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
        there = len(names) if isinstance(names, list) else "no"
        raise UserError(f"dataset.root: {path} has {there} class names, not {count}")
    return names


def _folder(root: str, stem: str, files: Sequence[str]) -> tuple[Path, bool]:
    """The folder with the files, and whether they are binary. Raises UserError naming the first that is missing."""
    top = existing_folder(root, "dataset.root")
    places = [(folder, binary) for binary in (True, False) for folder in (top, top / f"{stem}-{_KIND[stem][binary]}")]
    for folder, binary in places:
        if all((folder / _named(name, binary)).is_file() for name in files):
            return folder, binary
    binary = not any((folder / name).exists() for folder, _ in places for name in files)
    missing = next(name for name in files if not (top / _named(name, binary)).is_file())
    raise UserError(f"dataset.root: {top} has no {_named(missing, binary)}; data/README.md says where to get it")


_KIND = {"cifar-10": {True: "batches-bin", False: "batches-py"}, "cifar-100": {True: "binary", False: "python"}}


def _named(name: str, binary: bool) -> str:
    return f"{name}.bin" if binary else name


def _images(pixels: np.ndarray) -> np.ndarray:
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


class CIFAR10(ArrayDataset):
    """50,000 and 10,000 images of 32 x 32 (Krizhevsky, 2009): ``cifar-10-batches-bin``, or ``cifar-10-batches-py`` as
    torchvision leaves it, or the folder above. Samples and keys are the same.

    split  "test": test_batch; "val": a fixed tenth of data_batch_{1..5}; "train": the other nine

    The Python version is pickled; ``cifar_pickle`` reads it without running anything. Raises UserError naming the file
    that is missing or damaged, or a pickle that holds anything else.
    """

    def __init__(self, root: str, transform: ImageTransform, split: Split = "test") -> None:
        check_split(split)
        files = ("test_batch",) if split == "test" else _TRAIN
        folder, binary = _folder(root, "cifar-10", files)
        if binary:
            names = _names(folder / "batches.meta.txt", 10)
            records = np.concatenate([_records(folder / f"{f}.bin", 10_000, (10,), "CIFAR-10") for f in files])
            pixels, labels = records[:, 1:], records[:, 0]
        else:
            names = _checked(read_pickle(folder / "batches.meta").get("label_names"), 10, folder / "batches.meta")
            parts = [_unpickled(folder / f, 10_000, {"labels": 10}) for f in files]
            pixels, labels = np.concatenate([p for p, _ in parts]), np.concatenate([found[0] for _, found in parts])
        super().__init__(rows_of(split, len(pixels)), _images(pixels), labels, transform, dict(enumerate(names)))
        self.key = digest(self.key, split)


class CIFAR100(ArrayDataset):
    """50,000 and 10,000 images of 32 x 32 (Krizhevsky, 2009): ``cifar-100-binary``, or ``cifar-100-python`` as
    torchvision leaves it, or the folder above.

    split   as of CIFAR-10, from test and train
    labels  "fine": 100 classes; "coarse": 20 superclasses

    Raises UserError like ``CIFAR10``.
    """

    def __init__(
        self,
        root: str,
        transform: ImageTransform,
        split: Split = "test",
        labels: Literal["fine", "coarse"] = "fine",
    ) -> None:
        check_split(split)
        if labels not in ("fine", "coarse"):
            raise UserError(f"dataset.labels must be fine or coarse, not {labels!r}")
        classes = 100 if labels == "fine" else 20
        file, count = ("test", 10_000) if split == "test" else ("train", 50_000)
        folder, binary = _folder(root, "cifar-100", (file,))
        if binary:
            names = _names(folder / f"{labels}_label_names.txt", classes)
            records = _records(folder / f"{file}.bin", count, (20, 100), "CIFAR-100")
            pixels, chosen = records[:, 2:], records[:, 1 if labels == "fine" else 0]
        else:
            meta = folder / "meta"
            names = _checked(read_pickle(meta).get(f"{labels}_label_names"), classes, meta)
            pixels, (chosen,) = _unpickled(folder / file, count, {f"{labels}_labels": classes})
        super().__init__(rows_of(split, count), _images(pixels), chosen, transform, dict(enumerate(names)))
        self.key = digest(self.key, split, labels)
