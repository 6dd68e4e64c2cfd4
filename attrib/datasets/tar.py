"""WebDataset: images and labels in plain tar archives."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from attrib.datasets.files import SUFFIXES, shown
from attrib.datasets.shards import Found, ShardedImages
from attrib.datasets.transform import ImageTransform
from attrib.types import UserError

_LONGEST_LABEL = 2**20  # bytes
_PACKED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class _Member(NamedTuple):
    at: int
    size: int


class TarShards(ShardedImages):
    """Samples of WebDataset: members whose names are equal up to the first dot behind the folders, ``000293.jpg`` and
    ``000293.cls``; see ``ShardedImages`` for the other fields.

    image   extension of the image; None: whatever image there is, if there is one
    label   extension of the label, a class index or name as text; ``json.FIELD``: a field of the .json; ``folder``: the
            first folder of the name, found in ``classes``; None: no labels
    """

    SUFFIX = ".tar"

    def __init__(
        self,
        root: str,
        transform: ImageTransform,
        split: str | None = None,
        image: str | None = None,
        label: str | None = "cls",
        classes: str | None = None,
        index: str | None = None,
    ) -> None:
        if label == "folder" and not classes:
            raise UserError("dataset.classes: with dataset.label=folder it must say which class a folder is")
        self._image, self._label = image, label
        super().__init__(root, transform, split, classes, index, settings=(image, label))
        if label and not any(found >= 0 for found in self._labels.values()):
            raise UserError(
                f"dataset.label: no sample of {self._shards[0]} has a label by {label!r}; members of a sample there: "
                f"{', '.join(self._first_members())}; give the extension of the labels, json.FIELD, folder or null"
            )

    def scan(self, shard: Path) -> Iterator[Found]:
        with open(shard, "rb") as file:
            packed = _PACKED.get(file.read(2))
            if packed:
                raise UserError(f"dataset.root: {shard} is packed by {packed}; only a plain tar can be read at random")
            size = os.fstat(file.fileno()).st_size
            waiting: dict[str, dict[str, _Member]] = {}
            twice: dict[str, str] = {}
            problem: Exception | None = None
            try:
                for key, extension, member in _members(shard):
                    if waiting.setdefault(key, {}).setdefault(extension, member) != member:
                        twice[key] = f"{shown(str(shard))}: {key} has two members .{extension}"
            except tarfile.TarError as error:  # the samples in front of it are good
                problem = error
            for key, members in waiting.items():
                yield Found.bad(key, twice[key]) if key in twice else self._sample(file, size, key, members, shard)
            if problem is not None:
                raise problem

    def _sample(self, file: BinaryIO, size: int, key: str, members: dict[str, _Member], shard: Path) -> Found:
        where = f"{shown(str(shard))}: {key}"
        images = [e for e in members if (e == self._image if self._image else f".{e}" in SUFFIXES)]
        if len(images) != 1:
            what = f"{len(images)} images" if images else "no image"
            return Found.bad(key, f"{where}: has {what} among {', '.join(members)}; dataset.image says which extension")
        member = members[images[0]]
        if member.at + member.size > size:
            return Found.bad(key, f"{where}: cut short: {size - member.at} of {member.size} bytes")
        try:
            label = self._text(file, key, members)
        except ValueError as error:
            return Found.bad(key, f"{where}: its label cannot be read: {error}")
        return Found.of(key, label, member.at, _content(file, member))

    def _text(self, file: BinaryIO, key: str, members: dict[str, _Member]) -> str:
        """The label as it is written. Raises ValueError."""
        if self._label is None:
            return ""
        if self._label == "folder":
            return key.partition("/")[0] if "/" in key else ""
        extension, _, field = self._label.partition(".")
        if extension not in members or members[extension].size > _LONGEST_LABEL:
            return ""
        text = _content(file, members[extension]).decode("utf-8").strip()
        if extension != "json":
            return text
        value = json.loads(text).get(field)
        if value is not None and not isinstance(value, (str, int)):
            raise ValueError(f"{field} is {type(value).__name__}")
        return "" if value is None else f"#{value}" if isinstance(value, int) else shown(value)

    def read(self, shard: Path, at: int, size: int) -> bytes:
        with open(shard, "rb") as file:
            return _content(file, _Member(at, size))

    def _first_members(self) -> list[str]:
        found: list[str] = []
        first = ""
        with suppress(tarfile.TarError):
            for key, extension, _ in _members(self._shards[0]):
                first = first or key
                if key != first:
                    break
                found.append(f".{extension}")
        return found


def _members(shard: Path) -> Iterator[tuple[str, str, _Member]]:
    """Key, extension in lower case, and place of each file in an archive. Raises TarError if it is cut short."""
    with tarfile.open(shard, "r:") as archive, open(shard, "rb") as file:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # it would keep all of them
            folder, slash, name = member.name.removeprefix("./").rpartition("/")
            stem, dot, extension = name.partition(".")
            if member.isfile() and stem and dot and not member.issparse():
                yield shown(f"{folder}{slash}{stem}"), extension.lower(), _Member(member.offset_data, member.size)
        file.seek(archive.offset)  # tarfile takes a damaged header for the end
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("the archive has no end")


def _content(file: BinaryIO, member: _Member) -> bytes:
    file.seek(member.at)
    content = file.read(member.size)
    if len(content) != member.size:
        raise ValueError(f"cut short: {len(content)} of {member.size} bytes")
    return content
