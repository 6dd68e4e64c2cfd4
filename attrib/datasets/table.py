"""Texts in a table: CSV or TSV, also compressed, JSON lines, Parquet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from attrib.datasets.files import existing_folder, is_number, shown
from attrib.datasets.records import (
    JSON_LINES,
    SEPARATORS,
    Record,
    csv_records,
    json_records,
    parquet_names,
    parquet_records,
    plain_path,
    text_of,
)
from attrib.datasets.text import TextDataset, check_encoding
from attrib.datasets.tokens import Encoder
from attrib.types import SampleError, UserError


class _Row(NamedTuple):
    text: str
    label: int
    problem: str = ""  # why there is no text


class TextTable(TextDataset):
    """A text in each row of a table with a header, or in each object of JSON lines.

    path       .csv, .tsv or .jsonl, also .gz, or .parquet, where * may stand for the number of a shard; below ``root``
               if that is given; ``{split}`` in it stands for ``split``
    text       name of the column with the text
    label      column with names in ``classes``, or with class indices: what is a name is never read as an index.
               Empty and -1 are unknown. None: there are no labels
    id         column that names the samples; None takes the line in which the record begins, or the row of a Parquet
               file, counted from 0, so that a line put in between renames all that follow
    separator  None: comma for .csv, tab for .tsv
    quoting    may a field stand in double quotes? None: in .csv yes; in .tsv no, quotes are ordinary characters there
    classes    class names in the order of their indices; None: those that Hugging Face has written in a Parquet file,
               else the net's, if the column has only names

    A uid is the file's name and the id or line, ``test/000012``, behind the split where a folder alone says it
    (``{split}/reviews.csv``: ``test/reviews/000012``). A record with too few or too many fields, a line that is no
    JSON, a text that is missing and a Parquet file that is damaged are samples that cannot be read.

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
        columns = {"text": text, "label": label, "id": id}
        names = list(classes or ())
        written_names: list[str] = []
        self._rows: dict[str, _Row] = {}
        labels: dict[str, str] = {}  # as written -> where first
        for file in self._files():
            if not names and file.suffix == ".parquet":
                names = parquet_names(file, label)
            stem = shown(plain_path(file).stem)
            # A folder for each split may hold a file of the same name.
            prefix = stem if split is None or in_name else f"{split}/{stem}"
            records = list(_records(file, columns, encoding, separator, quoting))
            if not names and label is not None:
                names = written_names = _names_in(records, label)
            for record in records:
                name, row = f"{record.number:06d}", _Row("", -1, record.problem)
                if not record.problem:
                    row, written = _row(record, text, label, names)
                    labels.setdefault(written, record.where)
                    name = name if id is None else _name(_text(record.fields.get(id)), record.where)
                uid = f"{prefix}/{name}"
                if uid in self._rows:
                    raise UserError(f"{record.where}: a second sample with the id {name}")
                self._rows[uid] = row
        if not self._rows:
            raise UserError(f"dataset.path: {shown(str(self._file))} has no rows")
        if all(row.problem for row in self._rows.values()):
            raise UserError(next(iter(self._rows.values())).problem)
        _check_mixture(labels, names)
        super().__init__(self._rows, encoder, dict(enumerate(names)))
        self.numbering = "labels" if written_names else "given"

    def _files(self) -> list[Path]:
        """Raises UserError for a pattern that nothing matches."""
        if "*" not in self._file.name or self._file.suffix != ".parquet":
            return [self._file]
        found = sorted(self._file.parent.glob(self._file.name))
        if not found:
            raise UserError(f"dataset.path: there is no {shown(str(self._file))}")
        return found

    def text(self, uid: str) -> str:
        row = self._rows[uid]
        if row.problem:
            raise SampleError(row.problem)
        return row.text

    def label(self, uid: str) -> int:
        return self._rows[uid].label


def _records(
    path: Path, columns: Mapping[str, str | None], encoding: str, separator: str | None, quoting: bool | None
) -> Iterator[Record]:
    """The rows of a file, by its suffix. Raises UserError."""
    kind = plain_path(path).suffix.lower()
    if path.suffix == ".parquet":
        if not path.is_file():
            raise UserError(f"dataset.path: {shown(str(path))} cannot be read: there is no such file")
        return parquet_records(path, columns)
    if kind in JSON_LINES and separator is None:
        return json_records(path, text_of(path, encoding))
    separator = SEPARATORS.get(kind) if separator is None else separator
    if separator is None or len(separator) != 1:
        raise UserError(
            f"dataset.separator: one character must separate the fields of {shown(str(path))}"
            + (f", not {separator!r}" if separator else "; only .csv and .tsv files need not say which")
        )
    quoted = separator == "," if quoting is None else quoting
    return csv_records(path, text_of(path, encoding), columns, separator, quoted)


def _names_in(records: Sequence[Record], label: str) -> list[str]:
    """The names in a column of labels, in alphabetical order; none if a number is among them."""
    names = {_text(record.fields.get(label)) for record in records if not record.problem} - {"", "-1"}
    return [] if any(map(is_number, names)) else sorted(names)


def _row(record: Record, text: str, label: str | None, names: Sequence[str]) -> tuple[_Row, str]:
    """The sample of a record, and its label as it is written."""
    found, given = record.fields.get(text), None if label is None else record.fields.get(label)
    if not isinstance(found, str):
        what = f"{text!r} is {type(found).__name__}" if text in record.fields else f"there is no {text!r}"
        return _Row("", -1, f"{record.where}: {what}, so it has no text; it has {', '.join(record.fields)}"), ""
    if isinstance(given, (list, dict, bool)):
        return _Row("", -1, f"{record.where}: label {given!r} is not one class"), ""
    written = _text(given)
    return _Row(found, _class(written, names, record.where)), written


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


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
