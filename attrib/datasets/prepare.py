"""Small ImageNet sets from the full ILSVRC 2012 validation set, in the layout that ``ImageNet`` reads.

Every name that comes from a file (an image id in a CSV, a folder, the plan of an earlier run) is
checked against a strict pattern before it becomes part of a path.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from attrib.classes import imagenet_classes
from attrib.datasets.files import existing_folder, image_files, parse_box, read_class_table, read_rows
from attrib.datasets.transform import Box
from attrib.keys import stable_hash
from attrib.store.files import write_atomic, write_json
from attrib.types import UserError

SPLITS = ("attribution", "estimation")
_WNID = re.compile(r"n\d{8}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_PLACE = re.compile(rf"({'|'.join(SPLITS)})/{_WNID.pattern}/{_NAME.pattern}")
_PLAN = "prepared.json"


@dataclass(frozen=True)
class Source:
    """One image of the full set, and its annotation: a VOC file, or boxes, or nothing."""

    image: Path
    wnid: str
    annotation: Path | None = None
    boxes: tuple[Box, ...] = ()

    @property
    def annotated(self) -> bool:
        return self.annotation is not None or bool(self.boxes)

    @property
    def place(self) -> str:
        """Path below ``images/<split>``."""
        return f"{self.wnid}/{self.image.name}"


@dataclass(frozen=True)
class Report:
    """What a run found and did."""

    sources: int
    classes: int
    written: int
    present: int
    removed: int

    def __str__(self) -> str:
        return (
            f"{self.sources} images of {self.classes} classes found; "
            f"{self.written} files written, {self.present} present already, {self.removed} removed"
        )


# Reading the full set ---------------------------------------------------------------------------


def _safe(name: str, pattern: re.Pattern[str], where: str) -> str:
    if not pattern.fullmatch(name):
        raise UserError(f"{where}: {name!r} is not a name that this tool accepts")
    return name


def _number(stem: str) -> int:
    """The N of ILSVRC2012_val_N: line N of the ground truth belongs to it, whichever images are missing."""
    match = re.fullmatch(r"ILSVRC2012_val_(\d{8})", stem)
    if match is None:
        raise UserError(f"{stem}: with a ground truth file, images must be named ILSVRC2012_val_<8 digits>")
    return int(match[1])


def read_meta(path: Path) -> dict[str, str]:
    """ILSVRC2012_ID -> WordNet id, from the development kit's ``meta.mat``. Raises UserError."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
        return {str(int(s["ILSVRC2012_ID"])): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
    except (MatReadError, OSError, LookupError, ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"--meta: {path} is not the meta.mat of the ILSVRC 2012 development kit: {error}") from error


def read_ground_truth(path: Path, meta: Path | None) -> Callable[[str], str]:
    """Stem -> WordNet id, from a text file with one ILSVRC id, or one WordNet id, per image. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels: {path} cannot be read: {error}") from error
    ids: Mapping[str, str] = {}
    if not all(map(_WNID.fullmatch, lines)):
        # ILSVRC ids are not the class indices of the networks, which follow the sorted WordNet ids.
        meta = meta or path.parent / "meta.mat"
        if not meta.exists():
            raise UserError(f"--labels: {path} holds ILSVRC ids; --meta must name meta.mat of the development kit")
        ids = read_meta(meta)

    def wnid(stem: str) -> str:
        number = _number(stem)
        if not 1 <= number <= len(lines):
            raise UserError(f"--labels: {path} has {len(lines)} lines, none for image {stem}")
        text = lines[number - 1]
        if ids and text not in ids:
            raise UserError(f"--labels: {path}, entry {number}: {text} is not an ILSVRC id in meta.mat")
        return ids.get(text, text)

    return wnid


def read_solution(path: Path) -> dict[str, tuple[str, tuple[Box, ...]]]:
    """Stem -> WordNet id and its boxes, from ``LOC_val_solution.csv`` (ImageId, "wnid x1 y1 x2 y2 ...").

    Raises UserError naming the line.
    """
    table = {}
    for where, row in read_rows(path, ("ImageId", "PredictionString"), "--labels"):
        words = row["PredictionString"].split()
        if not words or len(words) % 5:
            raise UserError(f"{where}: PredictionString is not a list of: wnid x1 y1 x2 y2")
        objects = [(words[i], parse_box(words[i + 1 : i + 5], where)) for i in range(0, len(words), 5)]
        table[row["ImageId"]] = (words[0], tuple(box for wnid, box in objects if wnid == words[0]))
    return table


def find_sources(
    images: Path, labels: Path | None, annotations: Path | None = None, meta: Path | None = None
) -> list[Source]:
    """Every image below ``images``, sorted by name. Raises UserError naming what is wrong or missing.

    Without ``labels`` the images must lie in folders named by WordNet id.
    """
    files = image_files(existing_folder(images, "--images"))
    if not files:
        raise UserError(f"--images: {images} holds no images")
    xmls = {}
    if annotations is not None:
        xmls = {p.stem: p for p in sorted(existing_folder(annotations, "--annotations").rglob("*.xml"))}
    boxes: dict[str, tuple[Box, ...]] = {}
    by_stem: Callable[[str], str] | None = None
    if labels is None:
        pass
    elif labels.suffix.lower() == ".csv":
        solution = read_solution(labels)
        boxes = {stem: b for stem, (_, b) in solution.items()}

        def by_stem(stem: str) -> str:
            if stem not in solution:
                raise UserError(f"--labels: {labels} has no row for image {stem}")
            return solution[stem][0]
    else:
        by_stem = read_ground_truth(labels, meta)

    sources: dict[str, Source] = {}
    for file in files:
        path = images / file
        stem = _safe(path.name, _NAME, "--images").removesuffix(path.suffix)
        if by_stem is None and "/" not in file:
            raise UserError(f"--images: {path} is in no class folder; give --labels for flat images")
        wnid = _safe(path.parent.name if by_stem is None else by_stem(stem), _WNID, f"class of {path}")
        if stem in sources:
            raise UserError(f"--images: {path} and {sources[stem].image} have the same name")
        sources[stem] = Source(path, wnid, xmls.get(stem), boxes.get(stem, ()))
    return [sources[stem] for stem in sorted(sources)]


# Choosing ---------------------------------------------------------------------------------------


def balanced(sources: list[Source], count: int, seed: int) -> list[Source]:
    """``count`` of the sources: one of every class in turn, classes and images in an order drawn by ``seed``.

    Raises UserError if there are too few.
    """
    if not 0 <= count <= len(sources):
        raise UserError(f"{count} images were asked for, but only {len(sources)} are there to choose from")
    by_class: dict[str, list[Source]] = {}
    for source in sorted(sources, key=lambda s: (stable_hash(f"{seed}/{s.image.name}"), s.image.name)):
        by_class.setdefault(source.wnid, []).append(source)

    def rounds() -> Iterator[Source]:
        for i in range(max(map(len, by_class.values()), default=0)):
            for wnid in sorted(by_class, key=lambda w: (stable_hash(f"{seed}/{i}/{w}"), w)):
                if i < len(by_class[wnid]):
                    yield by_class[wnid][i]

    return sorted((s for s, _ in zip(rounds(), range(count), strict=False)), key=lambda s: s.place)


def choose(sources: list[Source], attribution: int, estimation: int, seed: int) -> dict[str, list[Source]]:
    """Disjoint, class-balanced sets; with annotations, only annotated images are explained. Raises UserError."""
    annotated = [s for s in sources if s.annotated] or sources
    explained = balanced(annotated, attribution, seed)
    taken = {s.image for s in explained}
    return {
        "attribution": explained,
        "estimation": balanced([s for s in sources if s.image not in taken], estimation, seed),
    }


# Writing ----------------------------------------------------------------------------------------


def voc(source: Source) -> bytes:
    """A VOC annotation of the boxes of a ``LOC_val_solution.csv``; they are in pixels, so it states no size."""
    objects = "".join(
        f"<object><name>{escape(source.wnid)}</name><bndbox><xmin>{b.x1:.10g}</xmin><ymin>{b.y1:.10g}</ymin>"
        f"<xmax>{b.x2:.10g}</xmax><ymax>{b.y2:.10g}</ymax></bndbox></object>"
        for b in source.boxes
    )
    return f"<annotation><filename>{escape(source.image.stem)}</filename>{objects}</annotation>\n".encode()


class Target:
    """The folder that is made. Files appear whole or not at all, and never outside it."""

    def __init__(self, root: Path, link: str) -> None:
        self.root, self._link = root, link
        self.written = self.present = self.removed = 0

    def _inside(self, relative: str) -> Path:
        """Raises UserError if links lead outside the folder."""
        path = self.root / relative
        if not path.parent.resolve().is_relative_to(self.root.resolve()):
            raise UserError(f"{path} lies outside {self.root}: a link leads away")
        return path

    def _new(self, relative: str) -> Path | None:
        """The path to write, None if it is there already."""
        path = self._inside(relative)
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path):
            self.present += 1
            return None
        self.written += 1
        return path

    def write(self, relative: str, data: bytes) -> None:
        path = self._new(relative)
        if path is not None:
            write_atomic(path, data)

    def remove(self, relative: str) -> None:
        path = self._inside(relative)
        if os.path.lexists(path):
            path.unlink()
            self.removed += 1

    def take(self, relative: str, source: Path) -> None:
        """Copies or links an image. Raises UserError if that is impossible."""
        path = self._new(relative)
        if path is None:
            return
        source = source.resolve()
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            if self._link == "symbolic":
                os.symlink(source, temporary)
            elif self._link == "hard":
                os.link(source, temporary)
            else:
                shutil.copyfile(source, temporary)
            os.replace(temporary, path)
        except OSError as error:
            hint = "; hard links need one disk, use --link symbolic" if error.errno == errno.EXDEV else ""
            raise UserError(f"{source} -> {path}: {error.strerror}{hint}") from error
        finally:
            temporary.unlink(missing_ok=True)


def _earlier(root: Path, force: bool) -> dict[str, Any] | None:
    """The plan of an earlier run, None if there was none. Raises UserError for a folder that this tool did not make."""
    file = root / _PLAN
    if not file.exists():
        if (root / "images").exists() and not force:
            raise UserError(f"{root}/images exists, but this tool did not make it; --force adds to it")
        return None
    try:
        plan = json.loads(file.read_text(encoding="utf-8"))
        for split in SPLITS:
            for place in plan[split]:
                _safe(f"{split}/{place}", _PLACE, str(file))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); choose another folder or delete it") from error
    return plan


def prepare(
    sources: list[Source],
    root: Path,
    *,
    attribution: int = 500,
    estimation: int = 1000,
    seed: int = 0,
    link: str = "copy",
    classes: Path | None = None,
    force: bool = False,
) -> Report:
    """Makes the two sets below ``root``; ``link`` is "copy", "hard" or "symbolic".

    Run again, it adds what is missing. A different choice in the same folder is refused without
    ``force``, which removes the images that are no longer chosen. Raises UserError.
    """
    sets = choose(sources, attribution, estimation, seed)
    index = read_class_table(classes, "--classes") if classes else imagenet_classes()
    unknown = {s.wnid for chosen in sets.values() for s in chosen} - {wnid for wnid, _ in index.values()}
    if unknown:
        raise UserError(f"--classes: {', '.join(sorted(unknown)[:5])} not in the class index")

    plan: dict[str, Any] = {"seed": seed, **{split: [s.place for s in chosen] for split, chosen in sets.items()}}
    old = _earlier(root, force)
    if old is not None and old != plan and not force:
        raise UserError(
            f"{root} holds another choice of images (seed {old.get('seed')}, {len(old['attribution'])} attribution, "
            f"{len(old['estimation'])} estimation); choose another folder, or --force to replace them"
        )
    target = Target(root, link)
    for split in SPLITS:
        for place in sorted(set(old[split]) - set(plan[split])) if old is not None else ():
            target.remove(f"images/{split}/{place}")
            target.remove(f"annotations/{split}/{Path(place).with_suffix('.xml')}")
    if old != plan:
        write_json(root / _PLAN, plan)  # before the images, so that a run that was cut short can go on
    target.write("imagenet_class_index.json", (json.dumps(index, indent=0) + "\n").encode())
    for split, chosen in sets.items():
        for source in chosen:
            target.take(f"images/{split}/{source.place}", source.image)
    for source in sets["attribution"]:
        place = f"annotations/attribution/{source.wnid}/{source.image.stem}.xml"
        if source.annotation is not None:
            target.write(place, source.annotation.read_bytes())
        elif source.boxes:
            target.write(place, voc(source))
    return Report(len(sources), len({s.wnid for s in sources}), target.written, target.present, target.removed)
