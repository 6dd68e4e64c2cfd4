"""ImageNet as Kaggle's *ImageNet Object Localization Challenge* has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from attrib.classes import imagenet_classes
from attrib.datasets.arrays import check_split
from attrib.datasets.files import existing_folder, image_files, parse_box, read_rows, shown, uids_of
from attrib.datasets.imagenet import Annotation, read_voc, scaled
from attrib.datasets.picture_files import PictureFiles
from attrib.datasets.transform import Box, ImageTransform
from attrib.keys import digest
from attrib.types import UserError


class KaggleImageNet(PictureFiles):
    """``ILSVRC/Data/CLS-LOC/<split>``, ``ILSVRC/Annotations/CLS-LOC/<split>`` and ``LOC_<split>_solution.csv``.

    root    the folder in which the archive was unpacked
    split   "val": all images in one folder; "train": a folder for each WordNet id

    Labels come from the solution (``ImageId,PredictionString``), those of "train" without one from the folders. Boxes
    of the label come from the annotation, or from the solution where there is none. An image without a row, with two
    that differ or with a wrong one has no label. Raises UserError if something is missing.
    """

    def __init__(self, root: str, transform: ImageTransform, split: Literal["val", "train"] = "val") -> None:
        check_split(split, ("val", "train"))
        top = existing_folder(root, "dataset.root")
        inside = top / "ILSVRC" if (top / "ILSVRC").is_dir() else top
        images = inside / "Data" / "CLS-LOC" / split
        if not images.is_dir():
            raise UserError(f"dataset.root: there is no {images}; root must be where Kaggle's archive was unpacked")
        self._annotations = inside / "Annotations" / "CLS-LOC" / split
        files = image_files(images)
        if not files:
            raise UserError(f"dataset.root: {images} holds no images")
        table = imagenet_classes()
        self._index = {wnid: i for i, (wnid, _) in table.items()}
        self._files = uids_of(files)
        self._wnids: dict[str, str] = {}
        self._from_table: dict[str, tuple[Box, ...]] = {}
        solution = next((p for p in (top, top.parent) if (p / f"LOC_{split}_solution.csv").is_file()), None)
        reasons: dict[str, str] = {}
        if solution is not None:
            reasons = self._read(solution / f"LOC_{split}_solution.csv")
        elif split == "train":
            self._wnids = {uid: file.partition("/")[0] for uid, file in self._files.items()}
            reasons = {
                uid: f"folder {shown(wnid)} is no WordNet id of ImageNet"
                for uid, wnid in self._wnids.items()
                if wnid not in self._index
            }
        else:
            raise UserError(f"dataset.root: there is no {top / 'LOC_val_solution.csv'}, which has the labels")
        super().__init__(
            {uid: images / file for uid, file in self._files.items()},
            {uid: self._index[wnid] for uid, wnid in self._wnids.items() if uid not in reasons},
            transform,
            {i: name for i, (_, name) in table.items()},
        )
        self.label_problems = reasons
        self.wnids = {i: wnid for i, (wnid, _) in table.items()}
        self.key = digest(self.key, split)

    def _read(self, path: Path) -> dict[str, str]:
        """Fills the labels and boxes; uid -> why it has none. Raises UserError if no image gets a label."""
        uid_of = {uid.rpartition("/")[2]: uid for uid in self._files}
        reasons: dict[str, str] = {}
        for where, row in read_rows(path, ("ImageId", "PredictionString"), "dataset.root"):
            uid = uid_of.get(row["ImageId"].strip())
            if uid is None:
                continue  # only a part of the images may be there
            try:
                wnid, boxes = self._solved(row["PredictionString"].split(), where)
            except UserError as error:
                reasons[uid] = str(error)
                continue
            if self._wnids.setdefault(uid, wnid) != wnid:
                reasons[uid] = f"{where}: a second row for {uid}, {wnid} after {self._wnids[uid]}"
            self._from_table[uid] = boxes
        for uid in self._files:
            if uid not in self._wnids:
                reasons.setdefault(uid, f"{path} has no row for it")
        if len(reasons) == len(self._files):
            raise UserError(f"dataset.root: {next(iter(reasons))}: {next(iter(reasons.values()))}")
        return reasons

    def _solved(self, words: list[str], where: str) -> tuple[str, tuple[Box, ...]]:
        if not words or len(words) % 5 or words[0] not in self._index:
            raise UserError(f"{where}: PredictionString is not a list of: wnid x1 y1 x2 y2")
        objects = [(words[i], parse_box(words[i + 1 : i + 5], where)) for i in range(0, len(words), 5)]
        return words[0], tuple(box for wnid, box in objects if wnid == words[0])

    def boxes(self, uid: str) -> tuple[Box, ...]:
        path = self._annotation(uid)
        if not path.exists():
            return self._from_table.get(uid, ())
        annotation: Annotation = read_voc(path)
        boxes = annotation.boxes.get(self._wnids.get(uid, ""), ())
        return scaled(boxes, annotation.size, self.size(uid)) if boxes else ()

    def _annotation(self, uid: str) -> Path:
        return (self._annotations / self._files[uid]).with_suffix(".xml")

    def sources(self, uid: str) -> tuple[str, ...]:
        return self.files(uid, self._annotation(uid))

    def described(self, uid: str) -> tuple[Any, ...]:
        return self.label(uid), self._wnids.get(uid), self._from_table.get(uid, ())
