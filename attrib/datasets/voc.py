"""PASCAL VOC: one sample for each class that an image shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from attrib.datasets.files import existing_folder, read_classes
from attrib.datasets.imagenet import read_voc
from attrib.datasets.masks import gray
from attrib.datasets.picture_files import PictureFiles, Regions, check_regions
from attrib.datasets.transform import Box, ImageTransform
from attrib.keys import digest
from attrib.types import SampleError, UserError

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class PascalVOC(PictureFiles):
    """``{JPEGImages,Annotations,ImageSets,SegmentationClass}`` below ``root`` (Everingham et al., 2010).

    A sample is an image and one class in it, ``2007_000033/aeroplane``: the class is its label, and its region is all
    that shows the class. ``root`` may also be the folder in which torchvision leaves ``VOCdevkit/VOC<year>``.

    split      a list in ImageSets/Segmentation (masks) or ImageSets/Main (boxes)
    regions    "masks": pixels of SegmentationClass whose number is the class's position + 1; the border that belongs to
               nothing (255) is outside. "boxes": of the annotations, whose pixels count from 1
    difficult  whether boxes of objects marked as difficult count; an image's class with nothing else is no sample
    classes    class index, for other sets in this layout; the names in it are those of the annotations

    An annotation that cannot be read costs that image. Raises UserError naming what is missing.
    """

    def __init__(
        self,
        root: str,
        transform: ImageTransform,
        split: str = "val",
        regions: Regions = "masks",
        difficult: bool = False,
        classes: str | None = None,
    ) -> None:
        check_regions(regions)
        self._top, self._regions = voc_folder(root), regions
        names = dict(read_classes(classes).names) if classes else dict(enumerate(CLASSES))
        index = {name: i for i, name in names.items()}
        paths: dict[str, Path] = {}
        labels: dict[str, int] = {}
        problems: dict[str, str] = {}
        self._boxes: dict[str, tuple[Box, ...]] = {}
        for name in _listed(self._top / "ImageSets" / ("Segmentation" if regions == "masks" else "Main"), split):
            annotation = self._top / "Annotations" / f"{name}.xml"
            try:
                boxes = read_voc(annotation, first=1, difficult=difficult or regions == "masks").boxes
            except SampleError as error:
                problems[name] = str(error)
                continue
            for kind in boxes:
                uid = f"{name}/{kind}"
                if kind not in index:
                    problems[uid] = f"{annotation}: class {kind!r} is not one of the {len(index)} known"
                    continue
                paths[uid] = self._top / "JPEGImages" / f"{name}.jpg"
                labels[uid], self._boxes[uid] = index[kind], boxes[kind]
        if not paths:
            raise UserError(f"dataset.root: {self._top} shows none of the classes: {next(iter(problems.values()), '')}")
        super().__init__(paths, labels, transform, names, problems=problems)
        self.key = digest(self.key, split, regions, difficult)

    def boxes(self, uid: str) -> tuple[Box, ...]:
        self.check(uid)
        return self._boxes[uid] if self._regions == "boxes" else ()

    def region(self, uid: str) -> np.ndarray | None:
        self.check(uid)
        return None if self._regions == "boxes" else gray(self._mask(uid)) == self.label(uid) + 1

    def _mask(self, uid: str) -> Path:
        return self._top / "SegmentationClass" / f"{self.picture_of(uid)}.png"

    def picture_of(self, uid: str) -> str:
        return uid.partition("/")[0]

    def sources(self, uid: str) -> tuple[str, ...]:
        return self.files(uid, *([self._mask(uid)] if self._regions == "masks" else []))

    def described(self, uid: str) -> tuple[Any, ...]:
        return uid, self.label(uid), self._regions, self._boxes.get(uid, ())


def voc_folder(root: str) -> Path:
    """The folder with JPEGImages. Raises UserError if there is none, or more than one."""
    top = existing_folder(root, "dataset.root")
    found = [top, *sorted(top.glob("VOCdevkit/VOC*")), *sorted(top.glob("VOC[0-9]*"))]
    found = [folder for folder in found if (folder / "JPEGImages").is_dir() and (folder / "ImageSets").is_dir()]
    if len(found) != 1:
        what = f"holds {', '.join(f.name for f in found)}; name one" if found else "has no JPEGImages and ImageSets"
        raise UserError(f"dataset.root: {top} {what} (docs/how-to/add-a-dataset.md)")
    return found[0]


def _listed(folder: Path, split: str) -> list[str]:
    """The images that a list names. Raises UserError."""
    path = folder / f"{split}.txt"
    try:
        names = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        there = ", ".join(sorted(p.stem for p in folder.glob("*.txt") if "_" not in p.stem)) or "none"
        raise UserError(f"dataset.split: {path} cannot be read ({error}); lists there: {there}") from error
    wrong = [name for name in names if not re.fullmatch(r"[\w.-]+", name) or set(name) <= {"."}]
    if wrong:
        raise UserError(f"dataset.split: {path}: {wrong[0]!r} is not the name of an image")
    return list(dict.fromkeys(names))
