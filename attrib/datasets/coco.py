"""COCO: one sample for each category that an image shows."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from attrib.datasets.files import existing_folder, parse_box, shown, uids_of
from attrib.datasets.picture_files import PictureFiles, Regions, check_regions
from attrib.datasets.transform import Box, ImageTransform
from attrib.keys import digest
from attrib.types import SampleError, UserError


class COCO(PictureFiles):
    """``<split>/*.jpg`` and ``annotations/instances_<split>.json`` below ``root`` (Lin et al., ECCV 2014).

    A sample is an image and one category in it, ``000000000139/chair``. Its region is the union of the category's
    instances; those marked as a crowd are ignored, and a category with nothing else is no sample. The label is the
    position of the category's id among the sorted ids, 0 to 79.

    regions      "masks" (polygons and run lengths, by pycocotools) or "boxes"
    images       folder of the images; None: ``<split>`` below root
    annotations  None: as above

    An annotation that cannot be used costs its sample. Raises UserError if the file is damaged or has an image or a
    category twice, or if pycocotools is missing.
    """

    def __init__(
        self,
        root: str,
        transform: ImageTransform,
        split: str = "val2017",
        regions: Regions = "masks",
        images: str | None = None,
        annotations: str | None = None,
    ) -> None:
        check_regions(regions)
        if regions == "masks":
            _masks()
        top = existing_folder(root, "dataset.root")
        folder = existing_folder(images or top / split, "dataset.images")
        path = Path(annotations or top / "annotations" / f"instances_{split}.json").expanduser()
        tables = _read(path)
        self._regions = regions
        self._objects: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        self._sizes: dict[str, tuple[int, int]] = {}
        paths: dict[str, Path] = {}
        labels: dict[str, int] = {}
        problems: dict[str, str] = {}
        kinds = _by_id(tables, "categories", "name", path)
        pictures = _by_id(tables, "images", "file_name", path)
        ids = sorted(kinds, key=lambda number: (isinstance(number, str), number))
        label_of = {number: i for i, number in enumerate(ids)}
        names = {label_of[number]: shown(kind["name"]) for number, kind in kinds.items()}
        stems = {file: stem for stem, file in uids_of([picture["file_name"] for picture in pictures.values()]).items()}
        self._pictures: dict[str, str] = {}
        for number, found in enumerate(tables["annotations"]):
            where = f"{path}, annotation {found.get('id', number) if isinstance(found, dict) else number}"
            uid, stem = f"annotation-{number}", None
            try:
                picture = pictures[found["image_id"]]
                file = picture["file_name"]
                stem = stems[file]
                height, width = int(picture["height"]), int(picture["width"])
                if found.get("iscrowd"):
                    continue
                label = label_of[found["category_id"]]
            except (KeyError, TypeError, ValueError) as error:
                problems[uid] = f"{where}: has no usable {error}"
                self._pictures[uid] = stem or uid  # of which some class is then not known
                continue
            if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
                problems[uid] = f"{where}: file_name {file!r} leads out of the folder"
                continue
            uid = f"{stem}/{names[label]}"
            self._pictures[uid] = stem
            paths[uid], labels[uid], self._sizes[uid] = folder / file, label, (height, width)
            self._objects[uid].append({"where": where, **{k: found.get(k) for k in ("bbox", "segmentation")}})
        if not paths:
            raise UserError(f"dataset.annotations: {path} has no usable objects: {next(iter(problems.values()), '')}")
        super().__init__(paths, labels, transform, names, problems=problems)
        self.key = digest(self.key, split, regions)

    def picture_of(self, uid: str) -> str:
        return self._pictures.get(uid, uid)

    def boxes(self, uid: str) -> tuple[Box, ...]:
        self.check(uid)
        if self._regions == "masks":
            return ()
        found = []
        for item in self._objects[uid]:
            try:
                x, y, w, h = map(float, item["bbox"])
                found.append(parse_box([str(e) for e in (x, y, x + w, y + h)], item["where"]))
            except (TypeError, ValueError, UserError) as error:
                raise SampleError(f"{item['where']}: bbox cannot be used: {error}") from error
        return tuple(found)

    def region(self, uid: str) -> np.ndarray | None:
        self.check(uid)
        if self._regions == "boxes":
            return None
        height, width = self._sizes[uid]
        inside = np.zeros((height, width), dtype=bool)
        for item in self._objects[uid]:
            inside |= _decoded(item["segmentation"], height, width, item["where"])
        return inside

    def sources(self, uid: str) -> tuple[str, ...]:
        return self.files(uid)

    def described(self, uid: str) -> tuple[Any, ...]:
        objects = [{k: item[k] for k in ("bbox", "segmentation")} for item in self._objects.get(uid, ())]
        content = hashlib.sha256(json.dumps(objects).encode()).hexdigest()
        return uid, self.label(uid), self._regions, content, self._sizes.get(uid)


def _masks() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise UserError(
            "dataset.regions=masks of COCO needs pycocotools: pip install 'attrib[coco]' (boxes do without)"
        ) from error
    return mask


def _read(path: Path) -> Mapping[str, Any]:
    """An annotation file. Raises UserError."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"dataset.annotations: {path} cannot be read as JSON: {error}") from error
    wrong = [k for k in ("images", "annotations", "categories") if not isinstance(found, dict) or k not in found]
    if wrong or not all(isinstance(found[k], list) for k in ("images", "annotations", "categories")):
        raise UserError(f"dataset.annotations: {path} has no list {', '.join(wrong) or 'of objects'}")
    return found


def _by_id(tables: Mapping[str, Any], kind: str, name: str, path: Path) -> dict[int | str, Mapping[str, Any]]:
    """The entries of a list by their ids, each with a name. Raises UserError for two with the same id or name."""
    found: dict[int | str, Mapping[str, Any]] = {}
    for entry in tables[kind]:
        known = isinstance(entry, dict) and type(entry.get("id")) in (int, str) and isinstance(entry.get(name), str)
        if not known:
            raise UserError(f"dataset.annotations: {path}: one of the {kind} has no id or no {name}")
        if found.setdefault(entry["id"], entry) is not entry:
            raise UserError(f"dataset.annotations: {path}: two {kind} have the id {entry['id']}")
    twice = [text for text, n in Counter(entry[name] for entry in found.values()).items() if n > 1]
    if twice:
        raise UserError(f"dataset.annotations: {path}: two {kind} have the {name} {twice[0]!r}")
    return found


def _decoded(segmentation: Any, height: int, width: int, where: str) -> np.ndarray:
    """(h, w) bool. Raises SampleError. What goes to pycocotools, which is C, is checked first."""
    mask = _masks()
    try:
        if isinstance(segmentation, list):
            polygons = [np.asarray(polygon, dtype=np.float64) for polygon in segmentation]
            if not polygons or any(p.ndim != 1 or len(p) < 6 or len(p) % 2 for p in polygons):
                raise ValueError("a polygon needs at least three points")
            limit = 10 * max(height, width)
            if any(not np.isfinite(p).all() or np.abs(p).max() > limit for p in polygons):
                raise ValueError("a polygon lies outside its image")
            runs = mask.merge(mask.frPyObjects([p.tolist() for p in polygons], height, width))
        else:
            if [int(n) for n in segmentation["size"]] != [height, width]:
                raise ValueError(f"its size is {segmentation['size']}, not {[height, width]}")
            runs = dict(segmentation)
            if isinstance(runs["counts"], list):
                if min(runs["counts"], default=-1) < 0 or sum(runs["counts"]) != height * width:
                    raise ValueError("its run lengths do not fill the image")
                runs = mask.frPyObjects(runs, height, width)
        return mask.decode(runs).astype(bool)
    except Exception as error:  # whatever is in the file, and whatever pycocotools says of it
        raise SampleError(f"{where}: segmentation cannot be used: {error or type(error).__name__}") from error
