"""A folder of images, sorted into one folder per class or flat, with optional CSV tables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from attrib.classes import Numbering
from attrib.datasets.files import (
    Classes,
    InFiles,
    class_folders,
    existing_folder,
    image_files,
    names_in_labels,
    opened,
    read_boxes,
    read_classes,
    read_labels,
    shown,
    uids_of,
)
from attrib.datasets.images import ImageDataset
from attrib.datasets.masks import MaskFolder, Values
from attrib.datasets.transform import Box, ImageTransform
from attrib.types import SampleError, UserError


class ImageFolder(InFiles, ImageDataset):
    """All images below ``root``.

    labels   CSV file,label (the path below root; a class index or a name in ``classes``), for every image; a row
             without its image is a sample that cannot be read
    boxes    CSV file,x1,y1,x2,y2 in pixels of the stored image; several rows per file, or none
    masks    instead of boxes, a folder with a PNG for every image that has a region; see ``MaskFolder``, also for
             ``mask_values`` and ``first_class``
    classes  class index, JSON {"0": ["n01440764", "tench"]} or CSV label,wnid,name
    units    a folder with a PNG for every image, of its size and at its path with the suffix .png: 8 or 16 bits,
             pixels of equal numbers are a unit (``attrib.units``), 0 is none

    Without ``labels`` the first folder below root is the class: its WordNet id or name in
    ``classes``, else its position among the sorted folder names. An image directly in root has no
    label (target -1). Without ``classes`` the class of the net that a folder's name, or a name in
    ``labels``, means is looked up when the samples meet the net (``numbering``).

    Raises UserError, naming field, file and line, if the folder is missing or without images, or a table is wrong.
    """

    def __init__(
        self,
        root: str,
        transform: ImageTransform,
        labels: str | None = None,
        boxes: str | None = None,
        classes: str | None = None,
        units: str | None = None,
        masks: str | None = None,
        mask_values: Values = "binary",
        first_class: int = 0,
    ) -> None:
        if masks and boxes:
            raise UserError("dataset.masks: give masks or dataset.boxes, not both: a sample has one region")
        self._root = existing_folder(root, "dataset.root")
        self._unit_root = existing_folder(units, "dataset.units") if units else None
        self._top = os.path.abspath(self._root)
        files = image_files(self._root)
        if not files:
            raise UserError(f"dataset.root: {self._root} holds no images")
        index = read_classes(classes) if classes else None
        problems: Mapping[str, str] = {}
        gone: Mapping[str, str] = {}
        numbering: Numbering = "given"
        by_file: Mapping[str, int]
        if labels:
            if index is None and (written := names_in_labels(labels)):
                index, numbering = written, "labels"
            by_file, problems, gone = read_labels(labels, files, index)
        else:
            if index is None:
                folders = class_folders(self._root)
                index, numbering = Classes(folders, {name: i for i, name in folders.items()}), "folders"
            by_file = {file: _class_of_folder(file, index, self._root) for file in files}
        self._files = uids_of(sorted({*files, *gone}))
        self._gone = {uid: gone[file] for uid, file in self._files.items() if file in gone}
        self._labels = {uid: by_file.get(file, -1) for uid, file in self._files.items()}
        boxes_by_file = read_boxes(boxes, files) if boxes else {}
        self._boxes = {uid: boxes_by_file.get(file, ()) for uid, file in self._files.items()}
        self._masks = MaskFolder(masks, files, mask_values, first_class) if masks else None
        names = {i: shown(name) for i, name in index.names.items()} if index else None
        super().__init__(self._files, transform, names, boxed=bool(boxes or masks))
        self.numbering, self.wnids = numbering, index.wnids if index else {}
        self.label_problems = {uid: problems[file] for uid, file in self._files.items() if file in problems}

    def open(self, uid: str) -> BinaryIO:
        if uid in self._gone:  # nor is it looked for: a table may name anything
            raise SampleError(self._gone[uid])
        return opened(self._root / self._files[uid])

    def sources(self, uid: str) -> tuple[str, ...]:
        file = self._files[uid]
        more = [self._masks.path(file)] if self._masks else []
        more += [self._unit_file(uid, self._unit_root)] if self._unit_root else []
        return (os.path.join(self._top, file), *map(os.path.abspath, more))

    def described(self, uid: str) -> tuple[Any, ...]:
        masks = (self._masks.described(),) if self._masks else ()
        return self.label(uid), self.boxes(uid), *masks

    def label(self, uid: str) -> int:
        return self._labels[uid]

    def boxes(self, uid: str) -> tuple[Box, ...]:
        return self._boxes[uid]

    def region(self, uid: str) -> np.ndarray | None:
        return self._masks.region(self._files[uid], self.label(uid)) if self._masks else None

    def units(self, uid: str) -> np.ndarray | None:
        if self._unit_root is None:
            return None
        file = self._unit_file(uid, self._unit_root)
        try:
            with opened(file) as stream, Image.open(stream) as image:
                found, size = np.asarray(image), image.size
        except (OSError, SyntaxError, ValueError) as error:
            raise SampleError(f"{file}: cannot be read as an image of units: {error}") from error
        if found.ndim != 2 or size != self.size(uid):
            raise SampleError(f"{file}: must be gray and of its image's size {self.size(uid)}, not {found.shape[::-1]}")
        return found

    def _unit_file(self, uid: str, root: Path) -> Path:
        return (root / self._files[uid]).with_suffix(".png")

    def file(self, uid: str) -> str:
        return shown(str(self._root / self._files[uid]))


def _class_of_folder(file: str, classes: Classes, root: Path) -> int:
    folder, slash, _ = file.partition("/")
    if not slash:
        return -1
    if folder not in classes.labels:
        raise UserError(f"dataset.classes: folder {root / folder} is not in the class index")
    return classes.labels[folder]
