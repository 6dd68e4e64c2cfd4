"""Several labels a sample: one for each class that an image shows."""

from __future__ import annotations

import os
from typing import Any, BinaryIO

import numpy as np

from attrib.datasets.files import InFiles
from attrib.datasets.images import ImageDataset
from attrib.datasets.picture_files import PictureFiles
from attrib.datasets.transform import Box
from attrib.keys import digest
from attrib.types import SampleError, UserError


class AllClasses(InFiles, ImageDataset):
    """The images of VOC or COCO, each once, with all classes in it as its labels and all that shows them as its region.

    each   the set with a sample for each class in an image (``PascalVOC``, ``COCO``)

    ``Batch.target`` is (B, K), 1 for the classes that the image shows, else 0; K classes in the order of ``each``.
    An image costs a failure if one of its annotations cannot be used, because its labels are then not known.
    """

    def __init__(self, each: PictureFiles) -> None:
        if not isinstance(each, PictureFiles):
            raise UserError(f"dataset.each must be a set of images with their classes, not {type(each).__name__}")
        self._each = each
        self._parts: dict[str, list[str]] = {}
        for uid in each.uids:
            self._parts.setdefault(each.picture_of(uid), []).append(uid)
        super().__init__(self._parts, each.transform, each.names, boxed=True)
        self.key = digest(self.key, each.key)

    def _of(self, uid: str) -> list[str]:
        """The samples of ``each`` that are of this image. Raises SampleError if one cannot be used."""
        for part in self._parts[uid]:
            self._each.check(part)
        return self._parts[uid]

    def open(self, uid: str) -> BinaryIO:
        return self._each.open(self._of(uid)[0])

    def label(self, uid: str) -> tuple[int, ...]:  # type: ignore[override]  # several
        """(K,) 1 or 0 for each class."""
        there = {self._each.label(part) for part in self._parts[uid]}
        return tuple(int(i in there) for i in range(max(self.names) + 1))

    def boxes(self, uid: str) -> tuple[Box, ...]:
        return tuple(box for part in self._of(uid) for box in self._each.boxes(part))

    def region(self, uid: str) -> np.ndarray | None:
        found = [region for part in self._of(uid) if (region := self._each.region(part)) is not None]
        if len({region.shape for region in found}) > 1:
            raise SampleError(f"{self.file(uid)}: the masks of its classes are not of one size")
        return np.logical_or.reduce(found) if found else None

    def sources(self, uid: str) -> tuple[str, ...]:
        files = (file for part in self._parts[uid] for file in self._each.sources(part))
        return tuple(dict.fromkeys(map(os.path.abspath, files)))

    def described(self, uid: str) -> tuple[Any, ...]:
        return tuple(self._each.described(part) for part in self._parts[uid])

    def file(self, uid: str) -> str:
        return self._each.file(self._parts[uid][0])
