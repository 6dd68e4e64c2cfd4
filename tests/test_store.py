"""The work directory: nothing is lost, nothing is half there, nothing damaged is believed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from attrib.store.arrays import READING, to_safetensors
from attrib.store.cell import UNASKED, Arrays, Cell, ScoreRows, cells, counts
from attrib.store.files import Key, write_atomic, write_json
from attrib.store.ledger import Ledger
from attrib.types import UNREADABLE, UserError

ROOT = Path(__file__).parents[1]
ODD = ("val/n01/a b", "ü∑/‮x", "a\nb\tc", 'q"\\,;', "x" * 300, "", "{}", "\u2028")
DTYPES = ("float16", "float32", ">f4", "float64", "bool", "uint8", ">i2", "int64", "complex64")


def read_all(folder: Path) -> dict[Key, dict[str, np.ndarray]]:
    arrays = Arrays(folder)
    found = {key: arrays.read(key) for key in arrays.index()}
    assert arrays.broken == []
    return found


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def script(text: str, *args: object) -> subprocess.Popen:
    """Another process that can import attrib."""
    return subprocess.Popen([sys.executable, "-c", text, *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE)


# Whole files ------------------------------------------------------------------------------------


def test_write_atomic_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b" / "c.json"
    write_atomic(path, b"1")
    write_atomic(path, b"22")
    assert path.read_bytes() == b"22"
    assert names(path.parent) == ["c.json"]
    write_json(path, {"b": 1, "a": [0.1, None]})
    assert json.loads(path.read_text()) == {"a": [0.1, None], "b": 1}


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_write_atomic_leaves_nothing_behind(tmp_path, monkeypatch, call, error):
    (tmp_path / "x").write_bytes(b"old")

    def fail(*_):
        raise error

    monkeypatch.setattr(os, call, fail)
    for name in ("x", "new"):
        with pytest.raises(type(error)):
            write_atomic(tmp_path / name, b"new")
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_processes_with_the_same_number_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    """As in two containers: while one writes, the other writes the same file."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    fsync, once = os.fsync, []

    def other_writer(handle):
        fsync(handle)
        if not once:
            once.append(None)
            write_atomic(tmp_path / "x", b"other")
            assert (tmp_path / "x").read_bytes() == b"other"

    monkeypatch.setattr(os, "fsync", other_writer)
    write_atomic(tmp_path / "x", b"mine")
    assert (tmp_path / "x").read_bytes() == b"mine"
    assert names(tmp_path) == ["x"]


# Arrays -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=8),
        st.sampled_from(DTYPES).flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, min_side=0, max_side=4))),
        max_size=3,
    ),
    st.text(st.characters(codec="utf-8"), max_size=8),
)
def test_any_array_comes_back(tmp_path_factory, arrays, uid):
    folder = tmp_path_factory.mktemp("arrays")
    writer = Arrays(folder, "w")
    writer.add(uid, "f", arrays)
    writer.flush()
    for found in (read_all(folder)[uid, "f"], writer.read((uid, "f"))):
        assert found.keys() == arrays.keys()
        for name, value in arrays.items():
            assert found[name].shape == value.shape
            assert found[name].dtype == value.dtype.newbyteorder("=")
            np.testing.assert_array_equal(found[name], value)


def test_files_are_what_the_library_writes():
    """Every kind of number, each where the processor wants it."""
    numbers = {f"{i}/é": np.arange(3 + i).astype(np.dtype(kind).newbyteorder("=")) for i, kind in enumerate(DTYPES)}
    numbers |= {"none": np.zeros((0, 3)), "one": np.array(True)}
    odd = {"big": np.arange(3, dtype=">f4"), "back": np.arange(4)[::-1], "same": np.broadcast_to(np.float32(2), (2, 3))}
    with pytest.raises(TypeError, match="wide has the type complex128, which cannot be stored"):
        to_safetensors({"wide": np.ones(2, complex)}, {})
    read = safetensors.numpy.load(b"".join(to_safetensors(odd, {})))
    assert all(np.array_equal(read[name], value) for name, value in odd.items())
    data = b"".join(to_safetensors(numbers, {"about": "ü\n"}))
    expected = safetensors.numpy.save(numbers, {"about": "ü\n"})
    assert len(data) % 8 == len(expected) % 8
    found, known = (dict(safetensors.deserialize(each)) for each in (data, expected))
    assert found == known
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert header.pop("__metadata__") == {"about": "ü\n"}
    for name, entry in header.items():
        assert (8 + size + entry["data_offsets"][0]) % numbers[name].itemsize == 0


def test_strided_scalar_and_large(tmp_path):
    writer = Arrays(tmp_path, "w")
    dense = np.arange(24.0).reshape(2, 3, 4)
    arrays = {"t": dense.T, "step": dense[:, ::2], "back": dense[::-1], "number": np.float32(3), "plain": 2.5}
    writer.add("a", "f", arrays, seconds=0.5, target=[1, None])
    assert writer.read(("a", "f"))["number"].shape == ()
    writer.flush()
    found = read_all(tmp_path)["a", "f"]
    for name, value in arrays.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].shape == np.shape(value)
    assert Arrays(tmp_path).index()["a", "f"].info == {"seconds": 0.5, "target": [1, None]}


def test_odd_names(tmp_path):
    writer = Arrays(tmp_path, "w")
    for i, uid in enumerate(ODD):
        writer.add(uid, uid, {uid: np.full(2, i), "1/2": np.array(i)})
    writer.flush()
    found = read_all(tmp_path)
    assert set(found) == {(uid, uid) for uid in ODD}
    for i, uid in enumerate(ODD):
        assert found[uid, uid][uid].tolist() == [i, i]
        assert found[uid, uid]["1/2"] == i


def test_unflushed_samples_can_be_read_but_are_not_indexed(tmp_path):
    writer = Arrays(tmp_path, "w")
    writer.add("a", "f", {"m": np.arange(3), "n": np.zeros(1)})
    assert writer.read(("a", "f"), ["m"])["m"].tolist() == [0, 1, 2]
    assert not writer.index()
    assert not tmp_path.joinpath("w-00001.safetensors").exists()
    writer.flush()
    assert list(writer.index()) == [("a", "f")]
    assert list(writer.read(("a", "f"), ["m"])) == ["m"]


def test_what_is_not_there(tmp_path):
    writer = Arrays(tmp_path / "nowhere", "w")
    assert not writer.index()
    with pytest.raises(KeyError):
        writer.read(("a", "f"))
    writer.add("a", "f", {"m": np.zeros(1)})
    writer.flush()
    with pytest.raises(KeyError, match="holds m of a, but not other"):
        writer.read(("a", "f"), ["m", "other"])


def test_samples_of_other_writers_appear_at_once(tmp_path):
    reader, one, two = Arrays(tmp_path), Arrays(tmp_path, "one"), Arrays(tmp_path, "two")
    assert not reader.index()
    for i, writer in enumerate((one, two, one)):
        writer.add(f"s{i}", "f", {"m": np.array(i)})
        writer.flush()
        assert len(reader.index()) == i + 1
        assert reader.read((f"s{i}", "f"))["m"] == i
    assert names(tmp_path) == ["one-00001.safetensors", "one-00002.safetensors", "two-00001.safetensors"]


def test_a_sample_twice_and_a_changed_fingerprint(tmp_path):
    one, two = Arrays(tmp_path, "one"), Arrays(tmp_path, "two")
    for writer in (one, two):
        writer.add("a", "old", {"m": np.array(1.0)})
        writer.flush()
    two.add("a", "new", {"m": np.array(2.0)})
    two.add("a", "new", {"m": np.array(3.0)})
    two.flush()
    found = read_all(tmp_path)
    assert {key: float(v["m"]) for key, v in found.items()} == {("a", "old"): 1.0, ("a", "new"): 3.0}


def test_a_second_object_of_one_writer_overwrites_nothing(tmp_path):
    for i in range(3):
        writer, rows = Arrays(tmp_path, "w"), ScoreRows(tmp_path, "w")
        writer.add(f"s{i}", "f", {"m": np.array(i)})
        rows.add(f"s{i}", "f", {("m", "c"): i})
        writer.flush()
        rows.flush()
    assert len(read_all(tmp_path)) == 3
    assert len(ScoreRows(tmp_path).present()) == 3


def test_the_array_can_be_changed_after_the_flush_only(tmp_path):
    value, writer = np.zeros(3, np.float32), Arrays(tmp_path, "w")
    writer.add("a", "f", {"m": value})
    writer.flush()
    value += 1
    assert read_all(tmp_path)["a", "f"]["m"].tolist() == [0, 0, 0]


def chunk(folder: Path) -> tuple[Path, bytes]:
    writer = Arrays(folder, "w")
    for i in range(3):
        writer.add(f"s{i}", "f", {"m": np.arange(4.0) + i, "b": np.ones((2, 2), bool)}, seconds=0.5)
    writer.flush()
    (path,) = folder.iterdir()
    return path, path.read_bytes()


def test_a_truncated_chunk_counts_as_missing(tmp_path):
    path, whole = chunk(tmp_path)
    writer = Arrays(tmp_path, "x")
    writer.add("other", "f", {"m": np.zeros(1)})
    writer.flush()
    for size in (0, 1, 7, 8, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        reader = Arrays(tmp_path)
        assert list(reader.index()) == [("other", "f")]
        assert len(reader.broken) == 1
        assert str(path) in reader.broken[0]
        reader.index()
        assert len(reader.broken) == 1


def test_any_damaged_byte_is_noticed_or_harmless(tmp_path):
    path, whole = chunk(tmp_path)
    expected = read_all(tmp_path)
    noticed = []
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        reader = Arrays(tmp_path)
        assert reader.index().keys() <= expected.keys()
        for key in reader.index():
            try:
                found = reader.read(key)
            except OSError as error:
                noticed.append(str(error))
                continue
            for name in found.keys() & expected[key].keys():
                np.testing.assert_array_equal(found[name], expected[key][name])
    # The values themselves lie at the end; none of them can change unseen.
    assert len(noticed) >= 3 * (4 * 8 + 4)
    assert not [text for text in noticed if str(path) not in text or "delete the file" not in text]


def test_foreign_files_do_no_harm(tmp_path):
    path, whole = chunk(tmp_path)
    (tmp_path / ".w-00002.safetensors.77-abcd.tmp").write_bytes(whole[:100])
    (tmp_path / ".w-00003.safetensors").write_bytes(b"")
    (tmp_path / "metric.json").write_text("{}")
    assert len(read_all(tmp_path)) == 3
    for content in ('"text"', "[1]", '[{"uid": "a"}]', "3", "null"):
        data = b"".join(to_safetensors({"0/m": np.zeros(1)}, {"samples": content}))
        (tmp_path / "x.safetensors").write_bytes(data)
        reader = Arrays(tmp_path)
        assert len(reader.index()) == 3
        assert len(reader.broken) == 1
    path.unlink()
    with pytest.raises(OSError, match="w-00001"):
        reader.read(("s0", "f"))


@pytest.mark.parametrize("make", [Arrays, ScoreRows])
def test_flush_by_count_and_by_time(tmp_path, monkeypatch, make):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    writer = make(tmp_path, "w", seconds=5.0, count=3)

    def add(uid):
        if make is Arrays:
            writer.add(uid, "f", {"m": np.zeros(1)})
        else:
            writer.add(uid, "f", {("m", "c"): 1.0})
        return writer.flush_if_due()

    assert [add(u) for u in "abc"] == [False, False, True]
    assert [add(u) for u in "ddd"] == [False, False, False]
    now[0] += 4.9
    assert not add("e")
    now[0] += 0.2
    assert writer.flush_if_due()
    assert not writer.flush_if_due()
    assert not add("g")
    now[0] += 100
    assert [add("h"), add("i")] == [True, False]
    writer.flush()
    writer.flush()
    assert len(list(tmp_path.iterdir())) == 4


def test_a_failed_flush_can_be_tried_again(tmp_path, monkeypatch):
    writer = Arrays(tmp_path, "w")
    writer.add("a", "f", {"m": np.zeros(1)})
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(28, "No space left on device")

        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            writer.flush()
    assert not list(tmp_path.iterdir())
    writer.flush()
    assert len(read_all(tmp_path)) == 1


def test_a_thread_writes_while_more_is_added(tmp_path, monkeypatch):
    go, replace = threading.Event(), os.replace

    def slow(*paths):
        assert go.wait(30)
        replace(*paths)

    monkeypatch.setattr(os, "replace", slow)
    writer = Arrays(tmp_path, "w", count=1, background=True)
    writer.add("a", "f", {"m": np.arange(3)})
    assert writer.flush_if_due()
    writer.add("b", "f", {"m": np.arange(4)})
    assert not list(tmp_path.glob("[!.]*"))
    assert writer.unwritten == 2
    for uid, size in (("a", 3), ("b", 4)):
        assert writer.read((uid, "f"), ["m"])["m"].shape == (size,)
    go.set()
    writer.flush()
    assert writer.unwritten == 0
    assert names(tmp_path) == ["w-00001.safetensors", "w-00002.safetensors"]
    assert set(read_all(tmp_path)) == {("a", "f"), ("b", "f")}
    writer.add("c", "f", {"m": np.arange(5)})
    assert writer.flush_if_due()
    writer.flush()
    assert len(read_all(tmp_path)) == 3


def test_what_the_thread_could_not_write_is_tried_again(tmp_path, monkeypatch):
    writer = Arrays(tmp_path, "w", count=1, background=True)
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(28, "No space left on device")

        patch.setattr(os, "replace", full)
        writer.add("a", "f", {"m": np.zeros(1)})
        assert writer.flush_if_due()  # the thread will fail
        writer.add("b", "f", {"m": np.zeros(1)})
        for flush in (writer.flush_if_due, writer.flush):
            with pytest.raises(OSError, match="No space"):
                flush()
        assert writer.unwritten == 2
    writer.flush()
    assert set(read_all(tmp_path)) == {("a", "f"), ("b", "f")}
    assert len(names(tmp_path)) == 1


def test_large_arrays_do_not_pile_up(tmp_path, monkeypatch):
    monkeypatch.setattr(Arrays, "MOST", 1000)
    writer = Arrays(tmp_path, "w", seconds=1e9)
    for i in range(6):
        writer.add(f"s{i}", "f", {"m": np.zeros(400, np.uint8)})
        writer.flush_if_due()
    assert len(list(tmp_path.iterdir())) == 2
    assert writer.unwritten == 0


WRITE = """
import sys, numpy as np
from attrib.store.cell import Arrays, ScoreRows
arrays, rows = Arrays(sys.argv[1], "w"), ScoreRows(sys.argv[1], "w")
print("ready", flush=True)
for i in range(10**6):
    for k in range(3):
        arrays.add(f"{i}/{k}", "f", {"m": np.full((200, 50), i, np.float32), "n": np.array(k)})
        rows.add(f"{i}/{k}", "f", {("m", "c"): i})
    arrays.flush()
    rows.flush()
"""


def test_sigkill_leaves_whole_chunks(tmp_path):
    for delay in (0.0, 0.1, 0.23):
        folder = tmp_path / str(delay)
        process = script(WRITE, folder)
        try:
            assert process.stdout.readline() == b"ready\n"
            while not list(folder.glob("*.parquet")):
                assert process.poll() is None
            time.sleep(delay)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
        found, rows = read_all(folder), ScoreRows(folder)
        chunks = len(list(folder.glob("[!.]*.safetensors")))
        assert len(found) == 3 * chunks
        for (uid, _), arrays in found.items():
            i, k = map(int, uid.split("/"))
            assert (arrays["m"] == i).all()
            assert arrays["n"] == k
        assert 0 <= chunks - len(rows.present()) // 3 <= 1
        assert rows.broken == []


def test_what_killed_writers_left_is_not_read(tmp_path):
    arrays, rows = Arrays(tmp_path, "w"), ScoreRows(tmp_path, "w")
    arrays.add("a", "f", {"m": np.ones(2)})
    rows.add("a", "f", {("m", "c"): 1.0})
    arrays.flush()
    rows.flush()
    for name in names(tmp_path):
        data = (tmp_path / name).read_bytes()
        (tmp_path / f".{name}.7-0a0b0c0d.tmp").write_bytes(data[: len(data) // 2])
        (tmp_path / f".{name}").write_bytes(data[: len(data) // 2])
    assert set(Arrays(tmp_path).index()) == ScoreRows(tmp_path).present() == {("a", "f")}
    assert ScoreRows(tmp_path).broken == []


# ScoreRows -------------------------------------------------------------------------------------------


def test_rows(tmp_path):
    one, two = ScoreRows(tmp_path, "one"), ScoreRows(tmp_path, "two")
    assert one.table().num_rows == 0
    assert one.present() == set()
    before = time.time()
    one.add("a", "f", {("m", "c"): 0.1, ("m", "d"): np.float32(2)})
    one.add("b", "f", {("m", "c"): float("nan")})
    assert one.present() == set()
    one.flush()
    two.add("a", "g", {("m", "c"): -1})
    two.flush()
    assert one.present() == two.present() == {("a", "f"), ("b", "f"), ("a", "g")}
    table = one.table()
    assert table.schema.equals(ScoreRows.SCHEMA)
    assert table["value"].to_pylist()[:2] == [0.1, 2.0]
    assert np.isnan(table["value"].to_pylist()[2])
    assert all(before <= t <= time.time() for t in table["time"].to_pylist())


def test_rows_with_odd_names_in_odd_folders(tmp_path):
    """A folder called "seed=1", as a sweep makes them, is no column."""
    folder = tmp_path / "seed=1,beta=0.1" / "column=7"
    rows = ScoreRows(folder, "w")
    for uid in ODD:
        rows.add(uid, uid, {(uid, uid): 1.0})
    rows.flush()
    assert rows.present() == {(uid, uid) for uid in ODD}
    assert rows.table()["column"].to_pylist() == list(ODD)


def test_damaged_rows_are_scored_again(tmp_path):
    writer = ScoreRows(tmp_path, "w")
    for i in range(40):
        writer.add(f"s{i}", "f", {("m", "c"): i / 7, ("m", "d"): 2.0})
    writer.flush()
    (path,) = tmp_path.iterdir()
    whole, expected = path.read_bytes(), writer.table()
    values = expected.to_pylist()
    wrong = 0
    for flip in (*range(0, 8 * len(whole), 19), 8 * len(whole) - 1):  # every part of the file, its headers too
        data = bytearray(whole)
        data[flip // 8] ^= 1 << flip % 8
        path.write_bytes(data)
        reader = ScoreRows(tmp_path)
        table = reader.table()
        assert len(reader.broken) == (table.num_rows == 0)
        wrong += table.num_rows > 0 and table.to_pylist() != values
    assert wrong == 0
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert reader.present() == set()
        assert len(reader.broken) == 1
        assert str(path) in reader.broken[0]


def test_no_damage_of_a_header_takes_rows_away_unseen(tmp_path):
    writer = ScoreRows(tmp_path, "w")
    for i in range(12):
        writer.add(f"val/{i:03d}", f"{i:032x}", {("map", "a"): i / 7, ("map", "b"): 2.0})
    writer.flush()
    (path,) = tmp_path.iterdir()
    whole, expected = path.read_bytes(), writer.table()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    unseen = []  # by the library
    for flip in range(8 * footer, 8 * len(whole)):
        data = bytearray(whole)
        data[flip // 8] ^= 1 << flip % 8
        with contextlib.suppress(*READING):
            found = pq.read_table(pa.BufferReader(bytes(data)), use_threads=False, page_checksum_verification=True)
            if found.schema.equals(expected.schema) and not found.equals(expected):
                unseen.append(bytes(data))
    # Which these are depends on the library; this one no version can see.
    stored = pq.read_table(path)
    values = pa.array([-1.0, *stored["value"].to_pylist()[1:]])
    sink = pa.BufferOutputStream()
    pq.write_table(
        stored.set_column(stored.schema.get_field_index("value"), stored.schema.field("value"), values), sink
    )
    for changed in (*unseen, sink.getvalue().to_pybytes()):
        path.write_bytes(changed)
        reader = ScoreRows(tmp_path)
        assert not len(reader.table())
        assert "checksum" in reader.broken[0]


def test_rows_of_earlier_versions_have_no_checksum(tmp_path):
    writer = ScoreRows(tmp_path, "w")
    writer.add("s", "f", {("m", "c"): 1.0})
    writer.flush()
    (path,) = tmp_path.iterdir()
    expected = writer.table()
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    assert ScoreRows(tmp_path).table().equals(expected)


def test_a_parquet_file_of_something_else_is_not_read(tmp_path):
    table = ScoreRows.SCHEMA.empty_table().drop_columns(["value"])
    pq.write_table(table, tmp_path / "x.parquet")
    reader = ScoreRows(tmp_path)
    assert reader.present() == set()
    assert len(reader.broken) == 1


# Ledger -----------------------------------------------------------------------------------------


def test_ledger(tmp_path):
    ledger = Ledger(tmp_path / "deep", "w")
    assert ledger.entries() == []
    for uid in ODD:
        ledger.add(uid, uid, "maps", f"reason of {uid}")
    entries = ledger.entries()
    assert [(e["uid"], e["fingerprint"], e["stage"], e["reason"]) for e in entries] == [
        (u, u, "maps", f"reason of {u}") for u in ODD
    ]
    assert entries == sorted(entries, key=lambda e: e["time"])
    assert names(tmp_path / "deep" / "failures") == ["w.jsonl"]


def test_each_writer_has_a_ledger_of_its_own_and_reads_all(tmp_path):
    writers = [Ledger(tmp_path, writer) for writer in ("b", "", "a")]
    for i, ledger in enumerate(writers * 2):
        ledger.add(f"s{i}", "f", "maps", "x")
    assert names(tmp_path / "failures") == ["a.jsonl", "b.jsonl"]
    assert (tmp_path / "failures.jsonl").exists()
    for reader in (*writers, Ledger(tmp_path, "c")):
        assert [e["uid"] for e in reader.entries()] == [f"s{i}" for i in range(6)]
    assert not (tmp_path / "failures" / "c.jsonl").exists()


def test_a_failure_is_noted_once(tmp_path):
    Ledger(tmp_path, "first").add("a", "f", "maps", "x" * 10_000)
    again = Ledger(tmp_path, "second")  # requeued
    for _ in range(2):
        again.add("a", "f", "maps", "x" * 10_000)
        again.add("a", "f", "maps", "another reason")
        again.add("a", "g", "maps", "another reason")
        again.add("a", "g", "load", "another reason")
        again.add("b", "g", "load", "another reason")
    assert len(Ledger(tmp_path).entries()) == 5
    assert "x" * 99 not in again.path.read_text()


def test_ledger_survives_torn_lines_and_long_reasons(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add("a", "f", "load", "x" * 10_000)
    line = ledger.path.read_bytes().strip()
    for i, torn in enumerate((line[:30], line[:-1], b"\0\0\0", b"\xff\xfe", b'"text"'[:-1])):
        with open(ledger.path, "ab") as file:
            file.write(torn)
        ledger.add(f"b{i}", "f", "load", "∑" * 10_000)
    entries = ledger.entries()
    assert [e["uid"] for e in entries] == ["a", "b0", "b1", "b2", "b3", "b4"]
    assert all(len(e["reason"]) == Ledger.MAX_REASON for e in entries)


APPEND = """
import sys
from attrib.store.ledger import Ledger
ledger = Ledger(sys.argv[1], sys.argv[3])
for i in range(150):
    ledger.add(f"{sys.argv[2]}/{i}", "f", "maps", "∑x" * 700)
"""


def test_many_writers_lose_no_line(tmp_path):
    # On one machine even writers of one name (a shared disk's containers with equal clocks) lose nothing.
    processes = [script(APPEND, tmp_path, k, "same" if k < 2 else f"w{k}") for k in range(4)]
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    entries = Ledger(tmp_path).entries()
    assert sorted(e["uid"] for e in entries) == sorted(f"{k}/{i}" for k in range(4) for i in range(150))


# Cells ------------------------------------------------------------------------------------------


def test_cell(tmp_path):
    cell = Cell(tmp_path / "data.net.method.12345678", "w")
    assert cell.samples() == {}
    assert cell.metrics() == []
    cell.write_samples(["b", "a"], {})
    cell.write_samples(ODD, {uid: uid for uid in ODD[:3]})
    assert cell.samples() == {**dict.fromkeys(ODD), **{uid: uid for uid in ODD[:3]}}
    cell.write_spec({"a": 1})
    cell.write_spec({"a": 2})
    assert cell.spec == {"a": 1}
    rows, curves = cell.scores("ehr.1234"), cell.curves("ehr.1234")
    rows.add("a", "f", {("m", "c"): 1.0})
    curves.add("a", "f", {"m/c": np.zeros(3)})
    rows.flush()
    curves.flush()
    assert cell.metrics() == ["ehr.1234"]
    assert names(cell.folder / "scores" / "ehr.1234") == ["w-00001.parquet", "w-00001.safetensors"]
    (tmp_path / "state").mkdir()
    Cell(tmp_path / "another").write_spec({})
    assert [c.folder.name for c in cells(tmp_path)] == ["another", "data.net.method.12345678"]


def test_the_samples_are_written_only_when_they_change(tmp_path):
    cell = Cell(tmp_path)
    path = tmp_path / "samples.json"
    cell.write_samples([], {})
    assert path.exists()  # about no sample is not the same as not saying
    cell.write_samples(["a"], {"a": "f"})
    before = path.stat().st_ino
    cell.write_samples(("a",), {"a": "f", "not selected": "g"})
    cell.write_samples(("a",), {})
    assert path.stat().st_ino == before
    cell.write_samples(["a", "b"], {})
    assert cell.samples() == {"a": "f", "b": None}


def test_fingerprints_of_other_shards_and_of_unreadable_files_stay(tmp_path):
    cell = Cell(tmp_path)
    cell.write_samples("abcd", {"a": "1", "b": "1"})
    cell.write_samples("abcd", {"c": "1", "d": UNREADABLE})  # another shard
    assert cell.samples() == {"a": "1", "b": "1", "c": "1", "d": None}
    cell.write_samples("abce", {"a": "2", "b": UNREADABLE})  # a changed, b out of reach, d gone, e new
    assert cell.samples() == {"a": "2", "b": "1", "c": "1", "e": None}
    cell.write_samples("abcd", {})
    assert cell.samples()["d"] is None


def test_samples_beyond_the_limit_are_not_asked_for_until_a_run_is(tmp_path):
    cell = Cell(tmp_path)
    cell.write_samples("abcd", {"a": "1"}, "ab")  # run.limit=2, shard 0
    assert cell.samples() == {"a": "1", "b": None, "c": UNASKED, "d": UNASKED}
    cell.write_samples("abcd", {"c": "1"}, "abc")
    cell.write_samples("abcd", {"a": "1"}, "a")  # what was asked for stays asked for
    assert cell.samples() == {"a": "1", "b": None, "c": "1", "d": UNASKED}
    assert counts(cell.samples(), "d", "1")  # a result that is there counts
    cell.write_samples("abcd", {})
    assert cell.samples()["d"] is None


@pytest.mark.parametrize("text", ["{", '["a", "b"]', "3"])
def test_damaged_samples_are_named(tmp_path, text):
    (tmp_path / "samples.json").write_text(text)
    with pytest.raises(UserError, match=r"samples\.json does not map samples"):
        Cell(tmp_path).samples()


def test_files_of_another_cell_or_metric_are_not_read(tmp_path):
    """Copied there by hand, the numbers of one method would be taken for another's."""
    cells = [Cell(tmp_path / f"photos.net.{name}", "w") for name in ("iba.01234567", "lrp.89abcdef", "renamed")]
    for i, cell in enumerate(cells):
        cell.maps.add("a", "f", {"map": np.full(2, float(i))})
    for cell in cells:
        cell.maps.flush()
    iba, lrp, renamed = (cell.folder for cell in cells)
    rows = {}
    for cell in cells:
        for metric in ("ehr.00000000", "ehr.11111111"):
            scores = cell.scores(metric)
            scores.add("a", "f", {("map", "ehr"): 0.5})
            scores.flush()
            (rows[cell.folder, metric],) = (cell.folder / "scores" / metric).glob("*.parquet")
    (chunk,) = (iba / "maps").glob("*.safetensors")

    def maps_of(folder):
        maps = Arrays(folder / "maps")
        return set(maps.index()), maps.broken

    def rows_of(folder, metric):
        scores = ScoreRows(folder / "scores" / metric)
        return scores.present(), scores.broken

    def moved(path, folder):
        shutil.rmtree(folder)
        folder.mkdir()
        return shutil.copy(path, folder / path.name)

    assert maps_of(iba) == ({("a", "f")}, [])
    path = moved(chunk, lrp / "maps")
    assert maps_of(lrp) == (set(), [f"{path}: was written for 01234567/maps, not for 89abcdef/maps"])
    moved(chunk, renamed / "maps")  # of a folder that somebody has renamed nobody knows whose it is
    assert maps_of(renamed) == ({("a", "f")}, [])
    theirs = rows[iba, "ehr.00000000"]
    for folder, metric in ((iba, "ehr.11111111"), (lrp, "ehr.00000000")):
        path = moved(theirs, folder / "scores" / metric)
        found, broken = rows_of(folder, metric)
        assert not found
        assert broken == [f"{path}: was written for 01234567/ehr.00000000, not for {folder.name[-8:]}/{metric}"]
    assert rows_of(iba, "ehr.00000000") == ({("a", "f")}, [])
    shutil.copytree(iba, tmp_path / "other" / iba.name)  # work directories may be merged
    assert maps_of(tmp_path / "other" / iba.name) == ({("a", "f")}, [])
