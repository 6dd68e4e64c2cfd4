"""Images that lie many to a file: tar archives of WebDataset, Parquet and Arrow tables of Hugging Face.

Where each image lies, its label and its digest are found by reading every shard once. A work directory remembers that
below ``state/fingerprints/shards/``, a file for each shard, under the shard's path, size and both times of change (see
``attrib.running.fingerprints``, which treats single files in the same way), so that later starts read no image.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import logging
import re
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import pyarrow as pa

from attrib.datasets.depth import mark
from attrib.datasets.files import SUFFIXES, existing_folder, is_number, read_classes, shown
from attrib.datasets.images import ImageDataset
from attrib.datasets.transform import ImageTransform
from attrib.keys import digest
from attrib.store.files import write_atomic
from attrib.store.listing import Stamp, pack, settled, stamp_of, unpack
from attrib.store.reading import LISTING, content
from attrib.types import UNREADABLE, SampleError, UserError

log = logging.getLogger(__name__)

VERSION = 1  # of what is remembered: raise it, and every shard is read again
READERS = 4  # shards at once
_SCHEMA = pa.schema(
    [
        ("name", pa.string()),  # of the sample in its shard, "" if it has none
        ("label", pa.string()),  # as it is written, with # in front if it is a number and no text; "" if there is none
        ("at", pa.int64()),
        ("size", pa.int64()),
        ("digest", pa.binary()),  # of the encoded image
        ("mark", pa.string()),  # what else belongs in the fingerprint, see ``depth.mark``
        ("problem", pa.string()),  # why it cannot be used, "" if it can
    ]
)


class Found(NamedTuple):
    """An image in a shard: a row of the index. ``at`` and ``size`` are the reader's business."""

    name: str
    label: str
    at: int
    size: int
    digest: bytes
    mark: str = ""
    problem: str = ""

    @classmethod
    def of(cls, name: str, label: str, at: int, content: bytes) -> Found:
        return cls(name, label, at, len(content), hashlib.sha256(content).digest(), "".join(mark(content)))

    @classmethod
    def bad(cls, name: str, problem: str) -> Found:
        return cls(name, "", 0, 0, b"", "", problem)


class ShardedImages(ImageDataset):
    """A subclass says how a shard is read.

    root      a folder, of which the shards below count, or one shard
    split     the shards that are named so (``val-00000-of-00014.parquet``) or lie in a folder of that name; if there
              are none, those whose names begin or end so (``imagenet-val-000003.tar``); None: all, which must then be
              of one split; "*": all
    classes   class index, as in ``ImageFolder``; "imagenet" is ImageNet's
    index     work directory that remembers the index; None: none, so every start reads all shards
    settings  what else determines the index

    A uid is the name that the sample has in its shard, without its extension, behind the shard's name if names repeat.
    A shard that is cut short is one more sample, which fails; so is each image that cannot be used. The others go on.
    Raises UserError if there are no shards, or if no image can be used.
    """

    SUFFIX: ClassVar[str]  # of the shards

    def __init__(
        self,
        root: str,
        transform: ImageTransform,
        split: str | None = None,
        classes: str | None = None,
        index: str | None = None,
        settings: Sequence[Any] = (),
    ) -> None:
        self._shards = shards_of(root, self.SUFFIX, split)
        self._settings, self._memory = (
            tuple(settings),
            Path(index) / "state" / "fingerprints" / "shards" if index else None,
        )
        table = self._indexed()
        given = read_classes(classes) if classes else None
        names = dict(given.names) if given else self._names()
        written = {} if names else _written(table["label"].to_pylist())
        names = names or written
        known = given.labels if given else {name: i for i, name in names.items()}
        uids = self._uids(table)
        self._place = {uid: row for row, uid in enumerate(uids)}
        self._at, self._size, self._shard = (table[name].to_numpy() for name in ("at", "size", "shard"))
        self._digests = table["digest"].combine_chunks()
        self._marks = {uid: mark for uid, mark in zip(uids, table["mark"].to_pylist(), strict=True) if mark}
        problems = table["problem"].to_pylist()
        if all(problems):
            raise UserError(f"dataset.root: no image in {self._shards[0].parent} can be used: {problems[0]}")
        self._labels: dict[str, int] = {}
        reasons: dict[str, str] = {}
        for uid, text, problem in zip(uids, table["label"].to_pylist(), problems, strict=True):
            label = _class(text, names, known)
            if isinstance(label, str):
                reasons[uid], label = label, -1
            self._labels[uid] = label
            if problem:
                reasons.pop(uid, None)
        self._problems = {uid: problem for uid, problem in zip(uids, problems, strict=True) if problem}
        for what, found in (("cannot be used", self._problems), ("have no label", reasons)):
            if found:
                log.warning("%d of %d samples %s; %s: %s", len(found), len(uids), what, *next(iter(found.items())))
        super().__init__(uids, transform, names)
        self.label_problems = reasons
        self.numbering, self.wnids = "labels" if written else "given", given.wnids if given else {}
        self.key = digest(self.key, *self._settings)

    # ---- what a subclass says -----------------------------------------------------------------

    @abstractmethod
    def scan(self, shard: Path) -> Iterator[Found]:
        """Every image of a shard. What it raises costs the rest of the shard."""

    @abstractmethod
    def read(self, shard: Path, at: int, size: int) -> bytes:
        """The encoded image that a scan found there. Raises OSError or ValueError."""

    def _names(self) -> dict[int, str]:
        """Class index -> name, where the shards say so."""
        return {}

    # ---- the index ----------------------------------------------------------------------------

    def _indexed(self) -> pa.Table:
        """The rows of all shards, with one more column: the position of the shard."""
        pool = ThreadPoolExecutor(READERS)
        try:
            tables = list(pool.map(self._rows, self._shards))
        finally:
            pool.shutdown(cancel_futures=True)
        numbered = [t.append_column("shard", pa.array([i] * len(t), pa.int32())) for i, t in enumerate(tables)]
        return pa.concat_tables(numbered)

    def _rows(self, shard: Path) -> pa.Table:
        try:
            now, stamp = time.time_ns(), stamp_of(shard)
        except OSError as error:
            return _table([Found.bad(shown(shard.name), f"{shown(str(shard))}: cannot be read: {error.strerror}")])
        path = self._remembered(shard, stamp)
        if path is not None:
            try:
                return unpack(content(path, LISTING), [_SCHEMA])[0]
            except FileNotFoundError:
                pass
            except (OSError, ValueError, pa.ArrowException) as error:
                log.info("%s is not used: %s", path, error)
        found, whole = self._scanned(shard)
        table = _table(found)
        # What is damaged may only have been read badly, by a file server for instance.
        if path is not None and whole and settled(stamp, now) and stamp == stamp_of(shard):
            try:
                write_atomic(path, pack([table]))
            except OSError as error:  # nothing depends on it, so a full or read-only disk does no harm
                log.info("%s is not written: %s", path, error)
        return table

    def _scanned(self, shard: Path) -> tuple[list[Found], bool]:
        """The rows of a shard, and whether it could be read to its end."""
        found: list[Found] = []
        try:
            found.extend(self.scan(shard))
        except UserError:
            raise
        except Exception as error:  # readers of damaged archives raise anything
            reason = f"{error or type(error).__name__}".strip().replace("\n", " ")
            about = f"{shown(str(shard))}: damaged or cut short after {len(found)} images: {reason}"
            return [*found, Found.bad(shown(shard.name), about)], False
        return found, True

    def _remembered(self, shard: Path, stamp: Stamp) -> Path | None:
        if self._memory is None:
            return None
        about = VERSION, type(self).__qualname__, self._settings, str(shard.absolute()), stamp
        key = hashlib.blake2b(repr(about).encode(errors="surrogatepass"), digest_size=8).hexdigest()
        return self._memory / f"{re.sub(r'[^A-Za-z0-9_-]', '-', shard.stem)[:80]}-{key}.cache"

    def _uids(self, table: pa.Table) -> list[str]:
        names, shards = table["name"].to_pylist(), table["shard"].to_pylist()
        rows = [f"{i:06d}" for _, group in itertools.groupby(shards) for i, _ in enumerate(group)]
        stems = _stems(self._shards)
        if "" in names or len(set(names)) < len(names):
            names = [f"{stems[shard]}/{name or row}" for name, shard, row in zip(names, shards, rows, strict=True)]
        count = Counter(names)
        if len(count) < len(names):  # twice in one shard
            names = [name if count[name] == 1 else f"{name}~{row}" for name, row in zip(names, rows, strict=True)]
        return names

    # ---- samples ------------------------------------------------------------------------------

    def _check(self, uid: str) -> None:
        """Raises SampleError for an image that cannot be used."""
        if uid in self._problems:
            raise SampleError(self._problems[uid])

    def open(self, uid: str) -> BinaryIO:
        self._check(uid)
        row = self._place[uid]
        return io.BytesIO(self.read(self._shards[self._shard[row]], int(self._at[row]), int(self._size[row])))

    def label(self, uid: str) -> int:
        return self._labels[uid]

    def fingerprint(self, uid: str) -> str:
        """As of a file with the same content, but from the index."""
        if uid in self._problems:
            return UNREADABLE
        if uid not in self.fingerprints:
            content = self._digests[self._place[uid]].as_py().hex()
            arrays = self.units(uid), self.region(uid)
            self.fingerprints[uid] = self._print(
                uid, content, (self._marks[uid],) if uid in self._marks else (), arrays
            )
        return self.fingerprints[uid]

    def _prints_content(self) -> bool:
        return type(self).fingerprint is ShardedImages.fingerprint

    def file(self, uid: str) -> str:
        return f"{shown(str(self._shards[self._shard[self._place[uid]]]))}: {uid}"


def _table(rows: Sequence[Found]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(_SCHEMA)
    return pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(columns, _SCHEMA)], schema=_SCHEMA)


def _written(labels: Sequence[str]) -> dict[int, str]:
    """Names of classes by their places in the alphabet; none if there are numbers among the labels."""
    names = sorted({text for text in labels if text.removeprefix("#") not in ("", "-1")})
    numbers = any(text.startswith("#") or is_number(text) for text in names)
    return {} if numbers else dict(enumerate(names))


def _class(text: str, names: Mapping[int, str], known: Mapping[str, int]) -> int | str:
    """A class index, -1 where none is written, or what is wrong with ``text``."""
    if text.removeprefix("#") in ("", "-1"):
        return -1
    if text.startswith("#"):  # the index itself
        text = text[1:]
    elif text in known:
        if text.isdecimal() and known[text] != int(text):
            return f"its label {text!r} is the index of one class and the name of another, class {known[text]}"
        return known[text]
    if not text.isdecimal():
        return f"its label {text!r} is neither a class index nor a known name"
    if names and int(text) not in names:
        return f"its label {text} is not one of the {len(names)} classes"
    return int(text)


def _stems(shards: Sequence[Path]) -> list[str]:
    """A name for each shard that no other has."""
    stems = [shown(path.stem) for path in shards]
    if len(set(stems)) < len(stems):
        stems = [f"{shown(path.parent.name)}/{stem}" for path, stem in zip(shards, stems)]
    return stems if len(set(stems)) == len(stems) else [f"{i:05d}-{stem}" for i, stem in enumerate(stems)]


def split_of(shard: Path) -> str:
    """The part of the name in front of its number; a shard that is named by a number only has its folder's name."""
    return re.sub(r"[-_.]?\d+(-of-\d+)?$", "", shard.stem) or shard.parent.name


def shards_of(root: str, suffix: str, split: str | None) -> list[Path]:
    """Raises UserError, listing what is there, if there are none, or shards of several splits."""
    top = Path(root).expanduser()
    if top.is_file():
        return [top]
    found = sorted(
        path
        for path in existing_folder(root, "dataset.root").rglob(f"*{suffix}")
        if not any(part.startswith(".") for part in path.relative_to(top).parts)
        and not path.name.startswith("cache-")  # what datasets.map leaves behind
    )
    if not found:
        packed = next(top.rglob(f"*{suffix}.*"), None) if suffix == ".tar" else None
        more = f"; {packed.name} is packed, and must be unpacked to a plain .tar first" if packed else ""
        raise UserError(f"dataset.root: {top} holds no *{suffix}{more}")
    names = {path: split_of(path) for path in found}
    # Folders that are numbers divide what is too much for one; others divide what is different.
    folders = {path: [n for n in path.parent.relative_to(top).parts if not n.isdecimal()] for path in found}

    def which(paths: Sequence[Path]) -> list[str]:
        apart = any(folders[path] != folders[paths[0]] for path in paths)
        parts = [[*(folders[path] if apart else []), names[path]] for path in paths]
        return sorted({shown("/".join(dict.fromkeys(words))) for words in parts})

    if split is None and len(which(found)) > 1:
        raise UserError(
            f"dataset.split: which one? {top} holds shards of {', '.join(which(found))}; dataset.split='*' takes all"
        )
    if split is None or split == "*":
        return found
    named = [path for path in found if split in (names[path], path.parent.name)]
    parts = [path for path in found if re.search(rf"^{re.escape(split)}[-_.]|[-_.]{re.escape(split)}$", names[path])]
    begin = [path for path in found if names[path].startswith(split)]
    if not named and not parts and len(which(begin)) > 1:
        raise UserError(f"dataset.split: {split} may be {' or '.join(which(begin))}; give the whole name")
    if not begin and not named and not parts:
        raise UserError(f"dataset.split: {top} has no shards of {split}, only of {', '.join(which(found))}")
    chosen = named or parts or begin
    if any(folders[path] != folders[chosen[0]] for path in chosen):
        raise UserError(
            f"dataset.root: {top} holds several sets of {split}: {', '.join(which(chosen))}; name one's folder"
        )
    return chosen


def stem_of(name: str) -> str:
    """A name in a shard as a uid: without ./ in front and an image's extension behind."""
    name = name.removeprefix("./").lstrip("/")
    stem, dot, suffix = name.rpartition(".")
    return shown(stem if dot and f".{suffix.lower()}" in SUFFIXES else name)
