"""Fingerprints are remembered only where no change could hide."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import pixels, save

from attrib.datasets import ImageFolder, ImageNet, ImageTransform, WaveTransform, WavFolder
from attrib.datasets.images import ImageDataset
from attrib.running import fingerprints
from attrib.running.fingerprints import Fingerprints
from attrib.store import listing
from attrib.types import UNREADABLE

SMALL = ImageTransform(size=8, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Files of this test count as old at once."""
    monkeypatch.setattr(listing, "RACY", 0)


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """uids of images whose bytes are read."""
    opened: list[str] = []
    plain = ImageDataset.fingerprint

    def fingerprint(self, uid):
        if uid not in self.fingerprints:
            opened.append(uid)
        return plain(self, uid)

    monkeypatch.setattr(ImageDataset, "fingerprint", fingerprint)
    return opened


def images(folder: Path, count: int = 4) -> Path:
    for i in range(count):
        save(folder / "a" / f"{i}.png", seed=i)
    return folder


def run(root: Path, data: Path, writer: str = "w", **options) -> dict[str, str]:
    """What a new process finds."""
    dataset, prints = ImageFolder(str(data), SMALL, **options), Fingerprints(root, writer)
    found = prints.of(dataset, dataset.uids)
    prints.save()
    return found


def plainly(data: Path, **options) -> dict[str, str]:
    dataset = ImageFolder(str(data), SMALL, **options)
    return {uid: dataset.fingerprint(uid) for uid in dataset.uids}


def test_files_are_read_once_and_fingerprints_stay(tmp_path, read):
    data = images(tmp_path / "data")
    expected = plainly(data)
    del read[:]
    assert run(tmp_path / "work", data) == expected
    assert sorted(read) == sorted(expected)
    del read[:]
    assert run(tmp_path / "work", data) == expected
    assert read == []
    save(data / "a" / "new.png", seed=9)
    assert run(tmp_path / "work", data) == plainly(data)
    assert read[0] == "a/new"


def test_a_dry_run_writes_nothing(tmp_path):
    run(tmp_path / "work", images(tmp_path / "data"), writer="")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("keep", ["nothing", "size", "size and time"])
def test_changed_content_is_noticed(tmp_path, read, keep):
    data = images(tmp_path / "data")
    before = run(tmp_path / "work", data)
    path = data / "a" / "1.png"
    stat, content = path.stat(), bytearray(path.read_bytes())
    time.sleep(0.02)
    if keep == "nothing":
        save(path, seed=77, width=30)
    else:
        content[-1] ^= 1
        path.write_bytes(content)
    if keep == "size and time":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_mtime_ns == stat.st_mtime_ns
    del read[:]
    after = run(tmp_path / "work", data)
    assert read == ["a/1"]
    assert {uid for uid in before if before[uid] != after[uid]} == {"a/1"}
    assert after == plainly(data)


def test_a_touched_file_is_read_again_and_keeps_its_fingerprint(tmp_path, read):
    data = images(tmp_path / "data")
    before = run(tmp_path / "work", data)
    time.sleep(0.02)
    os.utime(data / "a" / "2.png")
    del read[:]
    assert run(tmp_path / "work", data) == before
    assert read == ["a/2"]


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, monkeypatch, read):
    data = images(tmp_path / "data")
    monkeypatch.setattr(listing, "RACY", 3600 * 10**9)
    before = run(tmp_path / "work", data)
    assert not (tmp_path / "work").exists()
    del read[:]
    assert run(tmp_path / "work", data) == before
    assert len(read) == 4


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path, monkeypatch):
    data = images(tmp_path / "data")
    plain = ImageDataset.fingerprint

    def slowly(self, uid):
        found = plain(self, uid)
        time.sleep(0.02)
        save(data / f"{uid}.png", seed=100)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(ImageDataset, "fingerprint", slowly)
        run(tmp_path / "work", data)
    assert run(tmp_path / "work", data) == plainly(data)


def test_what_this_process_knows_already_is_not_remembered(tmp_path):
    """Else the content of before would be remembered under the time of now."""
    data = images(tmp_path / "data")
    dataset, prints = ImageFolder(str(data), SMALL), Fingerprints(tmp_path / "work", "w")
    before = dataset.fingerprint("a/0")
    time.sleep(0.02)
    save(data / "a" / "0.png", seed=50)
    assert prints.of(dataset, dataset.uids)["a/0"] == before
    prints.save()
    assert run(tmp_path / "work", data) == plainly(data)


def test_labels_boxes_and_units_count(tmp_path, read):
    data = images(tmp_path / "data" / "images")
    table, boxes, units = tmp_path / "labels.csv", tmp_path / "boxes.csv", tmp_path / "units"

    def write(label: int, edge: int, unit: int) -> dict[str, str]:
        table.write_text("file,label\n" + "".join(f"a/{i}.png,{label if i == 1 else 0}\n" for i in range(4)))
        boxes.write_text(f"file,x1,y1,x2,y2\na/2.png,1,1,5,{edge}\n")
        for i in range(4):
            (units / "a").mkdir(parents=True, exist_ok=True)
            values = np.full((14, 20), unit if i == 3 else 1, np.uint8)
            if not (path := units / "a" / f"{i}.png").exists() or (np.asarray(Image.open(path)) != values).any():
                Image.fromarray(values).save(path)
        options = {"labels": str(table), "boxes": str(boxes), "units": str(units)}
        found = run(tmp_path / "work", data, **options)
        unread = list(read)
        assert found == plainly(data, **options)
        del read[:]
        return {uid: value for uid, value in found.items() if uid in unread}

    assert len(write(0, 6, 1)) == 4
    assert write(0, 6, 1) == {}
    time.sleep(0.02)
    assert set(write(5, 6, 1)) == {"a/1"}
    assert set(write(5, 9, 1)) == {"a/2"}
    time.sleep(0.02)
    assert set(write(5, 9, 4)) == {"a/3"}
    assert write(0, 6, 4) == {}  # labels and boxes of before are still known


def test_annotations_count_also_those_that_come_later(tmp_path, read):
    top = tmp_path / "data"
    image = save(top / "images" / "attribution" / "n1" / "x.png")
    (top / "imagenet_class_index.json").write_text('{"0": ["n1", "one"]}')
    (top / "annotations" / "attribution").mkdir(parents=True)

    def found() -> str:
        dataset, prints = ImageNet(str(top), SMALL), Fingerprints(tmp_path / "work", "w")
        value = prints.of(dataset, dataset.uids)["n1/x"]
        prints.save()
        del read[:]
        assert value == ImageNet(str(top), SMALL).fingerprint("n1/x")
        return value

    voc = (
        "<annotation><object><name>n1</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{}</xmax><ymax>9</ymax>"
        "</bndbox></object></annotation>"
    )
    none = found()
    flat = top / "annotations" / "attribution" / "x.xml"
    flat.write_text(voc.format(7))
    one = found()
    time.sleep(0.02)
    flat.write_text(voc.format(8))
    two = found()
    (top / "annotations" / "attribution" / "n1").mkdir()
    (top / "annotations" / "attribution" / "n1" / "x.xml").write_text(voc.format(9))  # goes before the other
    three = found()
    assert len({none, one, two, three}) == 4
    image.unlink()
    save(top / "images" / "attribution" / "n1" / "x.png", seed=4)
    assert found() not in {none, one, two, three}


def test_sounds(tmp_path):
    folder = tmp_path / "data" / "dog"
    folder.mkdir(parents=True)
    head = b"RIFF\x2c\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0\x40\x1f\0\0\x80\x3e\0\0\x02\0\x10\0data\x08\0\0\0"
    transform = WaveTransform(rate=8000, length=4, mean=0.0, std=1.0)

    def found(sound: bytes) -> str:
        (folder / "a.wav").write_bytes(head + sound)
        dataset, prints = WavFolder(str(tmp_path / "data"), transform), Fingerprints(tmp_path / "work", "w")
        value = prints.of(dataset, dataset.uids)["dog/a"]
        prints.save()
        assert value == WavFolder(str(tmp_path / "data"), transform).fingerprint("dog/a")
        return value

    first = found(b"12345678")
    time.sleep(0.02)
    assert found(b"12345679") != first


class Elsewhere(ImageFolder):
    """Reads other files than the class that it is made of."""

    def open(self, uid):
        return open(self._root.parent / "real" / self._files[uid], "rb")


def test_a_subclass_that_does_not_say_what_it_reads_is_asked_every_time(tmp_path):
    data, real = images(tmp_path / "data"), images(tmp_path / "real")
    for seed in (1, 2):
        save(real / "a" / "0.png", seed=seed)
        dataset = Elsewhere(str(data), SMALL)
        prints = Fingerprints(tmp_path / "work", "w")
        assert prints.of(dataset, dataset.uids)["a/0"] == Elsewhere(str(data), SMALL).fingerprint("a/0")
        prints.save()
    assert not (tmp_path / "work").exists()


def test_unreadable_files_are_not_remembered(tmp_path):
    data = images(tmp_path / "data")
    dataset, prints = ImageFolder(str(data), SMALL), Fingerprints(tmp_path / "work", "w")
    (data / "a" / "3.png").unlink()
    assert prints.of(dataset, dataset.uids)["a/3"] == UNREADABLE
    prints.save()
    Image.fromarray(pixels()).save(data / "a" / "3.png")
    assert dataset.fingerprint("a/3") != UNREADABLE
    assert run(tmp_path / "work", data) == plainly(data)


def test_whoever_is_stopped_keeps_what_was_read(tmp_path, monkeypatch, read):
    data = images(tmp_path / "data", 9)
    plain = ImageDataset.fingerprint

    def told(self, uid):
        if uid == "a/5":
            raise KeyboardInterrupt
        return plain(self, uid)

    monkeypatch.setattr(fingerprints, "READERS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(ImageDataset, "fingerprint", told)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "work", data)
    del read[:]
    found = run(tmp_path / "work", data)
    assert "a/5" in read
    assert not set(read) & {f"a/{i}" for i in range(5)}
    assert found == plainly(data)


def test_writers_add_files_and_damage_is_harmless(tmp_path, read):
    data = images(tmp_path / "data", 6)
    dataset = ImageFolder(str(data), SMALL)
    writers = [Fingerprints(tmp_path / "work", name) for name in ("one", "two", "two")]
    for i, prints in enumerate(writers):
        prints.of(ImageFolder(str(data), SMALL), dataset.uids[2 * i : 2 * i + 2])
    for prints in writers:
        prints.save()
    files = sorted((tmp_path / "work" / "state" / "fingerprints").iterdir())
    assert len(files) == 3
    del read[:]
    expected = run(tmp_path / "work", data)
    assert read == []
    content = bytearray(files[0].read_bytes())
    content[len(content) // 2] ^= 1
    files[0].write_bytes(content)
    files[1].write_bytes(b"")
    (files[0].parent / ".x.cache.tmp").write_bytes(b"")
    assert run(tmp_path / "work", data) == expected
    assert len(read) == 4


def test_what_is_no_memory_is_passed_over(tmp_path):
    """A FIFO would wait for ever, a device has no end."""
    folder = tmp_path / "work" / "state" / "fingerprints"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "a.cache")
    (folder / "b.cache").symlink_to("/dev/zero")
    (folder / "c.cache").mkdir()
    assert Fingerprints(tmp_path / "work")._read() == {}


def test_many_files_are_put_together(tmp_path, monkeypatch, read):
    monkeypatch.setattr(fingerprints, "MOST", 3)
    data = images(tmp_path / "data", 6)
    folder = tmp_path / "work" / "state" / "fingerprints"
    for i, uid in enumerate(ImageFolder(str(data), SMALL).uids):
        prints = Fingerprints(tmp_path / "work", f"w{i}")
        prints.of(ImageFolder(str(data), SMALL), [uid])
        prints.save()
        assert len(list(folder.iterdir())) <= 3
    del read[:]
    assert run(tmp_path / "work", data) == plainly(data)


def test_a_disk_that_takes_nothing_does_no_harm(tmp_path, monkeypatch):
    data = images(tmp_path / "data")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert run(tmp_path / "work", data) == plainly(data)
