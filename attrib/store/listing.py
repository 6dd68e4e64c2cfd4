"""What a folder of chunks holds, without opening every file again.

A slow method leaves a chunk per batch, so a cell may consist of fifty thousand small files. What they
say of themselves is remembered in one more file of the folder, together with each chunk's size and time of change.
It is only a memory: where it is missing, damaged, or speaks of a chunk that is not as it was, the chunk itself is read.
Several processes may write it at once; the last one wins, and all of them are right.
"""

from __future__ import annotations

import logging
import os
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from attrib.store.files import write_atomic
from attrib.store.reading import LISTING, content, regular

log = logging.getLogger(__name__)

Stamp = tuple[int, int, int]  # size in bytes; time of the last change of content and of anything, in ns

FORMAT = b"attrib 1"  # another number for another layout: a memory of another version is not used
NO_STAMP: Stamp = (-1, -1, -1)  # of what is no file that can be read
RACY = 2_000_000_000  # ns; a change this close to another may leave the times as they are (FAT counts in 2 s)
SHARE = 50  # a patient listing waits this many times as long as the last one took
FEW = 64  # so many chunks are read sooner than a memory of them is written

_CHUNKS = pa.schema([("name", pa.string()), *((field, pa.int64()) for field in ("size", "mtime", "ctime", "rows"))])


def stamp_of(path: str | os.PathLike | os.DirEntry) -> Stamp:
    """Raises OSError, also for what is no regular file."""
    found = regular(path)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def settled(stamp: Stamp, now: int) -> bool:
    """Whether a later change would show in the stamp, which was taken at ``now`` (Unix time in ns)."""
    return now - max(stamp[1:]) >= RACY


class Memory(NamedTuple):
    """Which chunks were read, and their rows, one chunk after the other."""

    stamps: dict[str, Stamp]
    counts: Sequence[int]  # rows of each
    table: pa.Table


def pack(tables: Sequence[pa.Table]) -> bytes:
    """Tables as the content of one file, with a checksum over everything."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    for table in tables:
        with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
            writer.write_table(table)
    body = sink.getvalue()
    return FORMAT + zlib.crc32(body).to_bytes(4, "big") + body.to_pybytes()


def unpack(data: bytes, schemas: Sequence[pa.Schema]) -> list[pa.Table]:
    """Raises ValueError if it is not what :func:`pack` made of tables of these schemas."""
    at = len(FORMAT) + 4
    body = pa.py_buffer(data)[at:]
    if data[: len(FORMAT)] != FORMAT or zlib.crc32(body) != int.from_bytes(data[len(FORMAT) : at], "big"):
        raise ValueError("not a memory of this version, or damaged")
    tables, source = [], pa.BufferReader(body)
    for schema in schemas:
        table = pa.ipc.open_stream(source).read_all()
        if not table.schema.equals(schema):
            raise ValueError("a memory of something else")
        tables.append(table)
    return tables


class Folder:
    """The chunks of a folder.

    suffix   of their names; hidden files are no chunks
    memory   the name of the file that remembers them
    schema   of what is remembered of each sample
    """

    def __init__(self, path: Path, suffix: str, memory: str, schema: pa.Schema) -> None:
        self.path, self.suffix, self.memory, self.schema = path, suffix, path / memory, schema
        self._names: frozenset[str] = frozenset()
        self._changed = -1  # the folder's time of change when it was listed, -1 if that cannot be relied on
        self._wait_until = 0.0
        self.remembered = 0  # chunks in the memory, as far as this object knows

    # ---- which chunks there are ---------------------------------------------------------------

    def _is_chunk(self, name: str) -> bool:
        return name.endswith(self.suffix) and not name.startswith(".")

    def new(self, *, patient: bool = False) -> list[str]:
        """Names, sorted, that no earlier call gave; ``patient``: if it is not yet time to look, none."""
        start = time.monotonic()
        if patient and start < self._wait_until:
            return []
        try:
            changed = os.stat(self.path).st_mtime_ns
            if changed == self._changed:
                return []
            names = frozenset(filter(self._is_chunk, os.listdir(self.path)))
        except FileNotFoundError:
            return []
        # Within one tick of the clock the folder can change again and keep its time.
        self._changed = changed if time.time_ns() - changed >= RACY else -1
        found = sorted(names - self._names)
        self._names |= names
        end = time.monotonic()
        self._wait_until = end + SHARE * (end - start)
        return found

    def stamps(self) -> dict[str, Stamp]:
        """Of all chunks there are now, in the order of their names."""
        found = {}
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    if self._is_chunk(entry.name):
                        try:
                            found[entry.name] = stamp_of(entry)
                        except FileNotFoundError:
                            continue  # deleted meanwhile
                        except OSError:
                            found[entry.name] = NO_STAMP  # whoever reads it will hear why
        except FileNotFoundError:
            return {}
        return dict(sorted(found.items()))

    # ---- what they hold -----------------------------------------------------------------------

    def recall(self) -> Memory:
        """What is remembered of chunks that are as they were."""
        memory = self._recalled()
        return Memory({}, [], self.schema.empty_table()) if memory is None else memory

    def _recalled(self) -> Memory | None:
        """None if nothing can be used. No array is made of Python's objects: for the first, pyarrow imports pandas."""
        try:
            chunks, table = unpack(content(self.memory, LISTING), (_CHUNKS, self.schema))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, pa.ArrowException) as error:
            log.info("%s is not used: %s", self.memory, error)
            return None
        if any(column.null_count for part in (chunks, table) for column in part.columns):
            return None
        names, counts = chunks["name"].to_pylist(), np.array(chunks["rows"].to_pylist(), dtype=int)
        if (counts < 0).any():
            return None
        stamps = zip(*(chunks[field].to_pylist() for field in ("size", "mtime", "ctime")), strict=True)
        known, now = dict(zip(names, stamps, strict=True)), self.stamps()
        self.remembered = len(known)
        same = np.array([now.get(name) == stamp for name, stamp in known.items()], dtype=bool)
        if len(known) != len(names) or counts.sum() != len(table):
            return None
        if not same.all():
            table = table.filter(pa.array(np.repeat(same, counts)))
        kept = {name: stamp for (name, stamp), good in zip(known.items(), same, strict=True) if good}
        return Memory(kept, counts[same].tolist(), table)

    def due(self, chunks: int) -> bool:
        """Whether so many chunks are worth a new memory: what it does not hold is little, and writing it is rare."""
        return abs(chunks - self.remembered) >= max(FEW, chunks // 16)

    def remember(self, memory: Memory) -> None:
        """Nothing depends on it, so a full or read-only disk does no harm."""
        columns = list(zip(*memory.stamps.values(), strict=True)) or [(), (), ()]
        arrays = [list(memory.stamps), *map(list, columns), list(memory.counts)]
        chunks = pa.Table.from_arrays(
            [pa.array(values, field.type) for values, field in zip(arrays, _CHUNKS, strict=True)], schema=_CHUNKS
        )
        self.remembered = len(memory.stamps)
        try:
            write_atomic(self.memory, pack((chunks, memory.table)))
        except OSError as error:
            log.info("%s is not written: %s", self.memory, error)
