"""Rows of text files: CSV and TSV, JSON lines, Parquet."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from attrib.datasets.files import shown
from attrib.datasets.parquet import class_names, opened_parquet
from attrib.datasets.text import decode
from attrib.types import SampleError, UserError

SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
JSON_LINES = (".jsonl", ".ndjson", ".json")


class Record(NamedTuple):
    """number: of the line or row; where: how messages call it; problem: why it cannot be used, "" if it can."""

    number: int
    where: str
    fields: Mapping[str, Any]
    problem: str = ""


def plain_path(path: Path) -> Path:
    """Without .gz."""
    return path.with_suffix("") if path.suffix == ".gz" else path


def text_of(path: Path, encoding: str) -> str:
    """Raises UserError for a file that cannot be read, is in another encoding or holds a NUL character."""
    where = f"dataset.path: {shown(str(path))}"
    try:
        data = path.read_bytes()
        content = decode(gzip.decompress(data) if path.suffix == ".gz" else data, encoding, where)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{where} cannot be read: {error}") from error
    except SampleError as error:
        raise UserError(str(error)) from error
    if "\0" in content:
        line = content.count("\n", 0, content.index("\0")) + 1
        raise UserError(f"{where}, line {line}: a NUL character; is it text, and is it {encoding}?")
    return content


def csv_records(
    path: Path, content: str, columns: Mapping[str, str | None], separator: str, quoting: bool
) -> Iterator[Record]:
    """``columns``: the names of those that are read, by the field of the configuration. Raises UserError."""
    where = f"dataset.path: {shown(str(path))}"
    lines = _csv_lines(content, separator, quoting, where)
    _, header = next(lines, (0, []))
    if not header:
        raise UserError(f"{where} is empty; its first line must name the columns")
    check_columns(path, columns, header)
    for line, fields in lines:
        at = f"{where}, line {line}"
        if len(fields) == len(header):
            yield Record(line, at, dict(zip(header, fields)))
        else:
            yield Record(line, at, {}, f"{at}: {len(fields)} fields instead of {len(header)}")


def check_columns(path: Path, columns: Mapping[str, str | None], header: Sequence[str]) -> None:
    """Raises UserError naming the field whose column is missing or there twice."""
    for field, column in columns.items():
        if column is not None and header.count(column) != 1:
            what = "no column" if column not in header else "more than one column"
            raise UserError(f"dataset.{field}: {shown(str(path))} has {what} {column!r}; it has {', '.join(header)}")


def _csv_lines(content: str, separator: str, quoting: bool, where: str) -> Iterator[tuple[int, list[str]]]:
    """(line in which it begins, fields) of each record that is not blank."""
    if not quoting:  # a record is a line, whatever characters are in it
        for number, text in enumerate(content.split("\n"), 1):
            if text.strip():
                yield number, text.removesuffix("\r").split(separator)
        return
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=separator, strict=True)
    line = 1
    try:
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:  # quotes that do not match swallow lines, up to csv's limit of 131,072 characters
        raise UserError(
            f"{where}, line {line}: {error}; if quotes are ordinary characters in this file, set "
            "dataset.quoting=false, else shorten the text"
        ) from error


def json_records(path: Path, content: str) -> Iterator[Record]:
    """An object in each line that is not blank; a line that holds none is a record with a problem."""
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        where = f"dataset.path: {shown(str(path))}, line {number}"
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Record(number, where, {}, f"{where}: cannot be read as JSON: {error}")
            continue
        if isinstance(found, dict):
            yield Record(number, where, found)
        else:
            yield Record(number, where, {}, f"{where}: {type(found).__name__} instead of an object")


def parquet_names(path: Path, label: str | None) -> list[str]:
    """The classes that Hugging Face has written in a Parquet file; none if it has not, or the file is damaged."""
    try:
        with opened_parquet(path) as file:
            return list(class_names(file.schema_arrow, label).values())
    except (OSError, pa.ArrowException):
        return []


_BROKEN = object()  # a text that is no UTF-8


def _cells(column: pa.Array) -> list[Any]:
    def one(cell: pa.Scalar) -> Any:
        try:
            return cell.as_py()
        except UnicodeDecodeError:
            return _BROKEN

    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [one(cell) for cell in column]


def parquet_records(path: Path, columns: Mapping[str, str | None]) -> Iterator[Record]:
    """Rows, counted from 0; a file that is damaged is one record with a problem. Raises UserError like CSV."""
    where, number = f"dataset.path: {shown(str(path))}", 0
    try:
        with opened_parquet(path) as file:
            check_columns(path, columns, file.schema_arrow.names)
            wanted = [column for column in dict.fromkeys(columns.values()) if column is not None]
            for batch in file.iter_batches(columns=wanted, use_threads=False):
                cells = [_cells(batch.column(name)) for name in wanted]
                for row in zip(*cells, strict=True):
                    fields, at = dict(zip(wanted, row)), f"{where}, row {number}"
                    broken = [name for name, value in fields.items() if value is _BROKEN]
                    yield Record(number, at, fields, f"{at}: {broken[0]!r} is no UTF-8" if broken else "")
                    number += 1
    except (OSError, pa.ArrowException) as error:
        yield Record(number, where, {}, f"{where}: damaged or cut short after {number} rows: {error}")
