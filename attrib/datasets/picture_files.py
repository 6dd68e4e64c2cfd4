"""Images in files of their own, of which the set's tables say more than their place does."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, Literal

from attrib.datasets.files import InFiles, opened, shown
from attrib.datasets.images import ImageDataset
from attrib.datasets.transform import ImageTransform
from attrib.types import SampleError, UserError

Regions = Literal["masks", "boxes"]


def check_regions(regions: str, known: Iterable[str] = ("masks", "boxes")) -> None:
    if regions not in known:
        raise UserError(f"dataset.regions must be {' or '.join(known)}, not {regions!r}")


class PictureFiles(InFiles, ImageDataset):
    """A subclass calls the constructor last, and says what ``sources`` and ``described`` are.

    paths     uid -> image; several uids may have the same one
    labels    uid -> class index
    problems  uid -> why a sample that the tables name cannot be used; it fails, and the others go on
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        labels: Mapping[str, int],
        transform: ImageTransform,
        names: Mapping[int, str],
        *,
        problems: Mapping[str, str] | None = None,
        boxed: bool = True,
    ) -> None:
        self._paths, self._labels, self._problems = paths, labels, dict(problems or {})
        super().__init__((*paths, *self._problems), transform, names, boxed=boxed)

    def check(self, uid: str) -> None:
        """Raises SampleError for a sample that cannot be used."""
        if uid in self._problems:
            raise SampleError(self._problems[uid])

    def path(self, uid: str) -> Path:
        self.check(uid)
        return self._paths[uid]

    def picture_of(self, uid: str) -> str:
        """What the image is called that the sample is of; samples of one image have one name."""
        return uid

    def files(self, uid: str, *more: Path) -> tuple[str, ...]:
        """What ``sources`` says of the image and ``more``."""
        return () if uid in self._problems else tuple(map(os.path.abspath, (self.path(uid), *more)))

    def open(self, uid: str) -> BinaryIO:
        return opened(self.path(uid))

    def label(self, uid: str) -> int:
        return self._labels.get(uid, -1)

    def file(self, uid: str) -> str:
        return shown(str(self._paths.get(uid, uid)))
