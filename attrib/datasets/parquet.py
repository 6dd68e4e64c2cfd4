"""Images in tables of Hugging Face: Parquet shards, and the folders that ``datasets`` saves."""

from __future__ import annotations

import json
import math
import mmap
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from attrib.datasets.files import shown
from attrib.datasets.shards import Found, ShardedImages, stem_of
from attrib.datasets.transform import ImageTransform
from attrib.types import UserError

_GROUPS = 2  # row groups that are kept: neighbours lie in the same one
_ROWS = 32  # read at once
_ROW = 0xFFFFFFFF  # of a place: the row in its group (Parquet) or batch (Arrow), whose number stands above


class TableShards(ShardedImages):
    """A column ``image`` of encoded bytes, or of {bytes, path}, and a column ``label``; see ``ShardedImages``.

    label   None: no labels

    Class names come from ``classes``, or from what Hugging Face has written about the column. The sample is named by
    its path, or where paths are missing or repeat, by shard and row.
    """

    def __init__(
        self,
        root: str,
        transform: ImageTransform,
        split: str | None = None,
        image: str = "image",
        label: str | None = "label",
        classes: str | None = None,
        index: str | None = None,
    ) -> None:
        self._image, self._label = image, label
        super().__init__(root, transform, split, classes, index, settings=(image, label))

    @abstractmethod
    def schema(self, shard: Path) -> pa.Schema:
        """Raises what pyarrow raises."""

    def _names(self) -> dict[int, str]:
        for shard in self._shards:
            try:
                return class_names(self.schema(shard), self._label)
            except (OSError, ValueError, pa.ArrowException):
                continue  # the shard is damaged, which its scan says
        return {}

    def _columns(self, shard: Path) -> list[str]:
        """Raises UserError if the table lacks one."""
        there = self.schema(shard).names
        for field, column in (("image", self._image), ("label", self._label)):
            if column is not None and column not in there:
                raise UserError(
                    f"dataset.{field}: {shown(str(shard))} has no column {column!r}; it has {', '.join(there)}"
                )
        return [self._image, *([self._label] if self._label else [])]

    def _found(self, shard: Path, batch: pa.RecordBatch, at: int) -> Iterator[Found]:
        """``at``: the place of the first row; the others follow."""
        images = _images(batch.column(self._image))
        labels = _texts(batch.column(self._label)).to_pylist() if self._label else [None] * len(batch)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            content, path, wrong = _cell(image.as_py())
            where = f"{shown(str(shard))}: row {at + number & _ROW} of group {at >> 32}"
            name, text = stem_of(path) if path else "", _label_text(label)
            if content is None:
                yield Found.bad(name, f"{where}: its image is {wrong}")
            elif text is None:
                yield Found.bad(name, f"{where}: its label is {label!r}, not one class; dataset.label=null reads none")
            else:
                yield Found.of(name, text, at + number, content)


def _texts(column: pa.Array) -> pa.Array:
    """Texts as their bytes, because nobody checks that they are UTF-8; others as they are."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    texts = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    return column.cast(pa.large_binary()) if texts else column


def _images(column: pa.Array) -> pa.Array:
    if not pa.types.is_struct(column.type):
        return column
    names = [field.name for field in column.type]
    parts = [_texts(column.field(i)) if name == "path" else column.field(i) for i, name in enumerate(names)]
    return pa.StructArray.from_arrays(parts, names, mask=column.is_null())


def _decoded(value: bytes) -> str:
    return shown(value.decode("utf-8", "surrogateescape"))


def _cell(value: Any) -> tuple[bytes | None, str, str]:
    """Content, path, and what is there instead of the content."""
    path = ""
    if isinstance(value, dict) and "bytes" in value:
        path = _decoded(value.get("path") or b"")
        value = value["bytes"]
        if value is None and path:
            return None, path, f"a path without bytes ({path})"
    if isinstance(value, bytes):
        return value, path, ""
    return None, path, "empty" if value is None else f"a {type(value).__name__}, not the bytes of an encoded image"


def _label_text(value: Any) -> str | None:
    """A label as the index has it; None for what is not one class."""
    if isinstance(value, bytes):
        return _decoded(value)
    if isinstance(value, float):  # whole numbers in a column with gaps, as pandas writes them
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    if value is None:
        return ""
    return f"#{value}" if type(value) is int else None


def class_names(schema: pa.Schema, column: str | None) -> dict[int, str]:
    """What Hugging Face has written in a table about the classes of a column; nothing if it has not."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return {i: str(name) for i, name in enumerate(about["names"])}
    except (KeyError, TypeError, ValueError):
        return {}


@contextmanager
def opened_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """By Python, because pyarrow opens no file whose name is not UTF-8. Raises what pyarrow raises."""
    with open(path, "rb") as file, pq.ParquetFile(file) as table:
        yield table


class ParquetShards(TableShards):
    """``*.parquet`` below ``root``, as Hugging Face stores a dataset.

    A row cannot be read alone, only its row group: the last two are kept, so samples in their order are read quickly.
    """

    SUFFIX = ".parquet"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._groups: OrderedDict[tuple[Path, int], pa.ChunkedArray] = OrderedDict()
        self._lock = Lock()
        super().__init__(*args, **kwargs)

    def schema(self, shard: Path) -> pa.Schema:
        with opened_parquet(shard) as file:
            return file.schema_arrow

    def scan(self, shard: Path) -> Iterator[Found]:
        columns = self._columns(shard)
        with opened_parquet(shard) as file:
            for group in range(file.num_row_groups):
                at = group << 32
                for batch in file.iter_batches(_ROWS, row_groups=[group], columns=columns, use_threads=False):
                    yield from self._found(shard, batch, at)
                    at += len(batch)

    def read(self, shard: Path, at: int, size: int) -> bytes:
        group, row = at >> 32, at & _ROW
        with self._lock:
            if (shard, group) not in self._groups:
                with opened_parquet(shard) as file:
                    table = file.read_row_group(group, columns=[self._image], use_threads=False)
                self._groups[shard, group] = table[self._image]
                while len(self._groups) > _GROUPS:
                    self._groups.popitem(last=False)
            self._groups.move_to_end((shard, group))
            return _checked(self._groups[shard, group], row, size)


class ArrowShards(TableShards):
    """``*.arrow`` below ``root``, as ``datasets.Dataset.save_to_disk`` leaves them; the package is not needed."""

    SUFFIX = ".arrow"

    def schema(self, shard: Path) -> pa.Schema:
        with _stream(shard) as reader:
            return reader.schema

    def scan(self, shard: Path) -> Iterator[Found]:
        columns = self._columns(shard)
        with _stream(shard) as reader:
            for number, batch in enumerate(reader):
                yield from self._found(shard, batch.select(columns), number << 32)

    def read(self, shard: Path, at: int, size: int) -> bytes:
        # A batch of the stream has no address of its own, but passing over one reads only its header.
        with _stream(shard) as reader:
            for _ in range(at >> 32):
                reader.read_next_batch()
            return _checked(reader.read_next_batch().column(self._image), at & _ROW, size)


@contextmanager
def _stream(shard: Path) -> Iterator[pa.RecordBatchStreamReader]:
    with open(shard, "rb") as file:
        mapped = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    with pa.ipc.open_stream(mapped) as reader:
        yield reader


def _checked(column: pa.Array | pa.ChunkedArray, row: int, size: int) -> bytes:
    cell = column[row]
    if isinstance(cell, pa.StructScalar) and cell.is_valid:  # its path need not be UTF-8
        cell = cell["bytes"]
    content = cell.as_py()
    if not isinstance(content, bytes) or len(content) != size:
        raise ValueError("has changed since its shard was read")
    return content
