"""Folders of images, and the tables beside them: labels, boxes, class indices."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
import os
import posixpath
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from attrib.classes import imagenet_classes
from attrib.datasets.transform import Box
from attrib.store.reading import regular
from attrib.types import SampleError, UserError

log = logging.getLogger(__name__)

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def existing_folder(path: str | Path, field: str) -> Path:
    """The folder, relative to the current directory. Raises UserError naming ``field``."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"{field}: {folder} {what} (current directory: {Path.cwd()})")
    return folder


def image_files(root: Path, field: str = "dataset.root") -> list[str]:
    """Paths of all images below ``root``, relative to it, with "/", sorted; hidden files and folders are skipped.

    Symbolic links are followed, but not back into a folder that contains them. Raises UserError, naming ``field``,
    for a folder that cannot be listed.
    """

    # Strings, because a hundred thousand Path objects take seconds.
    def walk(folder: str, relative: str, inside: tuple[str, ...]) -> Iterator[str]:
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise UserError(f"{field}: {folder} cannot be listed: {error.strerror}") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                real = os.path.realpath(entry.path)
                if real not in inside:
                    yield from walk(entry.path, f"{relative}{entry.name}/", (*inside, real))
            elif posixpath.splitext(entry.name)[1].lower() in SUFFIXES:
                yield relative + entry.name

    return sorted(walk(os.fspath(root), "", (os.path.realpath(root),)))


def shown(name: str) -> str:
    r"""A path as it can be printed and stored: bytes that are not UTF-8 become ``\xe9`` and the like."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a character of UTF-16, from JSON or from Windows
        return name.encode("utf-8", "backslashreplace").decode()


def uids_of(files: Sequence[str]) -> dict[str, str]:
    """uid -> file. A uid is the path without its extension; files that would share one keep theirs.

    A name that is not UTF-8 gives the uid that :func:`shown` makes of it, if need be with a digest of its bytes.
    """
    stems = [posixpath.splitext(f)[0] for f in files]
    count = Counter(stems)
    known = set(files)  # the stem of "a.jpg.png" is the whole name of "a.jpg"
    names = [f if count[stem] > 1 or stem in known else stem for f, stem in zip(files, stems, strict=True)]
    uids = list(map(shown, names))
    count = Counter(uids)
    return {
        uid if uid == name or count[uid] == 1 else f"{uid}~{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}": file
        for uid, name, file in zip(uids, names, files, strict=True)
    }


def class_folders(root: Path) -> dict[int, str]:
    """Class index -> name of a folder in ``root``: its position in alphabetical order.

    Every visible folder counts, also an empty one, so that a part of the data has the same indices. Numbers are in
    alphabetical order too, as torchvision has them, so that the folder 10 may be class 2: there is a warning.
    """
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    numbered = [name for name in folders if name.isdecimal()]
    if numbered != sorted(numbered, key=int):
        log.warning(
            "%s: the folders are classes in alphabetical order (%s, ...), not by number; check that "
            "this is the network's order",
            root,
            ", ".join(folders[:3]),
        )
    return dict(enumerate(folders))


def read_rows(path: str | Path, columns: Sequence[str], field: str) -> list[tuple[str, dict[str, str]]]:
    """(where, row) for each row of a CSV with a header; ``where`` names field, file and line.

    Raises UserError if the file cannot be read, a column is missing or a row is too short.
    """
    path = Path(path).expanduser()
    try:
        # A name of a file may be in any encoding; the operating system's names are read in the same way.
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            missing = [c for c in columns if c not in header]
            if missing:
                raise UserError(f"{field}: {path} has no column {', '.join(missing)}; it has {', '.join(header)}")
            rows = [(f"{field}: {path}, line {reader.line_num}", row) for row in reader]
    except (OSError, csv.Error) as error:
        raise UserError(f"{field}: {path} cannot be read as CSV: {error}") from error
    for where, row in rows:
        for column in columns:
            if row[column] is None:
                raise UserError(f"{where}: no value for {column}")
    return rows


def opened(path: str | Path) -> BinaryIO:
    """A regular file: a FIFO would wait for ever, and a device has no end. Raises OSError."""
    regular(path)
    return open(path, "rb")


def note(known: dict[str, str], uid: str, found: str, file: str) -> None:
    """Remember the fingerprint of what was read of a sample.

    Raises SampleError if this process knows another one: the file changed while it was at work.
    """
    if known.setdefault(uid, found) != found:
        raise SampleError(f"{file}: changed while this process was at work; the next run explains what it holds then")


class InFiles(ABC):
    """Datasets that can say what a fingerprint depends on without reading files, see ``attrib.running.fingerprints``.

    fingerprints   those known so far, by uid

    Every class must define ``sources`` itself: one that inherits it may read other files than its base class, so all
    its files are read at every start.
    """

    fingerprints: dict[str, str]

    @abstractmethod
    def sources(self, uid: str) -> tuple[str, ...]:
        """Absolute paths of all files whose content matters, including those that may be missing."""

    @abstractmethod
    def described(self, uid: str) -> tuple[Any, ...]:
        """What else the fingerprint depends on, such as the label; the ``repr`` must show all of it."""


@dataclass(frozen=True)
class Classes:
    """A class index. ``labels`` finds the class index by WordNet id, or by name where that is unambiguous."""

    names: Mapping[int, str]
    labels: Mapping[str, int]
    wnids: Mapping[int, str] = field(default_factory=dict)


def read_class_table(path: str | Path, field: str) -> dict[int, tuple[str, str]]:
    """Class index -> WordNet id and name, from JSON {"0": ["n01440764", "tench"], ...} or CSV label,wnid,name.

    JSON {"0": "tench", ...} has the name as its id too. "imagenet" is ImageNet's index, if no file is called so.
    Raises UserError naming the field, the file and what is wrong in it.
    """
    path = Path(path).expanduser()
    if str(path) == "imagenet" and not path.exists():
        return imagenet_classes()
    if path.suffix.lower() == ".csv":
        rows = read_rows(path, ("label", "wnid", "name"), field)
        entries = [(where, row["label"], (row["wnid"], row["name"])) for where, row in rows]
    else:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{field}: {path} cannot be read as JSON: {error}") from error
        if not isinstance(content, dict):
            raise UserError(f'{field}: {path} must hold an object such as {{"0": ["n01440764", "tench"]}}')
        entries = [(f"{field}: {path}", k, (v, v) if isinstance(v, str) else v) for k, v in content.items()]
    table: dict[int, tuple[str, str]] = {}
    for where, label, value in entries:
        if not (label.isdecimal() and isinstance(value, (list, tuple)) and len(value) == 2):
            raise UserError(f"{where}: {label!r}: {value!r} is not a class index with a WordNet id and a name")
        if int(label) in table:
            raise UserError(f"{where}: class {label} is listed twice")
        table[int(label)] = (str(value[0]), shown(str(value[1])))
    twice = [wnid for wnid, n in Counter(wnid for wnid, _ in table.values()).items() if n > 1]
    if twice:
        raise UserError(f"{field}: {path} has {twice[0]} for two classes")
    return table


def read_classes(path: str | Path, field: str = "dataset.classes") -> Classes:
    """Reads and raises like ``read_class_table``."""
    table = read_class_table(path, field)
    counts = Counter(name for _, name in table.values())  # ImageNet has two classes called "crane"
    labels = {name: label for label, (_, name) in table.items() if counts[name] == 1}
    labels |= {wnid: label for label, (wnid, _) in table.items()}
    wnids = {label: wnid for label, (wnid, _) in table.items()}
    return Classes({label: name for label, (_, name) in table.items()}, labels, wnids)


class Labels(NamedTuple):
    """by_file: file -> class index, -1 where it has none; problems: file -> why not; gone: files that have a row only,
    and where."""

    by_file: Mapping[str, int]
    problems: Mapping[str, str]
    gone: Mapping[str, str]


def is_number(label: str) -> bool:
    """Also one that can be no class, such as -1: with it among the labels, the others are no names."""
    return re.fullmatch(r"[+-]?\d+(\.\d*)?", label) is not None


def names_in_labels(path: str | Path) -> Classes | None:
    """The classes that a CSV file,label names, numbered by their places in the alphabet; None if it has numbers.

    Raises UserError like ``read_rows``.
    """
    rows = read_rows(path, ("label",), "dataset.labels")
    names = sorted({text for _, row in rows if (text := row["label"].strip())})
    if not names or any(map(is_number, names)):
        return None
    return Classes(dict(enumerate(names)), {name: i for i, name in enumerate(names)})


def read_labels(path: str | Path, files: Sequence[str], classes: Classes | None) -> Labels:
    """Labels of ``files``, from CSV file,label. A label is a number, or a name in ``classes``.

    A file without a row, or with two that differ, and a label outside ``classes`` cost that sample its label; there is
    a warning. Raises UserError if no file gets a label, and for a number that is the index of one class and the name
    of another.
    """
    field = "dataset.labels"
    labels: dict[str, int] = {}
    problems: dict[str, str] = {}
    rows, gone = _rows_of_files(path, ("label",), files, field)
    for where, row in rows:
        file, text = row["file"], row["label"].strip()
        label = _label(text, classes, where)
        if isinstance(label, str):
            problems.setdefault(file, label)
        elif labels.setdefault(file, label) != label:
            problems[file] = f"{where}: a second label for {shown(file)}, {label} after {labels[file]}"
    missing = [f for f in files if f not in labels and f not in problems]
    problems |= {f: f"{field}: {path} has no row for {shown(f)}" for f in missing}
    if len(problems) == len(files):
        raise UserError(next(iter(problems.values())))
    if problems:
        log.warning(
            "%s: %s gives no label to %d of %d images; the first: %s",
            *(field, path, len(problems), len(files), next(iter(problems.values()))),
        )
    return Labels({f: -1 if f in problems else labels[f] for f in files}, problems, gone)


def _label(text: str, classes: Classes | None, where: str) -> int | str:
    """A class index, or what is wrong with ``text``; pandas writes 3.0 where a column of whole numbers has gaps."""
    named = classes.labels.get(text) if classes else None
    text = text if named is not None else text.removesuffix(".0")
    label = int(text) if text.isdecimal() else named
    if label is None:
        return f"{where}: label {shown(text)!r} is neither a class index nor in dataset.classes"
    if named not in (None, label):
        raise UserError(
            f"{where}: label {text!r} is the index of one class and the name of another, class {named}; give the "
            "classes names in dataset.classes that are not numbers, and use either these or the indices here"
        )
    if classes and label not in classes.names:
        return f"{where}: label {label} is not one of the {len(classes.names)} in dataset.classes"
    return label


def _rows_of_files(
    path: str | Path, columns: Sequence[str], files: Sequence[str], field: str
) -> tuple[list[tuple[str, dict[str, str]]], dict[str, str]]:
    """Like ``read_rows`` of a table with a column ``file``: the rows of ``files``; and what is wrong with those of
    others, of which there is a warning.

    Raises UserError if no row is of one of ``files``.
    """
    known, rows = set(files), read_rows(path, ("file", *columns), field)
    gone = {f: f"{where}: there is no image {shown(f)}" for where, row in rows if (f := row["file"]) not in known}
    if "" in gone:
        raise UserError(f"{gone['']}, its name is empty")
    good = [(where, row) for where, row in rows if row["file"] in known]
    if gone:
        about, count = next(iter(gone.values())), len(rows) - len(good)
        if not good:
            raise UserError(f"{about}, nor of any other row")
        log.warning("%s (%d of %d rows are of images that are not there)", about, count, len(rows))
    return good, gone


def read_boxes(path: str | Path, files: Sequence[str]) -> dict[str, tuple[Box, ...]]:
    """file -> boxes in pixels of the stored image, from CSV file,x1,y1,x2,y2 with any number of rows per file.

    Raises UserError if no row is of one of ``files``, and for a box that is no rectangle.
    """
    boxes: dict[str, list[Box]] = {}
    for where, row in _rows_of_files(path, Box._fields, files, "dataset.boxes")[0]:
        boxes.setdefault(row["file"], []).append(parse_box([row[c] for c in Box._fields], where))
    return {file: tuple(found) for file, found in boxes.items()}


def parse_box(edges: Sequence[str], where: str) -> Box:
    """Raises UserError, beginning with ``where``, unless x1 < x2 and y1 < y2 are finite numbers."""
    try:
        box = Box(*(float(e) for e in edges))
    except ValueError:
        raise UserError(f"{where}: box {', '.join(edges)} is not four numbers") from None
    if not (all(map(math.isfinite, box)) and box.x1 < box.x2 and box.y1 < box.y2):
        raise UserError(f"{where}: box {', '.join(edges)} is inverted or empty; it needs x1 < x2 and y1 < y2")
    return box
