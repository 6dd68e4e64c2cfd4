"""Stanford Cars in the layout of its authors' archives."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

import numpy as np

from attrib.datasets.arrays import check_split
from attrib.datasets.files import InFiles, existing_folder, opened, parse_box
from attrib.datasets.images import ImageDataset
from attrib.datasets.transform import Box, ImageTransform
from attrib.keys import digest
from attrib.types import UserError

_EDGES = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


def _variable(path: Path, name: str) -> np.ndarray:
    """A variable of a MATLAB file, (N,). scipy builds arrays from it and runs nothing. Raises UserError."""
    import scipy.io

    try:
        found = scipy.io.loadmat(path, squeeze_me=True, variable_names=[name])
    except Exception as error:  # on damaged files scipy raises anything from TypeError to zlib.error
        raise UserError(f"dataset.root: {path} cannot be read as a MATLAB file: {error}") from error
    if name not in found:
        raise UserError(f"dataset.root: {path} holds no variable {name}")
    return np.atleast_1d(found[name])


def _whole(value: Any, where: str) -> int:
    """An integer, which MATLAB may store as any type of number. Raises UserError."""
    if isinstance(value, (int, float, np.integer, np.floating)) and float(value).is_integer():
        return int(value)
    raise UserError(f"{where} is {type(value).__name__}, not a whole number")


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return str(value)
    raise UserError(f"{where} is {type(value).__name__}, not a text")


class StanfordCars(InFiles, ImageDataset):
    """Images in ``cars_train/`` and ``cars_test/`` below ``root``, MATLAB tables in ``devkit/`` (Krause et al., 2013).

    cars_meta.mat holds the 196 classes, cars_train_annos.mat and cars_test_annos_withlabels.mat (in devkit/
    or in root) a box and a class for each image. The samples are what these tables list, whether the
    image is there or not.

    Raises UserError naming the file, and the row and field in it, that is missing or wrong.
    """

    def __init__(self, root: str, transform: ImageTransform, split: Literal["train", "test"] = "test") -> None:
        check_split(split, ("train", "test"))
        folder = existing_folder(root, "dataset.root")
        self._images = folder / f"cars_{split}"
        if not self._images.is_dir():
            raise UserError(f"dataset.root: there is no {self._images}; data/README.md shows the layout")
        meta = _file(folder, "cars_meta.mat")
        annotations = _file(folder, "cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat")
        names = [
            _text(name, f"dataset.root: {meta}, class {i}") for i, name in enumerate(_variable(meta, "class_names"), 1)
        ]
        self._files: dict[str, str] = {}
        self._labels: dict[str, int] = {}
        self._boxes: dict[str, Box] = {}
        table = _variable(annotations, "annotations")
        missing = [field for field in (*_EDGES, "class", "fname") if field not in (table.dtype.names or ())]
        if missing:
            raise UserError(f"dataset.root: {annotations}: annotations has no field {', '.join(missing)}")
        for number, row in enumerate(table, 1):
            where = f"dataset.root: {annotations}, row {number}"
            file, label = _text(row["fname"], f"{where}: fname"), _whole(row["class"], f"{where}: class")
            if PurePosixPath(file).name != file or "\\" in file:
                raise UserError(f"{where}: fname {file!r} is not the name of a file")
            if not 1 <= label <= len(names):
                raise UserError(f"{where}: class {label} is not one of the {len(names)} in {meta}")
            x1, y1, x2, y2 = (_whole(row[edge], f"{where}: {edge}") for edge in _EDGES)
            uid = f"{split}/{PurePosixPath(file).stem}"
            if uid in self._files:
                raise UserError(f"{where}: a second row for {file}")
            # The files count pixels from 1, and a box includes its last pixel.
            self._boxes[uid] = parse_box([str(x1 - 1), str(y1 - 1), str(x2), str(y2)], where)
            self._files[uid], self._labels[uid] = file, label - 1
        super().__init__(self._files, transform, dict(enumerate(names)), boxed=True)
        self.key = digest(self.key, split)

    def open(self, uid: str) -> BinaryIO:
        return opened(self._images / self._files[uid])

    def label(self, uid: str) -> int:
        return self._labels[uid]

    def boxes(self, uid: str) -> tuple[Box, ...]:
        return (self._boxes[uid],)

    def sources(self, uid: str) -> tuple[str, ...]:
        return (os.path.abspath(self._images / self._files[uid]),)

    def described(self, uid: str) -> tuple[Any, ...]:
        return self.label(uid), self.boxes(uid)

    def file(self, uid: str) -> str:
        return str(self._images / self._files[uid])


def _file(root: Path, name: str) -> Path:
    for path in (root / "devkit" / name, root / name):
        if path.is_file():
            return path
    raise UserError(f"dataset.root: there is no {root / 'devkit' / name}; data/README.md shows the layout")
