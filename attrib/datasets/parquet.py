"""Images in tables of Hugging Face: Parquet shards, and the folders that ``datasets`` saves."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
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
            except (OSError, pa.ArrowException):
                continue  # the shard is damaged, which its scan says
        return {}

    def _columns(self, shard: Path) -> list[str]:
        """Raises UserError if the table lacks one."""
        there = self.schema(shard).names
        for field, column in (("image", self._image), ("label", self._label)):
            if column is not None and column not in there:
                raise UserError(f"dataset.{field}: {shard} has no column {column!r}; it has {', '.join(there)}")
        return [self._image, *([self._label] if self._label else [])]

    def _found(self, shard: Path, batch: pa.RecordBatch, at: int) -> Iterator[Found]:
        """``at``: the place of the first row; the others follow."""
        images = batch.column(self._image)
        labels = batch.column(self._label).to_pylist() if self._label else [None] * len(batch)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            content, path = _bytes(image.as_py())
            where = f"{shown(str(shard))}: row {at + number & _ROW} of group {at >> 32}"
            name = stem_of(path) if path else ""
            if content is None:
                why = f"a path without bytes ({path})" if path else "empty"
                yield Found.bad(name, f"{where}: its image is {why}")
            elif isinstance(label, (list, dict, float)):
                yield Found.bad(name, f"{where}: its label is {label!r}, not one class")
            else:
                text = "" if label is None else f"#{label}" if isinstance(label, int) else str(label)
                yield Found.of(name, text, at + number, content)


def _bytes(value: Any) -> tuple[bytes | None, str]:
    """Content and path of a cell."""
    if isinstance(value, dict):
        return value.get("bytes"), value.get("path") or ""
    return (value if isinstance(value, bytes) else None), ""


def class_names(schema: pa.Schema, column: str | None) -> dict[int, str]:
    """What Hugging Face has written in a table about the classes of a column; nothing if it has not."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return {i: str(name) for i, name in enumerate(about["names"])}
    except (KeyError, TypeError, ValueError):
        return {}


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
        return pq.read_schema(shard)

    def scan(self, shard: Path) -> Iterator[Found]:
        columns = self._columns(shard)
        with pq.ParquetFile(shard) as file:
            for group in range(file.num_row_groups):
                at = group << 32
                for batch in file.iter_batches(_ROWS, row_groups=[group], columns=columns, use_threads=False):
                    yield from self._found(shard, batch, at)
                    at += len(batch)

    def read(self, shard: Path, at: int, size: int) -> bytes:
        group, row = at >> 32, at & _ROW
        with self._lock:
            if (shard, group) not in self._groups:
                with pq.ParquetFile(shard) as file:
                    table = file.read_row_group(group, columns=[self._image], use_threads=False)
                self._groups[shard, group] = table[self._image]
                while len(self._groups) > _GROUPS:
                    self._groups.popitem(last=False)
            self._groups.move_to_end((shard, group))
            return _checked(self._groups[shard, group][row], size)


class ArrowShards(TableShards):
    """``*.arrow`` below ``root``, as ``datasets.Dataset.save_to_disk`` leaves them; the package is not needed."""

    SUFFIX = ".arrow"

    def schema(self, shard: Path) -> pa.Schema:
        with pa.memory_map(str(shard)) as source, pa.ipc.open_stream(source) as reader:
            return reader.schema

    def scan(self, shard: Path) -> Iterator[Found]:
        columns = self._columns(shard)
        with pa.memory_map(str(shard)) as source, pa.ipc.open_stream(source) as reader:
            for number, batch in enumerate(reader):
                yield from self._found(shard, batch.select(columns), number << 32)

    def read(self, shard: Path, at: int, size: int) -> bytes:
        # A batch of the stream has no address of its own, but passing over one reads only its header.
        with pa.memory_map(str(shard)) as source, pa.ipc.open_stream(source) as reader:
            for _ in range(at >> 32):
                reader.read_next_batch()
            return _checked(reader.read_next_batch().column(self._image)[at & _ROW], size)


def _checked(cell: pa.Scalar, size: int) -> bytes:
    content, _ = _bytes(cell.as_py())
    if content is None or len(content) != size:
        raise ValueError("has changed since its shard was read")
    return content
