"""The work directory: append-only, atomic, shared by any number of writers.

Three kinds of file hold everything that is computed, and each is written under a temporary
name, fsynced and renamed, so a reader never sees half a file and a killed writer loses only
what it had not flushed:

* chunks of arrays (``*.safetensors``): maps and curves of some samples;
* chunks of rows (``*.parquet``): scores of some samples;
* single documents (``*.json``, states).

Nothing is ever changed in place or deleted. Several writers need no coordination: each has a
name of its own, and a sample that two of them computed is simply there twice, with the same
numbers. A sample counts as present only under its current *fingerprint* (content of the file,
target, boxes), so data that changed on disk is computed anew.
"""

from __future__ import annotations

import functools
import json
import os
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from attrib.errors import GoneError
from attrib.store.files import Buffered, Key, write_atomic, write_json
from attrib.store.ledger import Ledger
from attrib.store.listing import Folder, Memory, Stamp, stamp_of
from attrib.store.reading import LISTING, UnreadableError, document, parsed, regular
from attrib.store.schemas import SampleList, SampleNote
from attrib.types import UNREADABLE, UserError

__all__ = [
    "Arrays",
    "Cell",
    "DamagedError",
    "Key",
    "Ledger",
    "Record",
    "ScoreRows",
    "cells",
    "counts",
    "described",
    "write_atomic",
    "write_json",
]


FORMAT = 1  # of a cell's folder, see docs/work-directory.md; a cell that does not say has this one, too
MOST_ROWS = 10_000_000  # of one file: a writer puts four thousand samples in it

# What libraries raise for a file that is not what it should be.
READING = (SafetensorError, pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError)


class DamagedError(UnreadableError):
    """A chunk is not what was written."""


class Record(NamedTuple):
    """Where a stored sample lies, and what was noted beside it."""

    folder: Path
    chunk: str
    position: int
    noted: str  # JSON of (crc, info), read when it is asked for: a cell may hold 100,000 of them

    @property
    def path(self) -> Path:
        return self.folder / self.chunk

    @property
    def crc(self) -> Mapping[str, int]:
        return _read_note(self.noted)[0]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.crc)

    @property
    def info(self) -> Mapping[str, Any]:
        return _read_note(self.noted)[1]


_Noted = tuple[Key, str]  # a sample, and what is noted beside it


class Arrays(Buffered):
    """Named arrays per sample, any shape, in chunks that hold all arrays of some samples."""

    SUFFIX = ".safetensors"
    REMEMBERED = pa.schema([("uid", pa.string()), ("fingerprint", pa.string()), ("noted", pa.string())])

    def __init__(
        self, folder: Path, writer: str = "", *, seconds: float = 5.0, count: int = 256, **options: Any
    ) -> None:
        super().__init__(folder, writer, seconds=seconds, count=count, **options)
        self.files = self._unread()
        self._index: dict[Key, Record] | None = None
        self._chunks: dict[str, tuple[Stamp, list[_Noted]]] = {}  # what was read

    def add(self, uid: str, fingerprint: str, arrays: Mapping[str, np.ndarray], **info: Any) -> None:
        """Remember one sample. ``info`` is anything JSON can hold (seconds, rows)."""
        packed = {k: _packed(v) for k, v in arrays.items()}
        self._add((uid, fingerprint), (packed, info), sum(value.nbytes for value in packed.values()))

    def _encoded(self, samples: Mapping[Key, Any]) -> bytes:
        tensors: dict[str, np.ndarray] = {}
        described = []
        for i, ((uid, fingerprint), (arrays, info)) in enumerate(samples.items()):
            tensors |= {f"{i}/{name}": value for name, value in arrays.items()}
            crc = {name: zlib.crc32(value.data) for name, value in arrays.items()}
            described.append({"uid": uid, "fingerprint": fingerprint, "crc": crc, "info": info})
        text = json.dumps(described)
        return to_safetensors(tensors, {"samples": text, "crc": str(zlib.crc32(text.encode()))})

    def index(self, *, patient: bool = False) -> Mapping[Key, Record]:
        """Every stored sample; new files of other writers are seen at each call.

        ``patient``: they are seen somewhat later, so that whoever asks often spends little of the time on it.
        """
        recalled: dict[str, tuple[Stamp, list[_Noted]]] = {}
        if self._index is None:
            self._index, recalled = {}, self._recalled()
        for name in self.files.new(patient=patient):
            known = recalled.get(name) or self._read_chunk(name)
            if known is not None:
                self._chunks[name] = known
                rows = known[1]
                self._index |= {key: Record(self.folder, name, i, noted) for i, (key, noted) in enumerate(rows)}
        if self.files.due(len(self._chunks)):
            self._remember()
        return self._index

    def reindex(self) -> int:
        """Read all chunks again, whatever is remembered of them, and remember that. Returns the number of samples."""
        self.files = self._unread()
        self._index, self._chunks, self.broken = {}, {}, []
        self.index()
        self._remember()
        return len(self._index)

    def sampled(self, chunks: int = 32) -> list[Record]:
        """The samples of a few chunks, evenly spread over the names, without looking at all."""
        if self._index is not None:
            return list(self._index.values())
        names = self._unread().new()
        found = (self._read_chunk(name, blame=False) for name in names[:: max(1, len(names) // chunks)])
        return [Record(self.folder, "", i, noted) for part in found if part for i, (_, noted) in enumerate(part[1])]

    def _read_chunk(self, name: str, blame: bool = True) -> tuple[Stamp, list[_Noted]] | None:
        """What a chunk says of its samples; None if it cannot be read."""
        path = self.folder / name
        try:
            stamp = stamp_of(path)  # before: if it is changed meanwhile, what is remembered will not fit
            with safe_open(path, framework="numpy") as file:
                samples = described(file)
            return stamp, [((s["uid"], s["fingerprint"]), _note(s["crc"], s["info"])) for s in samples]
        except READING as error:
            if blame and not isinstance(error, FileNotFoundError):
                self.broken.append(_line(path, error))
            return None

    def _unread(self) -> Folder:
        return Folder(self.folder, self.SUFFIX, "index.cache", self.REMEMBERED)

    def _recalled(self) -> dict[str, tuple[Stamp, list[_Noted]]]:
        stamps, counts, table = self.files.recall()
        keys = zip(table["uid"].to_pylist(), table["fingerprint"].to_pylist(), strict=True)
        rows = list(zip(keys, table["noted"].to_pylist(), strict=True))
        ends = np.cumsum(counts, dtype=int).tolist()
        parts = (rows[end - count : end] for end, count in zip(ends, counts, strict=True))
        return {name: (stamp, part) for (name, stamp), part in zip(stamps.items(), parts, strict=True)}

    def _remember(self) -> None:
        rows = [(*key, noted) for _, part in self._chunks.values() for key, noted in part]
        columns = [pa.array(column, pa.string()) for column in (zip(*rows, strict=True) if rows else ((), (), ()))]
        stamps = {name: stamp for name, (stamp, _) in self._chunks.items()}
        counts = [len(part) for _, part in self._chunks.values()]
        table = pa.Table.from_arrays(columns, schema=self.REMEMBERED)
        self.files.remember(Memory(stamps, counts, table))

    def read(self, key: Key, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """The arrays of one sample, also of one that is not flushed yet.

        Raises KeyError if it is not there, OSError if its chunk is damaged.
        """
        for waiting in (self._pending, self._writing):
            if key in waiting:
                arrays = waiting[key][0]
                return {name: arrays[name] for name in (arrays if names is None else names)}
        # The folder is listed again only for a sample that was not there before.
        record = (self._index or {}).get(key) or self.index()[key]
        crc = record.crc
        names = tuple(crc) if names is None else tuple(names)
        for name in names:
            if name not in crc:
                raise KeyError(f"{record.path} holds {', '.join(crc)} of {key[0]}, but not {name}")
        try:
            regular(record.path)
            with safe_open(record.path, framework="numpy") as file:
                arrays = {name: file.get_tensor(f"{record.position}/{name}") for name in names}
        except FileNotFoundError:
            raise
        except READING as error:
            raise _damaged(record.path, str(error)) from error
        for name, value in arrays.items():
            if zlib.crc32(_packed(value).data) != crc[name]:
                raise _damaged(record.path, f"wrong checksum of {name} of {key[0]}")
        return arrays

    def forget(self, chunk: str) -> None:
        """A chunk of this name is no longer there, or of no use: its samples are those of other chunks, or missing."""
        self._chunks.pop(chunk, None)
        self._index = {key: record for key, record in (self._index or {}).items() if record.chunk != chunk}


def described(chunk: Any) -> list[SampleNote]:
    """What an open chunk says of its samples, in their order. Raises ValueError or KeyError if damaged."""
    about = chunk.metadata() or {}
    crc = zlib.crc32(about["samples"].encode())
    if int(about.get("crc", crc)) != crc:  # earlier versions wrote none
        raise ValueError("wrong checksum of what it says of its samples")
    return parsed(about["samples"], list[SampleNote])


def _line(path: Path, error: Exception) -> str:
    return f"{path}: {_reason(path, error)}"


def _reason(path: Path, error: Exception) -> str:
    """What an error says, without the file."""
    return str(error).removeprefix(f"{path}: ")


def _damaged(path: Path, what: str) -> DamagedError:
    return DamagedError(f"{path} is damaged: {what}; delete the file")


def _packed(value: np.ndarray) -> np.ndarray:
    """In C order and the machine's byte order. (``ascontiguousarray`` would make 0-d arrays 1-d.)"""
    value = np.asarray(value, order="C")
    return value.astype(value.dtype.newbyteorder("="), copy=False)


def _note(crc: Mapping[str, int], info: Mapping[str, Any]) -> str:
    return json.dumps([dict(crc), info], separators=(",", ":"))


def _read_note(noted: str) -> Any:
    """The fast parser; it takes no NaN and no half characters, which work directories may hold."""
    try:
        return msgspec.json.decode(noted)
    except msgspec.DecodeError:
        return json.loads(noted)


class ScoreRows(Buffered):
    """Score rows: (uid, fingerprint, map, column, value, time), one Parquet file per flush."""

    SCHEMA = pa.schema(
        [
            ("uid", pa.string()),
            ("fingerprint", pa.string()),
            ("map", pa.string()),
            ("column", pa.string()),
            ("value", pa.float64()),
            ("time", pa.float64()),
        ]
    )

    NAMED = pa.schema([("file", pa.string()), *SCHEMA])
    SUFFIX = ".parquet"

    def __init__(
        self, folder: Path, writer: str = "", *, seconds: float = 5.0, count: int = 4096, **options: Any
    ) -> None:
        super().__init__(folder, writer, seconds=seconds, count=count, **options)
        self.files = Folder(self.folder, self.SUFFIX, "rows.cache", self.SCHEMA)
        self._stamps: dict[str, Stamp] | None = None  # of the files that were read
        self._rows = self.NAMED.empty_table()  # theirs, in the order of the files' names
        self._odd: dict[str, str] = {}  # files of which a part is no rows -> what is wrong

    def add(self, uid: str, fingerprint: str, values: Mapping[tuple[str, str], float]) -> None:
        """All scores of one sample at once, keyed by (map, column)."""
        now = time.time()
        self._add(
            (uid, fingerprint),
            [
                {"uid": uid, "fingerprint": fingerprint, "map": m, "column": c, "value": float(v), "time": now}
                for (m, c), v in values.items()
            ],
        )

    def _encoded(self, samples: Mapping[Key, Any]) -> bytes:
        rows = [row for sample in samples.values() for row in sample]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=self.SCHEMA), sink, write_page_checksum=True)
        return sink.getvalue().to_pybytes()

    def table(self) -> pa.Table:
        """All rows, also those of other writers; damaged files are left out and named in ``broken``."""
        if self._stamps is None:
            self._stamps, counts, table = self.files.recall()
            of = pa.array(np.repeat(np.arange(len(counts)), counts), pa.int64())
            self._rows = table.add_column(
                0, self.NAMED.field("file"), pa.array(list(self._stamps), pa.string()).take(of)
            )
        now, self.broken = self.files.stamps(), []
        self._forget([name for name, stamp in self._stamps.items() if now.get(name) != stamp])
        tables = [self._rows]
        for name, stamp in now.items():
            if name in self._stamps:
                continue
            try:
                tables.append(self._read_file(name))
                self._stamps[name] = stamp
            except FileNotFoundError:
                continue  # deleted meanwhile
            except READING as error:
                self.broken.append(_line(self.folder / name, error))
        self.broken += self._odd.values()
        if len(tables) > 1:
            rows = pa.concat_tables(tables)
            # A sample may stand in several files; which is taken must not depend on what was remembered.
            self._rows = rows.take(pc.sort_indices(rows, [("file", "ascending")])).combine_chunks()
            if self.files.due(len(self._stamps)):
                self._remember()
        return self._rows.drop_columns("file")

    def _forget(self, names: Sequence[str]) -> None:
        if names:
            assert self._stamps is not None
            self._rows = self._rows.filter(pc.invert(pc.is_in(self._rows["file"], pa.array(names))))
            for name in names:
                del self._stamps[name]
                self._odd.pop(name, None)

    def _read_file(self, name: str) -> pa.Table:
        """The rows of a file; those of samples with a row that is none are left out, and ``_odd`` says so."""
        table = read_rows(self.folder / name)
        bad = [pc.is_null(table[field]) for field in self.SCHEMA.names]
        bad.append(pc.invert(pc.fill_null(pc.is_finite(table["time"]), True)))
        odd = functools.reduce(pc.or_, bad)
        if count := pc.sum(odd).as_py():
            self._odd[name] = f"{self.folder / name}: {count} rows that are none (a field is null)"
            table = table.filter(pc.invert(pc.is_in(table["uid"], table["uid"].filter(odd))))
        return table.add_column(0, self.NAMED.field("file"), pa.array([name] * len(table), pa.string()))

    def _remember(self) -> None:
        assert self._stamps is not None
        counted = pc.value_counts(self._rows["file"])
        counts = dict(zip(counted.field("values").to_pylist(), counted.field("counts").to_pylist(), strict=True))
        stamps = {name: self._stamps[name] for name in counts if name not in self._odd}
        rows = self._rows.filter(pc.invert(pc.is_in(self._rows["file"], pa.array(list(self._odd), pa.string()))))
        self.files.remember(Memory(stamps, [counts[name] for name in stamps], rows.drop_columns("file")))

    def present(self) -> set[Key]:
        table = self.table()
        return set(zip(table["uid"].to_pylist(), table["fingerprint"].to_pylist(), strict=True))


def read_rows(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A file of score rows, or some ``columns`` of it. Raises one of ``READING``."""
    regular(path)
    # Opened here: pyarrow takes no path that is not UTF-8.
    with open(path, "rb") as source, pq.ParquetFile(source, page_checksum_verification=True) as file:
        if file.metadata.num_rows > MOST_ROWS:
            raise UnreadableError(f"{path}: claims {file.metadata.num_rows} rows")
        table = file.read(list(columns) if columns else None)
    # Not left to read_table(schema=...), which fills a column it does not find with nulls.
    if not (columns or table.schema.equals(ScoreRows.SCHEMA)):
        raise pa.ArrowInvalid("not the columns of a score file")
    return table


class Cell:
    """One folder of the work directory: one dataset, model and method."""

    def __init__(self, folder: Path, writer: str = "", *, flush_seconds: float = 5.0) -> None:
        self.folder, self.writer, self._flush_seconds = Path(folder), writer, flush_seconds
        self._begun = False
        self.maps = Arrays(self.folder / "maps", writer, background=True, **self._how)
        self.ledger = Ledger(self.folder, writer, self.check)

    @property
    def _how(self) -> dict[str, Any]:
        return {"seconds": self._flush_seconds, "before": self.check}

    def begin(self) -> None:
        """From now on the cell is described, and whatever is written looks first whether it still is."""
        self._begun = True

    def check(self) -> None:
        """Raises GoneError if the folder was deleted since ``begin``: half a cell must not take its place."""
        if self._begun and not os.path.lexists(self.folder / "spec.json"):
            raise GoneError(
                f"{self.folder} was deleted, or its spec.json was, while this process was at work; nothing more is "
                "written. The same command computes what is missing"
            )

    @property
    def spec(self) -> dict[str, Any]:
        """Raises UnreadableError, also for a cell of a later format, or FileNotFoundError."""
        path = self.folder / "spec.json"
        spec = document(path, dict[str, Any])
        if isinstance(found := spec.get("format", FORMAT), int) and found > FORMAT:
            raise UnreadableError(
                f"{path}: format {found}, but this version of attrib reads {FORMAT}; take a newer one"
            )
        return spec

    def write_spec(self, spec: Mapping[str, Any]) -> None:
        """Once: every writer of a cell would write the same."""
        if not (self.folder / "spec.json").exists():
            write_json(self.folder / "spec.json", spec)

    def write_samples(self, uids: Sequence[str], fingerprints: Mapping[str, str]) -> None:
        """Which samples the cell is about now: the whole selection, each with the fingerprint that counts.

        ``fingerprints`` holds those known now. For other uids, and for files that cannot be read now, the
        fingerprint noted earlier stays. Data that was taken away or changed later is not in the cell's table.
        """
        # Two shards that write in the same instant may lose each other's fingerprints. Then the latest
        # result of those samples counts, until the next run.
        before = self.samples()
        readable = {uid: value for uid, value in fingerprints.items() if value != UNREADABLE}
        after = {uid: readable.get(uid, before.get(uid)) for uid in uids}
        if after != before or not self._samples_path.exists():
            write_json(self._samples_path, after)

    def samples(self) -> dict[str, str | None]:
        """uid -> fingerprint that counts, None for a sample no run has looked at yet (``limit``, ``shard``).

        Empty where nobody has written it. Raises UserError if the file is damaged.
        """
        if not os.path.lexists(self._samples_path):
            return {}
        try:
            return document(self._samples_path, SampleList, LISTING)
        except OSError as error:
            raise UserError(
                f"{self._samples_path} does not map samples to fingerprints ({_reason(self._samples_path, error)}); "
                "delete it, the next run of the cell writes it anew"
            ) from error

    def about(self) -> dict[str, str | None] | None:
        """As ``samples``, but None where nobody has written it: then all that is stored counts, see ``counts``."""
        return self.samples() if os.path.lexists(self._samples_path) else None

    @property
    def _samples_path(self) -> Path:
        return self.folder / "samples.json"

    def scores(self, metric: str) -> ScoreRows:
        """``metric`` is the folder's name, ``<name>.<key8>``."""
        return ScoreRows(self.folder / "scores" / metric, self.writer, **self._how)

    def curves(self, metric: str) -> Arrays:
        return Arrays(self.folder / "scores" / metric, self.writer, **self._how)

    def metrics(self) -> list[str]:
        """Names of the score folders that exist."""
        return sorted(p.name for p in (self.folder / "scores").glob("*") if p.is_dir())

    def misplaced(self) -> list[Path]:
        """What lies in the place of the cell's folders of scores and failures, but is no folder."""
        places = [self.folder / "scores", self.folder / "failures", *(self.folder / "scores").glob("[!.]*")]
        return [path for path in places if os.path.lexists(path) and not path.is_dir()]


def counts(about: Mapping[str, str | None] | None, uid: str, fingerprint: str) -> bool:
    """Whether a stored result is of a sample as it is now. ``about``: see ``Cell.about``."""
    return about is None or (uid in about and about[uid] in (None, fingerprint))


def cells(root: Path) -> list[Cell]:
    """Every cell below a work directory, in the order of their names: a folder with a spec.json, whatever that is."""
    try:
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [Cell(Path(root, name)) for name in folders if os.path.lexists(Path(root, name, "spec.json"))]
