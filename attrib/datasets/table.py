"""Texts in a table: CSV or TSV, also compressed."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from attrib.datasets.files import existing_folder
from attrib.datasets.text import TextDataset, check_encoding, decode
from attrib.datasets.tokens import Encoder
from attrib.types import SampleError, UserError

SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}


class _Row(NamedTuple):
    text: str
    label: int
    problem: str = ""  # why there is no text


def _read(path: Path, field: str) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{field}: {path} cannot be read: {error}") from error


def _records(content: str, separator: str, quoting: bool, where: str) -> Iterator[tuple[int, list[str]]]:
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


class TextTable(TextDataset):
    """A text in each row of a table with a header.

    path       .csv or .tsv, also .gz; below ``root`` if that is given; ``{split}`` in it stands for ``split``
    text       name of the column with the text
    label      column with names in ``classes``, or with class indices: what is a name is never read as an index.
               Empty and -1 are unknown. None: there are no labels
    id         column that names the samples; None takes the line in which the record begins, so that a line put in
               between renames all that follow
    separator  None: comma for .csv, tab for .tsv
    quoting    may a field stand in double quotes? None: in .csv yes; in .tsv no, quotes are ordinary characters there
    classes    class names in the order of their indices

    A uid is the file's name and the id or line, ``test/000012``, behind the split where a folder alone says it
    (``{split}/reviews.csv``: ``test/reviews/000012``). A record with too few or too many fields is a sample that cannot
    be read.

    Raises UserError, naming field, file and line, for a table that cannot be read or lacks a column, a wrong label,
    an id twice, a NUL character or a field beyond csv's limit.
    """

    def __init__(
        self,
        path: str,
        encoder: Encoder | None = None,
        text: str = "text",
        label: str | None = "label",
        id: str | None = None,
        separator: str | None = None,
        encoding: str = "utf-8",
        quoting: bool | None = None,
        classes: Sequence[str] | None = None,
        root: str | None = None,
        split: str | None = None,
    ) -> None:
        check_encoding(encoding)
        if (split is not None) != ("{split}" in path):
            raise UserError(
                f"dataset.split: {split} has no place in dataset.path={path}; there, {{split}} stands for it"
                if split is not None
                else f"dataset.split: which one? It takes the place of {{split}} in dataset.path={path}"
            )
        in_name = "{split}" in Path(path).name
        path = path.replace("{split}", split or "")
        self._file = Path(path).expanduser() if root is None else existing_folder(root, "dataset.root") / path
        plain = self._file.with_suffix("") if self._file.suffix == ".gz" else self._file
        separator = SEPARATORS.get(plain.suffix.lower()) if separator is None else separator
        if separator is None or len(separator) != 1:
            raise UserError(
                f"dataset.separator: one character must separate the fields of {self._file}"
                + (f", not {separator!r}" if separator else "; only .csv and .tsv files need not say which")
            )
        where = f"dataset.path: {self._file}"
        # A folder for each split may hold a file of the same name.
        prefix = plain.stem if split is None or in_name else f"{split}/{plain.stem}"
        try:
            content = decode(_read(self._file, "dataset.path"), encoding, where)
        except SampleError as error:
            raise UserError(str(error)) from error
        if "\0" in content:
            line = content.count("\n", 0, content.index("\0")) + 1
            raise UserError(f"{where}, line {line}: a NUL character; is it text, and is it {encoding}?")
        names = list(classes or ())
        records = _records(content, separator, separator == "," if quoting is None else quoting, where)
        _, header = next(records, (0, []))
        if not header:
            raise UserError(f"{where} is empty; its first line must name the columns")
        for field, column in (("text", text), ("label", label), ("id", id)):
            if column is not None and header.count(column) != 1:
                what = "no column" if column not in header else "more than one column"
                raise UserError(f"dataset.{field}: {self._file} has {what} {column!r}; it has {', '.join(header)}")
        self._rows: dict[str, _Row] = {}
        labels: dict[str, str] = {}  # as written -> where first
        for line, fields in records:
            at, name = f"{where}, line {line}", f"{line:06d}"
            if len(fields) == len(header):
                record = dict(zip(header, fields))
                written = "" if label is None else record[label].strip()
                row = _Row(record[text], _class(written, names, at))
                labels.setdefault(written, at)
                name = name if id is None else _name(record[id].strip(), at)
            else:
                row = _Row("", -1, f"{at}: {len(fields)} fields instead of {len(header)}")
            uid = f"{prefix}/{name}"
            if uid in self._rows:
                raise UserError(f"{at}: a second sample with the id {name}")
            self._rows[uid] = row
        if not self._rows:
            raise UserError(f"{where} has no rows")
        _check_mixture(labels, names)
        super().__init__(self._rows, encoder, dict(enumerate(names)))

    def text(self, uid: str) -> str:
        row = self._rows[uid]
        if row.problem:
            raise SampleError(row.problem)
        return row.text

    def label(self, uid: str) -> int:
        return self._rows[uid].label


def _plain(text: str, names: Sequence[str]) -> str:
    """Without the .0 that pandas writes behind whole numbers in a column with gaps."""
    return text if text in names else text.removesuffix(".0")


def _class(text: str, names: Sequence[str], where: str) -> int:
    text = _plain(text, names)
    if text in names:
        return names.index(text)
    if text in ("", "-1"):
        return -1
    if not text.isdecimal():
        known = f"; dataset.classes has {', '.join(names)}" if names else "; give the names as dataset.classes"
        raise UserError(f"{where}: label {text!r} is neither a class index nor a known name{known}")
    if names and int(text) >= len(names):
        raise UserError(f"{where}: label {text} is not one of the {len(names)} in dataset.classes")
    return int(text)


def _check_mixture(labels: Mapping[str, str], names: Sequence[str]) -> None:
    """Where numbers are names, a column must not hold indices too: nobody could tell which of them "1" is.

    ``labels`` as they are written, and where. Raises UserError.
    """
    numbers = {plain: where for text, where in labels.items() if (plain := _plain(text, names)).isdecimal()}
    shifted = [text for text in numbers if text in names and names.index(text) != int(text)]
    for text, where in numbers.items():
        if shifted and text not in names:
            raise UserError(
                f"{where}: label {text!r} is a class index and no name in dataset.classes, but {shifted[0]!r} "
                f"({numbers[shifted[0]]}) is the name of class {names.index(shifted[0])}; give the classes names that "
                "are not numbers, or write names only"
            )


def _name(text: str, where: str) -> str:
    """An id becomes a part of a uid."""
    if not text or not text.isprintable() or {"", ".", ".."} & set(text.split("/")):
        raise UserError(f"{where}: id {text!r} is empty or no name for a sample")
    return text
