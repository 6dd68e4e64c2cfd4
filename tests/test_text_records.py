"""Texts in JSON lines and in Parquet files of Hugging Face."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attrib.datasets import TextTable
from attrib.types import UNREADABLE, SampleError, UserError

ROWS = [("a fine film", 1), ("dull", 0), ("", None)]


def lines(path: Path, *rows: object) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def parquet(path: Path, rows=ROWS, names: list[str] | None = None, **more) -> str:
    table = pa.table(
        {"text": [t for t, _ in rows], "label": pa.array([label for _, label in rows], pa.int64()), **more}
    )
    if names:
        about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)
    return str(path)


def content(data: TextTable) -> list[tuple[str, str, int]]:
    return [(uid, data.text(uid), data.label(uid)) for uid in data.uids]


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".jsonl.gz"])
def test_json_lines(tmp_path, suffix):
    path = Path(lines(tmp_path / f"test{suffix}", *({"text": t, "label": n, "more": [1]} for t, n in ROWS)))
    if suffix.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert content(TextTable(str(path))) == [
        ("test/000001", "a fine film", 1), ("test/000002", "dull", 0), ("test/000003", "", -1),
    ]  # fmt: skip


def test_the_same_samples_and_keys_as_from_csv(tmp_path):
    """Ids name the samples, whatever the file."""
    rows = [{"text": "a, fine film", "label": 1, "id": "x"}, {"text": "dull", "label": 0, "id": 7}]
    made = TextTable(lines(tmp_path / "r.jsonl", *rows), id="id")
    table = TextTable(lines(tmp_path / "r.csv", "id,text,label", 'x,"a, fine film",1', "7,dull,0"), id="id")
    assert content(made) == content(table)
    assert [made.fingerprint(u) for u in made.uids] == [table.fingerprint(u) for u in table.uids]
    assert made.key == table.key


def test_names_of_classes_in_json(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"text": "a", "label": "good"}, {"text": "b", "label": 0}, {"text": "c"})
    data = TextTable(path, classes=["bad", "good"])
    assert [data.label(u) for u in data.uids] == [1, 0, -1]
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: label 'good' is neither a class index"):
        TextTable(path)


def test_a_bad_line_costs_its_sample_only(tmp_path):
    rows = ({"text": "a", "label": 1}, '{"text": "b", "la', [1], {"body": "c", "label": 0}, {"text": 5}, "",
            {"text": "d", "label": [0, 1]}, {"text": "e", "label": True})  # fmt: skip
    data = TextTable(lines(tmp_path / "a.jsonl", *rows))
    assert len(data.uids) == 7
    for number, reason in {
        2: "line 2: cannot be read as JSON",
        3: "line 3: list instead of an object",
        4: "line 4: there is no 'text', so it has no text; it has body, label",
        5: "line 5: 'text' is int, so it has no text",
        7: r"line 7: label \[0, 1\] is not one class",
        8: "line 8: label True is not one class",
    }.items():
        with pytest.raises(SampleError, match=reason):
            data.text(f"a/{number:06d}")
        assert data.fingerprint(f"a/{number:06d}") == UNREADABLE
    assert data.text("a/000001") == "a"
    with pytest.raises(UserError, match="line 1: there is no 'body'"):
        TextTable(lines(tmp_path / "b.jsonl", {"text": "a"}), text="body")
    with pytest.raises(UserError, match="has no rows"):
        TextTable(lines(tmp_path / "c.jsonl", ""))


def test_parquet(tmp_path):
    data = TextTable(parquet(tmp_path / "test.parquet", names=["neg", "pos"]))
    assert content(data) == [("test/000000", "a fine film", 1), ("test/000001", "dull", 0), ("test/000002", "", -1)]
    assert data.names == {0: "neg", 1: "pos"}
    assert TextTable(parquet(tmp_path / "plain.parquet")).names == {}
    assert TextTable(str(tmp_path / "test.parquet"), classes=["bad", "good"]).names[1] == "good"
    with pytest.raises(UserError, match=r"dataset\.text: .* has no column 'body'; it has text, label"):
        TextTable(str(tmp_path / "test.parquet"), text="body")
    with pytest.raises(UserError, match=r"none\.parquet cannot be read: there is no such file"):
        TextTable(str(tmp_path / "none.parquet"))


def test_shards_of_parquet(tmp_path):
    for shard, rows in enumerate((ROWS[:2], ROWS[2:])):
        parquet(tmp_path / "data" / f"test-{shard:05d}-of-00002.parquet", rows)
    parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    pattern = "data/{split}-*.parquet"
    data = TextTable(pattern, root=str(tmp_path), split="test")
    assert [text for _, text, _ in content(data)] == ["a fine film", "dull", ""]
    assert data.uids[2] == "test-00001-of-00002/000000"
    cut = tmp_path / "data" / "test-00000-of-00002.parquet"
    cut.write_bytes(cut.read_bytes()[:-20])
    data = TextTable(pattern, root=str(tmp_path), split="test")
    assert data.text("test-00001-of-00002/000000") == ""
    with pytest.raises(SampleError, match="damaged or cut short after 0 rows"):
        data.text("test-00000-of-00002/000000")
    with pytest.raises(UserError, match=r"there is no .*val-\*\.parquet"):
        TextTable(pattern, root=str(tmp_path), split="val")


def test_a_text_in_parquet_that_is_not_utf8_costs_its_sample(tmp_path):
    made = pa.array([b"caf\xe9", b"good"])
    texts = pa.StringArray.from_buffers(len(made), made.buffers()[1], made.buffers()[2])
    path = tmp_path / os.fsdecode(b"caf\xe9.parquet")
    with open(path, "wb") as file:
        pq.write_table(pa.table({"text": texts, "label": [1, 0]}), file)
    dataset = TextTable(str(path))
    assert dataset.uids == (r"caf\xe9/000000", r"caf\xe9/000001")
    assert (dataset.text(dataset.uids[1]), dataset.label(dataset.uids[1])) == ("good", 0)
    with pytest.raises(SampleError, match=r"caf\\xe9\.parquet, row 0: 'text' is no UTF-8"):
        dataset.text(dataset.uids[0])
