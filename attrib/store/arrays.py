"""Chunks of arrays: maps, curves and inputs of some samples in one safetensors file."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
from safetensors import SafetensorError, safe_open

from attrib.store.files import Buffered, Key, check_owner, owner
from attrib.store.listing import Folder, Memory, Stamp, stamp_of
from attrib.store.reading import UnreadableError, line, parsed, regular
from attrib.store.schemas import SampleNote

# What libraries raise for a file that is not what it should be.
READING = (SafetensorError, pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError)

_DTYPES = {
    "bool": "BOOL", "float16": "F16", "float32": "F32", "float64": "F64", "complex64": "C64",
    **{f"{sign * 'u'}int{bits}": f"{'IU'[sign]}{bits}" for sign in (0, 1) for bits in (8, 16, 32, 64)},
}  # fmt: skip


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


LONGEST = 1e9  # seconds that a sample can have taken


def mean_seconds(records: Iterable[Record]) -> float | None:
    """Mean of the seconds noted beside samples; without those of which none are noted, or nothing that can be."""
    noted = (record.info.get("seconds") for record in records)
    seconds = [value for value in noted if value is not None and 0 <= value <= LONGEST]
    return sum(seconds) / len(seconds) if seconds else None


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

    def _encoded(self, samples: Mapping[Key, Any]) -> list[bytes | memoryview]:
        tensors: dict[str, np.ndarray] = {}
        described = []
        for i, ((uid, fingerprint), (arrays, info)) in enumerate(samples.items()):
            tensors |= {f"{i}/{name}": value for name, value in arrays.items()}
            crc = {name: zlib.crc32(value.data) for name, value in arrays.items()}
            described.append({"uid": uid, "fingerprint": fingerprint, "crc": crc, "info": info})
        text = json.dumps(described)
        about = {"samples": text, "crc": str(zlib.crc32(text.encode())), "owner": owner(self.folder)}
        return to_safetensors(tensors, about)

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
            known = sorted(self._chunks)
            some = set(known[:: max(1, len(known) // chunks)])
            return [record for record in self._index.values() if record.chunk in some]
        names = self._unread().new()
        found = (self._read_chunk(name, blame=False) for name in names[:: max(1, len(names) // chunks)])
        return [Record(self.folder, "", i, noted) for part in found if part for i, (_, noted) in enumerate(part[1])]

    def _read_chunk(self, name: str, blame: bool = True) -> tuple[Stamp, list[_Noted]] | None:
        """What a chunk says of its samples; None if it cannot be read."""
        path = self.folder / name
        try:
            stamp = stamp_of(path)  # before: if it is changed meanwhile, what is remembered will not fit
            with safe_open(path, framework="numpy") as file:
                samples = described(file, path)
            return stamp, [((s["uid"], s["fingerprint"]), _note(s["crc"], s["info"])) for s in samples]
        except READING as error:
            if blame and not isinstance(error, FileNotFoundError):
                self.broken.append(line(path, error))
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


def to_safetensors(tensors: Mapping[str, np.ndarray], about: Mapping[str, str]) -> list[bytes | memoryview]:
    """A file of the format, in parts; arrays in C order are not copied. Raises TypeError for what it has no name for.

    The library's own ``save`` holds Python's lock, 60 ms for 50 MB, while the next batch is to be explained; its
    ``save_file`` leaves a file of an unknown name behind if it is killed.
    """
    header: dict[str, Any] = {"__metadata__": dict(about)}
    parts, end = [], 0
    for name, value in sorted(tensors.items(), key=lambda item: -item[1].itemsize):  # so that all are aligned
        value = _packed(value)
        if value.dtype.name not in _DTYPES:
            raise TypeError(f"{name} has the type {value.dtype}, which cannot be stored")
        start, end = end, end + value.nbytes
        header[name] = {"dtype": _DTYPES[value.dtype.name], "shape": value.shape, "data_offsets": (start, end)}
        parts.append(value.reshape(-1).view(np.uint8).data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *parts]


def described(chunk: Any, path: Path) -> list[SampleNote]:
    """What an open chunk says of its samples, in their order.

    Raises ValueError or KeyError if it is damaged, or another folder's.
    """
    about = chunk.metadata() or {}
    check_owner(about.get("owner"), path)
    crc = zlib.crc32(about["samples"].encode())
    if int(about.get("crc", crc)) != crc:  # earlier versions wrote none
        raise ValueError("wrong checksum of what it says of its samples")
    return parsed(about["samples"], list[SampleNote])


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
