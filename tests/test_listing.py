"""Folders of many chunks: what is remembered of them never changes what is found in them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import synthetic

from attrib.results import tables
from attrib.store import listing
from attrib.store.cell import Arrays, ScoreRows
from attrib.store.listing import Folder, pack, settled, unpack

SCHEMA = pa.schema([("a", pa.string()), ("b", pa.int64())])


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(listing, "FEW", 3)


def chunks(folder: Path, count: int, writer: str = "w", start: int = 0, each: int = 2) -> None:
    arrays, rows = Arrays(folder, writer), ScoreRows(folder, writer)
    for i in range(start, start + count):
        for k in range(each):
            arrays.add(f"{i}/{k}", "f", {"m": np.array([i, k], np.float32)}, seconds=i + k / 10, target=k)
            rows.add(f"{i}/{k}", "f", {("m", "c"): i + k / 10, ("m", "d"): -i})
        arrays.flush()
        rows.flush()


def seen(folder: Path) -> tuple[list, list, list]:
    """Everything that a new process finds, in its order."""
    arrays, rows = Arrays(folder), ScoreRows(folder)
    index = [(key, r.path, r.position, r.names, dict(r.crc), dict(r.info)) for key, r in arrays.index().items()]
    return index, rows.table().to_pylist(), sorted(map(str, arrays.broken + rows.broken))


def plainly(folder: Path) -> tuple[list, list, list]:
    """The same without what is remembered."""
    for name in ("index.cache", "rows.cache"):
        (folder / name).unlink(missing_ok=True)
    return seen(folder)


def unread(monkeypatch) -> list[str]:
    """Names of the chunks that are opened from now on."""
    opened: list[str] = []
    chunk, file = Arrays._read_chunk, ScoreRows._read_file

    def read_chunk(self, name, *args, **kwargs):
        opened.append(name)
        return chunk(self, name, *args, **kwargs)

    def read_file(self, name):
        opened.append(name)
        return file(self, name)

    monkeypatch.setattr(Arrays, "_read_chunk", read_chunk)
    monkeypatch.setattr(ScoreRows, "_read_file", read_file)
    return opened


def test_chunks_are_opened_once_and_found_alike(tmp_path, monkeypatch):
    chunks(tmp_path, 6)
    first = seen(tmp_path)
    assert len(first[0]) == 12
    assert len(first[1]) == 24
    opened = unread(monkeypatch)
    assert seen(tmp_path) == first
    assert opened == []
    chunks(tmp_path, 2, "another", start=4)  # two of them again, and sorted before the others
    found = seen(tmp_path)
    assert sorted(opened) == [f"another-0000{i}.{kind}" for i in (1, 2) for kind in ("parquet", "safetensors")]
    assert found == plainly(tmp_path)
    assert len(found[0]) == 12
    assert len(found[1]) == 32


def test_a_table_is_the_same_whatever_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "FEW", 1)
    synthetic.build(tmp_path)
    drawn = [tables.rows(tmp_path) for _ in range(2)]
    caches = [*tmp_path.rglob("index.cache"), *tmp_path.rglob("rows.cache")]
    assert len(caches) > 3
    for path in caches:
        path.unlink()
    monkeypatch.setattr(listing, "FEW", 1000)
    for frame in drawn:
        pd.testing.assert_frame_equal(frame, tables.rows(tmp_path))
    assert not list(tmp_path.rglob("*.cache"))


def test_arrays_are_read_by_what_is_remembered(tmp_path):
    chunks(tmp_path, 6)
    Arrays(tmp_path).index()
    arrays = Arrays(tmp_path)
    assert (tmp_path / "index.cache").exists()
    for i in range(6):
        np.testing.assert_array_equal(arrays.read((f"{i}/1", "f"))["m"], [i, 1])


@pytest.mark.parametrize("name", ["index.cache", "rows.cache"])
def test_any_damage_to_the_memory_is_noticed(tmp_path, name):
    chunks(tmp_path, 4)
    expected = seen(tmp_path)
    path = tmp_path / name
    whole = path.read_bytes()
    damaged = [b"", whole[:3], whole[:20], whole[:-1], whole + b"x", b"{}" * 400, b"attrib 0" + whole[8:]]
    for at in range(0, len(whole), max(1, len(whole) // 40)):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        damaged.append(bytes(data))
    for data in damaged:
        path.write_bytes(data)
        assert seen(tmp_path) == expected


def test_the_memory_of_another_folder_is_harmless(tmp_path):
    chunks(tmp_path / "a", 5)
    chunks(tmp_path / "b", 5, start=20)
    seen(tmp_path / "a")
    expected = seen(tmp_path / "b")
    for name in ("index.cache", "rows.cache"):
        (tmp_path / "b" / name).write_bytes((tmp_path / "a" / name).read_bytes())
    assert seen(tmp_path / "b") == expected
    (tmp_path / "b" / "index.cache").write_bytes((tmp_path / "b" / "rows.cache").read_bytes())  # of other columns
    assert seen(tmp_path / "b") == expected


def test_chunks_that_are_gone_replaced_or_cut_short(tmp_path):
    chunks(tmp_path, 8)
    chunks(tmp_path / "other", 1, start=50)
    seen(tmp_path)
    (tmp_path / "w-00001.safetensors").unlink()
    (tmp_path / "w-00001.parquet").unlink()
    for kind in ("safetensors", "parquet"):
        path = tmp_path / f"w-00003.{kind}"
        path.write_bytes((tmp_path / "other" / f"w-00001.{kind}").read_bytes())
        path = tmp_path / f"w-00005.{kind}"
        path.write_bytes(path.read_bytes()[:-9])
    found = seen(tmp_path)
    uids = {key[0] for key, *_ in found[0]}
    assert uids == {f"{i}/{k}" for i in (1, 3, 5, 6, 7, 50) for k in (0, 1)}
    assert {row["uid"] for row in found[1]} == uids
    assert len(found[2]) == 2
    assert found == plainly(tmp_path)


def test_a_restored_time_hides_nothing(tmp_path):
    """Same size, and the time of the last change put back: the second time cannot be."""
    chunks(tmp_path, 5)
    before = seen(tmp_path)
    path = tmp_path / "w-00002.safetensors"
    stat, data = path.stat(), path.read_bytes()
    time.sleep(0.02)
    path.write_bytes(data.replace(b"1/0", b"9/9"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    found = seen(tmp_path)
    assert found != before
    assert found == plainly(tmp_path)


def test_a_sample_in_two_chunks_survives_the_loss_of_one(tmp_path):
    chunks(tmp_path, 5, "a")
    chunks(tmp_path, 5, "b")
    expected = seen(tmp_path)
    assert {r[1].name for r in expected[0]} == {f"b-0000{i}.safetensors" for i in range(1, 6)}
    for i in range(1, 6):
        (tmp_path / f"b-0000{i}.safetensors").unlink()
    found = seen(tmp_path)
    assert {r[1].name for r in found[0]} == {f"a-0000{i}.safetensors" for i in range(1, 6)}
    assert found == plainly(tmp_path)


def test_two_readers_write_the_memory_and_a_full_disk_does_no_harm(tmp_path, monkeypatch):
    chunks(tmp_path, 5)
    one, two = Arrays(tmp_path), Arrays(tmp_path)
    one.index()
    chunks(tmp_path, 4, "x", start=10)
    assert len(two.index()) == 18
    assert len(one.index()) == 18
    expected = plainly(tmp_path)
    (tmp_path / "index.cache").unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert seen(tmp_path) == expected
    assert not (tmp_path / "index.cache").exists()
    assert not list(tmp_path.glob(".*.tmp"))


def test_reindex_believes_the_chunks_alone(tmp_path):
    chunks(tmp_path, 5)
    arrays = Arrays(tmp_path)
    assert len(arrays.index()) == 10
    (tmp_path / "w-00001.safetensors").unlink()
    assert arrays.reindex() == 8
    assert len(arrays.index()) == 8
    assert Arrays(tmp_path / "nowhere").reindex() == 0


def test_a_few_chunks_tell_how_long_a_sample_takes(tmp_path, monkeypatch):
    chunks(tmp_path, 40, each=1)
    opened = unread(monkeypatch)
    found = Arrays(tmp_path).sampled(8)
    assert 8 <= len(opened) <= 10
    assert {r.info["seconds"] for r in found} <= set(range(40))
    assert max(r.info["seconds"] for r in found) - min(r.info["seconds"] for r in found) > 30
    known = Arrays(tmp_path)
    known.index()
    opened.clear()
    assert [r.info for r in known.sampled(8)] == [r.info for r in found]
    assert not opened


def test_the_folder_is_listed_when_it_can_have_changed(tmp_path, monkeypatch):
    folder, listed = Folder(tmp_path, ".x", "m", SCHEMA), []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(1) or listdir(path))
    assert folder.new() == []
    for name in ("b.x", "a.x", ".c.x", "d.y"):
        (tmp_path / name).write_bytes(b"")
    assert folder.new() == ["a.x", "b.x"]
    folder.new()
    assert len(listed) == 3  # its time is too young to be relied on
    old = time.time_ns() - 10 * listing.RACY
    os.utime(tmp_path, ns=(old, old))
    assert [folder.new() for _ in range(5)] == [[]] * 5
    assert len(listed) == 4
    (tmp_path / "e.x").write_bytes(b"")
    assert folder.new() == ["e.x"]
    (tmp_path / "f.x").write_bytes(b"")  # within the same tick, perhaps
    assert folder.new() == ["f.x"]


def test_patience(tmp_path, monkeypatch):
    now = [50.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    listdir = os.listdir

    def slow(path):
        now[0] += 2.0
        return listdir(path)

    monkeypatch.setattr(os, "listdir", slow)
    arrays, writer = Arrays(tmp_path), Arrays(tmp_path, "w")
    assert not arrays.index(patient=True)
    writer.add("a", "f", {"m": np.zeros(1)})
    writer.flush()
    assert len(arrays.index()) == 1
    writer.add("b", "f", {"m": np.zeros(1)})
    writer.flush()
    assert len(arrays.index(patient=True)) == 1
    now[0] += 2 * listing.SHARE - 1
    assert len(arrays.index(patient=True)) == 1
    now[0] += 2
    assert len(arrays.index(patient=True)) == 2
    writer.add("c", "f", {"m": np.zeros(1)})
    writer.flush()
    assert len(arrays.index()) == 3


def test_packed_tables_come_back_and_others_are_refused():
    one = pa.table({"a": ["x", None, "ü"], "b": [1, 2, 3]}, SCHEMA)
    two = SCHEMA.empty_table()
    assert unpack(pack([one, two]), [SCHEMA, SCHEMA]) == [one, two]
    for data in (b"", b"attrib 1", pack([one])[:-1], pack([one]) + b"\0"):
        with pytest.raises((ValueError, pa.ArrowException)):
            unpack(data, [SCHEMA])
    with pytest.raises(ValueError, match="something else"):
        unpack(pack([one]), [pa.schema([("a", pa.string())])])
    assert settled((1, 0, 0), listing.RACY)
    assert not settled((1, 0, 1), listing.RACY)
    assert not settled((1, 5 * listing.RACY, 0), listing.RACY)  # from the future
