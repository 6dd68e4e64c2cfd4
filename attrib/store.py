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

import json
import os
import secrets
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from attrib.types import UNREADABLE, UserError

Key = tuple[str, str]  # (uid, fingerprint)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file or nothing, also when the machine dies in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A process number alone is not unique: containers on two machines often have the same.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


class _Buffered:
    """Samples gathered in memory until there are enough of them, or enough seconds passed.

    A fast method therefore writes few files, and a slow one (more than ``seconds`` a sample)
    flushes after each sample.
    """

    SUFFIX: ClassVar[str]

    def __init__(self, folder: Path, writer: str, *, seconds: float, count: int) -> None:
        self.folder, self.writer = Path(folder), writer
        self._seconds, self._count = seconds, count
        self._pending: dict[Key, Any] = {}
        self._since = time.monotonic()
        self._number = 0
        self.broken: list[str] = []  # files that could not be read; their samples count as missing

    def _add(self, key: Key, value: Any) -> None:
        self._pending[key] = value

    def flush_if_due(self) -> bool:
        """Called between batches, when all parts of a sample have been added."""
        due = len(self._pending) >= self._count or time.monotonic() - self._since >= self._seconds
        if due and self._pending:
            self.flush()
            return True
        return False

    def flush(self) -> None:
        """Make everything added so far durable."""
        if self._pending:
            write_atomic(self._next(), self._encoded())
            self._pending = {}
        self._since = time.monotonic()

    def _next(self) -> Path:
        """A name that is not taken, also not by an earlier object of the same writer."""
        while True:
            self._number += 1
            path = self.folder / f"{self.writer}-{self._number:05d}{self.SUFFIX}"
            if not path.exists():
                return path

    def _encoded(self) -> bytes:
        """What is pending, as the content of one file."""
        raise NotImplementedError


@dataclass(frozen=True)
class Record:
    """Where a stored sample lies, and what was noted beside it."""

    path: Path
    position: int
    names: tuple[str, ...]
    crc: Mapping[str, int]
    info: Mapping[str, Any]


class Arrays(_Buffered):
    """Named arrays per sample, any shape, in chunks that hold all arrays of some samples."""

    SUFFIX = ".safetensors"

    def __init__(self, folder: Path, writer: str = "", *, seconds: float = 5.0, count: int = 256) -> None:
        super().__init__(folder, writer, seconds=seconds, count=count)
        self._index: dict[Key, Record] | None = None
        self._seen: set[str] = set()

    def add(self, uid: str, fingerprint: str, arrays: Mapping[str, np.ndarray], **info: Any) -> None:
        """Remember one sample. ``info`` is anything JSON can hold (seconds, rows)."""
        self._add((uid, fingerprint), ({k: _packed(v) for k, v in arrays.items()}, info))

    def _encoded(self) -> bytes:
        tensors: dict[str, np.ndarray] = {}
        samples = []
        for i, ((uid, fingerprint), (arrays, info)) in enumerate(self._pending.items()):
            tensors |= {f"{i}/{name}": value for name, value in arrays.items()}
            crc = {name: zlib.crc32(value.data) for name, value in arrays.items()}
            samples.append({"uid": uid, "fingerprint": fingerprint, "crc": crc, "info": info})
        return to_safetensors(tensors, {"samples": json.dumps(samples)})

    def index(self) -> Mapping[Key, Record]:
        """Every stored sample; new files of other writers are seen at each call."""
        if self._index is None:
            self._index = {}
        for path in sorted(self.folder.glob("[!.]*.safetensors")):
            if path.name in self._seen:
                continue
            self._seen.add(path.name)
            try:
                with safe_open(path, framework="numpy") as file:
                    samples = json.loads(file.metadata()["samples"])
                self._index |= {
                    (s["uid"], s["fingerprint"]): Record(path, i, tuple(s["crc"]), s["crc"], s["info"])
                    for i, s in enumerate(samples)
                }
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                self.broken.append(f"{path}: {error}")
        return self._index

    def read(self, key: Key, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """The arrays of one sample, also of one that is not flushed yet.

        Raises KeyError if it is not there, OSError if its chunk is damaged.
        """
        if key in self._pending:
            arrays = self._pending[key][0]
            return {name: arrays[name] for name in (arrays if names is None else names)}
        # The folder is listed again only for a sample that was not there before.
        record = (self._index or {}).get(key) or self.index()[key]
        names = record.names if names is None else tuple(names)
        for name in names:
            if name not in record.names:
                raise KeyError(f"{record.path} holds {', '.join(record.names)} of {key[0]}, but not {name}")
        try:
            with safe_open(record.path, framework="numpy") as file:
                arrays = {name: file.get_tensor(f"{record.position}/{name}") for name in names}
        except SafetensorError as error:
            raise OSError(f"{record.path} is damaged: {error}; delete the file") from error
        for name, value in arrays.items():
            if zlib.crc32(value.data) != record.crc[name]:
                raise OSError(f"{record.path} is damaged: wrong checksum of {name} of {key[0]}; delete the file")
        return arrays


def _packed(value: np.ndarray) -> np.ndarray:
    """In C order and the machine's byte order. (``ascontiguousarray`` would make 0-d arrays 1-d.)"""
    value = np.asarray(value, order="C")
    return value.astype(value.dtype.newbyteorder("="), copy=False)


class Rows(_Buffered):
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

    SUFFIX = ".parquet"

    def __init__(self, folder: Path, writer: str = "", *, seconds: float = 5.0, count: int = 4096) -> None:
        super().__init__(folder, writer, seconds=seconds, count=count)

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

    def _encoded(self) -> bytes:
        rows = [row for sample in self._pending.values() for row in sample]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=self.SCHEMA), sink, write_page_checksum=True)
        return sink.getvalue().to_pybytes()

    def table(self) -> pa.Table:
        """All rows, also those of other writers; damaged files are left out and named in ``broken``."""
        tables, self.broken = [], []
        for path in sorted(self.folder.glob("[!.]*.parquet")):
            try:
                table = pq.read_table(path, partitioning=None, page_checksum_verification=True)
                # Not left to read_table(schema=...), which fills a column it does not find with nulls.
                if not table.schema.equals(self.SCHEMA):
                    raise pa.ArrowInvalid("not the columns of a score file")
                tables.append(table)
            except (pa.ArrowException, OSError) as error:
                self.broken.append(f"{path}: {error}")
        return pa.concat_tables(tables) if tables else self.SCHEMA.empty_table()

    def present(self) -> set[Key]:
        table = self.table()
        return set(zip(table["uid"].to_pylist(), table["fingerprint"].to_pylist(), strict=True))


class Ledger:
    """What could not be computed, and why: a history, nothing is ever taken out of it.

    Each writer appends to a file of its own, ``failures/<writer>.jsonl`` (without a name, ``failures.jsonl``),
    because file servers lose lines where two machines append to one file.
    """

    MAX_REASON = 1500  # keeps a line below the size that one write() delivers whole
    FIELDS = ("uid", "fingerprint", "stage", "reason")

    def __init__(self, folder: Path, writer: str = "") -> None:
        self.folder = Path(folder)
        self.path = self.folder / (f"failures/{writer}.jsonl" if writer else "failures.jsonl")
        self._known: set[tuple[str, ...]] | None = None

    def add(self, uid: str, fingerprint: str, stage: str, reason: str) -> None:
        """``stage`` is "load", "maps" or the metric's folder of scores, ``<name>.<key8>``.

        What the ledger said already when this object first wrote is not said again.
        """
        if self._known is None:
            self._known = {tuple(entry[name] for name in self.FIELDS) for entry in self.entries()}
        fields = (uid, fingerprint, stage, reason[: self.MAX_REASON])
        if fields in self._known:
            return
        self._known.add(fields)
        entry = {**dict(zip(self.FIELDS, fields, strict=True)), "time": time.time()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # The leading newline ends a line that a killed writer left unfinished.
        line = ("\n" + json.dumps(entry) + "\n").encode()
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, line)
            os.fsync(handle)
        finally:
            os.close(handle)

    def entries(self) -> list[dict[str, Any]]:
        """What all writers noted, in the order of time."""
        found = []
        for path in (self.folder / "failures.jsonl", *sorted(self.folder.glob("failures/[!.]*.jsonl"))):
            for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
                try:
                    found.append(json.loads(line))
                except json.JSONDecodeError:
                    continue  # blank, or torn by a kill
        return sorted(found, key=lambda entry: entry["time"])


class Cell:
    """One folder of the work directory: one dataset, model and method."""

    def __init__(self, folder: Path, writer: str = "", *, flush_seconds: float = 5.0) -> None:
        self.folder, self.writer, self._flush_seconds = Path(folder), writer, flush_seconds
        self.maps = Arrays(self.folder / "maps", writer, seconds=flush_seconds)
        self.ledger = Ledger(self.folder, writer)

    @property
    def spec(self) -> dict[str, Any]:
        return json.loads((self.folder / "spec.json").read_text())

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
        if not self._samples_path.exists():
            return {}
        try:
            return dict(json.loads(self._samples_path.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{self._samples_path} does not map samples to fingerprints ({error}); "
                "delete it, the next run of the cell writes it anew"
            ) from error

    @property
    def _samples_path(self) -> Path:
        return self.folder / "samples.json"

    def scores(self, metric: str) -> Rows:
        """``metric`` is the folder's name, ``<name>.<key8>``."""
        return Rows(self.folder / "scores" / metric, self.writer, seconds=self._flush_seconds)

    def curves(self, metric: str) -> Arrays:
        return Arrays(self.folder / "scores" / metric, self.writer, seconds=self._flush_seconds)

    def metrics(self) -> list[str]:
        """Names of the score folders that exist."""
        return sorted(p.name for p in (self.folder / "scores").glob("*") if p.is_dir())


def cells(root: Path) -> list[Cell]:
    """Every cell below a work directory, in the order of their names."""
    return [Cell(p.parent) for p in sorted(Path(root).glob("*/spec.json"))]
