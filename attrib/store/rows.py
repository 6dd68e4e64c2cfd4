"""Score rows, in Parquet files."""

from __future__ import annotations

import functools
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from attrib.store.arrays import READING
from attrib.store.files import Buffered, Key, check_owner, owner
from attrib.store.listing import Folder, Memory, Stamp
from attrib.store.reading import UnreadableError, line, regular

CHECKSUM = b"crc"  # of the rows, among the metadata of a file; earlier versions wrote none
OWNER = b"owner"  # likewise
MOST_ROWS = 10_000_000  # of one file: a writer puts four thousand samples in it


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
        table = pa.Table.from_pylist([row for sample in samples.values() for row in sample], schema=self.SCHEMA)
        return packed(table, self.folder)

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
                self.broken.append(line(self.folder / name, error))
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
    with open(path, "rb") as source, pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False) as file:
        if file.metadata.num_rows > MOST_ROWS:
            raise UnreadableError(f"{path}: claims {file.metadata.num_rows} rows")
        table = file.read(list(columns) if columns else None, use_threads=False)
    # Not left to read_table(schema=...), which fills a column it does not find with nulls.
    if not (columns or table.schema.equals(ScoreRows.SCHEMA)):
        raise pa.ArrowInvalid("not the columns of a score file")
    about = table.schema.metadata or {}
    check_owner(about.get(OWNER, b"").decode(), path)
    if not columns and CHECKSUM in about and about[CHECKSUM] != str(_checksum(table)).encode():
        raise pa.ArrowInvalid("wrong checksum of its rows")
    return table.replace_schema_metadata(None)


def packed(rows: pa.Table, folder: Path) -> bytes:
    """Score rows as the content of a file in ``folder`` that :func:`read_rows` takes."""
    sink = pa.BufferOutputStream()
    about = {CHECKSUM: str(_checksum(rows)), OWNER: owner(folder)}
    pq.write_table(rows.replace_schema_metadata(about), sink, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def _checksum(table: pa.Table) -> int:
    """CRC-32 of all values. Parquet's own are of its pages: a bit that flips in a header still changes what is read."""
    crc = zlib.crc32(str(len(table)).encode())
    for column in table.columns:
        for values in _plain(column):
            crc = zlib.crc32(values, crc)
    return crc


def _plain(column: pa.ChunkedArray) -> list[bytes]:
    """The values of a column, however it is cut into chunks; of texts, their lengths and the texts."""
    if not pa.types.is_string(column.type):
        return [column.to_numpy().tobytes()]
    texts = [text.encode() for text in pc.fill_null(column, "").to_pylist()]
    return [np.array([len(text) for text in texts], dtype="<i4").tobytes(), *texts]
