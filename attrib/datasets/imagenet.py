"""ImageNet in the folder layout of the InputIBA code (Zhang et al., 2021); ``attrib prepare-imagenet`` makes it."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from attrib.datasets.files import (
    InFiles,
    existing_folder,
    image_files,
    opened,
    parse_box,
    read_classes,
    shown,
    uids_of,
)
from attrib.datasets.images import ImageDataset
from attrib.datasets.transform import Box, ImageTransform
from attrib.keys import digest
from attrib.store.reading import content
from attrib.types import SampleError, UserError

LARGEST = 16 * 2**20  # bytes of an annotation; a hundred thousand boxes


class _NoDoctype(ET.TreeBuilder):
    """Annotations need no DOCTYPE, and without one there are no entities that could expand without end."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("has a DOCTYPE, which is refused")


@dataclass(frozen=True)
class Annotation:
    """Boxes per object name, and the (width, height) that they refer to, None if not stated."""

    boxes: Mapping[str, tuple[Box, ...]]
    size: tuple[float, float] | None


def read_voc(path: Path, first: int = 0, difficult: bool = True) -> Annotation:
    """A PASCAL VOC annotation; ``difficult``: also of objects that are marked so.

    first   number of the first pixel. With 0 the coordinates are taken as edges of pixels, as InputIBA does of
            ImageNet's; with 1 they are pixels that belong to the box, as VOC's own code has it

    Raises SampleError naming the file if it is not one, or if a box is inverted or empty.
    """
    boxes: dict[str, list[Box]] = {}
    try:
        tree = ET.fromstring(content(path, LARGEST), ET.XMLParser(target=_NoDoctype()))
        for item in tree.iter("object"):
            if not difficult and (item.findtext("difficult") or "0").strip() == "1":
                continue
            name = (item.findtext("name") or "").strip()
            edges = [item.findtext(f"bndbox/{tag}") or "" for tag in ("xmin", "ymin", "xmax", "ymax")]
            if first:
                edges[:2] = (str(float(edge) - first) for edge in edges[:2])
            boxes.setdefault(name, []).append(parse_box(edges, str(path)))
        width, height = (float(tree.findtext(f"size/{tag}") or 0) for tag in ("width", "height"))
    except UserError as error:  # one bad annotation concerns one sample
        raise SampleError(str(error)) from error
    except (OSError, ET.ParseError, ValueError, LookupError) as error:
        raise SampleError(f"{path}: cannot be read as a VOC annotation: {error}") from error
    return Annotation(
        {name: tuple(found) for name, found in boxes.items()}, (width, height) if width > 0 and height > 0 else None
    )


def scaled(boxes: tuple[Box, ...], stated: tuple[float, float] | None, actual: tuple[float, float]) -> tuple[Box, ...]:
    """Boxes of an image whose annotation states another (width, height)."""
    if stated is None:
        return boxes
    sx, sy = (size / other for size, other in zip(actual, stated, strict=True))
    return tuple(Box(b.x1 * sx, b.y1 * sy, b.x2 * sx, b.y2 * sy) for b in boxes)


class ImageNet(InFiles, ImageDataset):
    """``images/<split>/<wnid>/*.JPEG`` below ``root``, with ``imagenet_class_index.json``.

    Boxes come from ``annotations/<split>/<wnid>/*.xml`` or ``annotations/<split>/*.xml``, where there
    are any: those whose object is the image's WordNet id, scaled if the annotation states another image size.

    split    "attribution": the images to explain; "estimation": those that feature statistics are taken from
    classes  another class index: JSON, or CSV label,wnid,name

    Raises UserError if a folder or the class index is missing, or a folder is not in the class index.
    """

    def __init__(self, root: str, transform: ImageTransform, split: str = "attribution", classes: str | None = None):
        top = existing_folder(root, "dataset.root")
        self._images, self._annotations = top / "images" / split, top / "annotations" / split
        if not self._images.is_dir():
            raise UserError(f"dataset.root: there is no {self._images}; attrib prepare-imagenet makes it")
        files = image_files(self._images)
        if not files:
            raise UserError(f"dataset.root: {self._images} holds no images")
        index = read_classes(classes or top / "imagenet_class_index.json")
        for file in files:
            wnid, slash, _ = file.partition("/")
            if not slash:
                raise UserError(f"dataset.root: {self._images / file} should lie in a folder named by its WordNet id")
            if wnid not in index.labels:
                raise UserError(f"dataset.classes: folder {self._images / wnid} is not in the class index")
        self._files, self._labels = uids_of(files), index.labels
        super().__init__(self._files, transform, index.names, boxed=self._annotations.is_dir())
        self.wnids = index.wnids
        self.key = digest(self.key, split)

    def _wnid(self, uid: str) -> str:
        return self._files[uid].partition("/")[0]

    def open(self, uid: str) -> BinaryIO:
        return opened(self._images / self._files[uid])

    def label(self, uid: str) -> int:
        return self._labels[self._wnid(uid)]

    def boxes(self, uid: str) -> tuple[Box, ...]:
        for path in self._annotation_files(uid):
            if path.exists():
                return self._scaled(read_voc(path), uid)
        return ()

    def _annotation_files(self, uid: str) -> tuple[Path, Path]:
        """Where they may lie; the first that exists counts."""
        file = Path(self._files[uid]).with_suffix(".xml")
        return self._annotations / file, self._annotations / file.name

    def sources(self, uid: str) -> tuple[str, ...]:
        files = self._images / self._files[uid], *self._annotation_files(uid)
        return tuple(map(os.path.abspath, files))

    def described(self, uid: str) -> tuple[Any, ...]:
        return self.label(uid), self._wnid(uid)

    def _scaled(self, annotation: Annotation, uid: str) -> tuple[Box, ...]:
        boxes = annotation.boxes.get(self._wnid(uid), ())
        return scaled(boxes, annotation.size, self.size(uid)) if boxes and annotation.size else boxes

    def file(self, uid: str) -> str:
        return shown(str(self._images / self._files[uid]))
