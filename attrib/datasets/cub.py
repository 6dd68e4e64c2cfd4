"""CUB-200-2011: birds with boxes, segmentations and parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from attrib.datasets.arrays import check_split
from attrib.datasets.files import existing_folder, parse_box
from attrib.datasets.masks import gray
from attrib.datasets.picture_files import PictureFiles, check_regions
from attrib.datasets.transform import Box, ImageTransform
from attrib.keys import digest
from attrib.types import UserError, did_you_mean

_MAJORITY = 128  # a segmentation's gray value is 255 times the share of annotators who saw the bird there


class _Part(NamedTuple):
    number: int
    x: float
    y: float


class CUB200(PictureFiles):
    """The folder ``CUB_200_2011``: images/ and the tables beside it (Wah et al., 2011).

    split     "test" or "train", of train_test_split.txt
    regions   "boxes"; "masks": where more than half of the annotators saw the bird, ``segmentations/<class>/*.png``,
              an archive of its own; "parts": discs around the parts that are visible
    parts     names in parts/parts.txt; None takes all 15
    radius    of the discs, as a share of the longer side of the bird's box; .1 is the distance at which a predicted
              part counts as right (PCK; Yang & Ramanan, TPAMI 2013)

    A uid is the split and the image's path, ``test/001.Black_footed_Albatross/Black_Footed_Albatross_0046_18``. A row
    that is missing or wrong costs its image. Raises UserError naming a table that cannot be read.
    """

    def __init__(
        self,
        root: str,
        transform: ImageTransform,
        split: Literal["train", "test"] = "test",
        regions: Literal["boxes", "masks", "parts"] = "boxes",
        parts: Sequence[str] | None = None,
        radius: float = 0.1,
    ) -> None:
        check_split(split, ("train", "test"))
        check_regions(regions, ("boxes", "masks", "parts"))
        if not 0 < radius <= 1:
            raise UserError(f"dataset.radius must be in (0, 1], not {radius}")
        top = existing_folder(root, "dataset.root")
        top = top / "CUB_200_2011" if (top / "CUB_200_2011" / "images.txt").is_file() else top
        self._regions, self._radius = regions, radius
        self._masks = top / "segmentations"
        if regions == "masks" and not self._masks.is_dir():
            self._masks = top.parent / "segmentations"  # where the archive of CUB's page is unpacked beside the other
            if not self._masks.is_dir():
                raise UserError(f"dataset.root: there is no {top / 'segmentations'}; it is an archive of its own")
        kinds = _table(top / "classes.txt", 1)
        labels, boxes = _table(top / "image_class_labels.txt", 1), _table(top / "bounding_boxes.txt", 4)
        chosen = _table(top / "train_test_split.txt", 1)
        wanted = self._wanted(top, parts) if regions == "parts" else set()
        places = _places(top / "parts" / "part_locs.txt", wanted) if regions == "parts" else {}
        paths: dict[str, Path] = {}
        known: dict[str, int] = {}
        problems: dict[str, str] = {}
        self._boxes: dict[str, Box] = {}
        self._parts: dict[str, tuple[_Part, ...]] = {}
        for number, (file,) in _table(top / "images.txt", 1).items():
            if chosen.get(number, ["0"])[0] != ("1" if split == "train" else "0"):
                continue
            uid, where = f"{split}/{file.rpartition('.')[0]}", f"dataset.root: {top}, image {number} ({file})"
            try:
                known[uid] = self._label(labels, kinds, number, where)
                if number not in boxes or number not in chosen:
                    raise UserError(f"{where} has no row in bounding_boxes.txt or train_test_split.txt")
                x, y, w, h = map(float, boxes[number])
                self._boxes[uid] = parse_box([str(e) for e in (x, y, x + w, y + h)], where)
            except (UserError, ValueError) as error:
                problems[uid] = str(error)
                continue
            paths[uid], self._parts[uid] = top / "images" / file, tuple(places.get(number, ()))
        if not paths:
            raise UserError(f"dataset.root: {top} has no usable image of dataset.split={split}")
        names = {int(number) - 1: name for number, (name,) in kinds.items()}
        super().__init__(paths, known, transform, names, problems=problems)
        self.key = digest(self.key, split, regions, *((sorted(wanted), radius) if wanted else ()))

    @staticmethod
    def _wanted(top: Path, parts: Sequence[str] | None) -> set[int]:
        names = {" ".join(words): int(n) for n, words in _table(top / "parts" / "parts.txt", None).items()}
        unknown = [part for part in parts or () if part not in names]
        if unknown:
            raise UserError(
                f"dataset.parts: no part {unknown[0]!r}{did_you_mean(unknown[0], names)} ({', '.join(names)})"
            )
        return {names[part] for part in (names if parts is None else parts)}

    @staticmethod
    def _label(labels: dict[str, list[str]], kinds: dict[str, list[str]], number: str, where: str) -> int:
        if number not in labels:
            raise UserError(f"{where} has no row in image_class_labels.txt")
        if labels[number][0] not in kinds:
            raise UserError(f"{where}: class {labels[number][0]} is not in classes.txt")
        return int(labels[number][0]) - 1

    def boxes(self, uid: str) -> tuple[Box, ...]:
        self.check(uid)
        return (self._boxes[uid],) if self._regions == "boxes" else ()

    def region(self, uid: str) -> np.ndarray | None:
        self.check(uid)
        if self._regions == "boxes":
            return None
        if self._regions == "masks":
            return gray(self._mask(uid)) >= _MAJORITY
        width, height = self.size(uid)
        inside = np.zeros((height, width), dtype=bool)
        box = self._boxes[uid]
        radius = self._radius * max(box.x2 - box.x1, box.y2 - box.y1)
        y, x = np.ogrid[:height, :width]
        for part in self._parts[uid]:
            inside |= (x + 0.5 - part.x) ** 2 + (y + 0.5 - part.y) ** 2 <= radius**2
        return inside

    def _mask(self, uid: str) -> Path:
        return self._masks / f"{uid.partition('/')[2]}.png"

    def sources(self, uid: str) -> tuple[str, ...]:
        return self.files(uid, *([self._mask(uid)] if self._regions == "masks" else []))

    def described(self, uid: str) -> tuple[Any, ...]:
        more = (self._parts.get(uid), self._radius) if self._regions == "parts" else ()
        return uid, self.label(uid), self._regions, self._boxes.get(uid), *more


def _rows(path: Path) -> Iterator[list[str]]:
    """The words of each line that is not blank. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"dataset.root: {path} cannot be read: {error}") from error
    yield from (line.split() for line in lines if line.strip())


def _table(path: Path, words: int | None) -> dict[str, list[str]]:
    """First word -> the others of each line, of which there are ``words``. Raises UserError naming file and row."""
    found: dict[str, list[str]] = {}
    for first, *others in _rows(path):
        if not first.isdecimal() or (words is not None and len(others) != words):
            raise UserError(f"dataset.root: {path}: the row {' '.join((first, *others))!r} is not one of this table")
        if found.setdefault(first, others) != others:
            raise UserError(f"dataset.root: {path} has two rows for {first}")
    return found


def _places(path: Path, wanted: set[int]) -> dict[str, list[_Part]]:
    """Image -> its visible parts. Raises UserError naming file and row."""
    found: dict[str, list[_Part]] = {}
    for words in _rows(path):
        try:
            image, part, x, y, visible = words
            if int(visible) and int(part) in wanted:
                found.setdefault(image, []).append(_Part(int(part), float(x), float(y)))
        except ValueError as error:
            raise UserError(
                f"dataset.root: {path}: the row {' '.join(words)!r} is not one of parts: {error}"
            ) from error
    return found
