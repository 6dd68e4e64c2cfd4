"""Names that are not UTF-8: such a file is a sample like any other, from the listing to the last picture."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from tiny import called, command, only_cell, pixels, save

from attrib.cli.main import dispatch
from attrib.datasets import AudioFolder, ImageFolder, ImageTransform, IMDb, Selection, WaveTransform
from attrib.datasets.files import shown, uids_of
from attrib.results.labels import labelled

LATIN = os.fsdecode(b"caf\xe9")  # as the operating system hands it over


def latin_folder(root: Path) -> Path:
    save(root / "plain.png", 1)
    (root / os.fsdecode(b"d\xf6rf")).mkdir(parents=True)
    for name in (f"{LATIN}.png", os.path.join(os.fsdecode(b"d\xf6rf"), "b.png")):
        with open(root / name, "wb") as file:
            Image.fromarray(pixels(40, 40)).save(file, "PNG")
    return root


def test_a_uid_can_be_printed_and_stored():
    assert shown(LATIN) == r"caf\xe9"
    assert shown("café") == "café"
    uids = uids_of([f"{LATIN}.png", "café.png", "a.png"])
    assert list(uids) == [r"caf\xe9", "café", "a"]


def test_uids_stay_unique():
    """A name may also hold the characters that stand for a byte."""
    names = [r"a\xe9.png", os.fsdecode(b"a\xe9.png"), os.fsdecode(b"\\xe9\xe9.png"), os.fsdecode(b"\xe9\\xe9.png")]
    uids = uids_of(names)
    assert list(uids.values()) == names
    assert all(uid.isascii() and uid.isprintable() for uid in uids)
    assert next(iter(uids)) == r"a\xe9", "the file of that name keeps it"


def test_half_a_character_can_be_shown():
    assert shown("caf\ud83d") == r"caf\ud83d"


def test_sounds_and_reviews(tmp_path):
    for folder in (b"neg", b"pos"):
        (tmp_path / "imdb" / "test" / os.fsdecode(folder)).mkdir(parents=True)
        (tmp_path / "imdb" / "test" / os.fsdecode(folder) / f"{LATIN}.txt").write_text("a film")
    reviews = IMDb(str(tmp_path / "imdb"))
    assert reviews.uids == (r"test/neg/caf\xe9", r"test/pos/caf\xe9")
    assert [reviews.text(uid) for uid in reviews.uids] == ["a film"] * 2
    with open(tmp_path / f"{LATIN}.wav", "wb") as file:
        soundfile.write(file, np.zeros(800), 8000, format="WAV")
    sounds = AudioFolder(str(tmp_path), WaveTransform(8000, 800))
    assert sounds.batch([r"caf\xe9"]).x.shape == (1, 1, 800)


def test_a_table_names_such_a_file_in_its_own_encoding(tmp_path):
    latin_folder(tmp_path / "images")
    (tmp_path / "labels.csv").write_bytes(b"file,label\nplain.png,1\ncaf\xe9.png,2\nd\xf6rf/b.png,0\n")
    dataset = ImageFolder(str(tmp_path / "images"), ImageTransform(16), labels=str(tmp_path / "labels.csv"))
    assert {uid: dataset.label(uid) for uid in dataset.uids} == {r"caf\xe9": 2, r"d\xf6rf/b": 0, "plain": 1}


def test_a_list_of_samples_names_such_a_file_in_its_own_encoding_or_by_its_uid(tmp_path):
    dataset = ImageFolder(str(latin_folder(tmp_path / "images")), ImageTransform(16))
    for written in (b"caf\xe9.png\n", rb"caf\xe9" + b"\n"):
        (tmp_path / "some.txt").write_bytes(written)
        assert Selection(list=str(tmp_path / "some.txt")).listed(dataset) == (r"caf\xe9",)


@pytest.mark.parametrize("broken", [False, True])
def test_a_run(tmp_path, capfd, broken):
    root = latin_folder(tmp_path / "images")
    if broken:
        (root / f"{LATIN}.png").write_bytes(b"not an image")
    work = tmp_path / (LATIN if broken else "café (1)")
    result = command(capfd)(
        "dataset=image_folder", f"dataset.root={root}", "dataset.target=predicted", "model=small_cnn", "method=random",
        "metric=[]", "run.png=true", f"run.root={work}", "run.progress=false",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert ("failed=1" in result.out) == broken
    cell = only_cell(work)
    found = {uid for uid, _ in cell.maps.index()}
    assert found == {"plain", r"d\xf6rf/b", *(() if broken else (r"caf\xe9",))}
    assert len(list((cell.folder / "masks" / "map").rglob("*.png"))) == len(found)
    if broken:
        (entry,) = cell.ledger.entries()
        assert entry["uid"] == r"caf\xe9"
        assert r"caf\xe9.png: empty, damaged" in entry["reason"]
    assert json.loads((cell.folder / "samples.json").read_text())
    if not broken:
        return
    other = latin_folder(work / os.fsdecode(b"\xe9"))
    result = command(capfd)(
        "dataset=image_folder", f"dataset.root={other}", "dataset.target=second", "model=small_cnn", "method=random",
        "metric=[]", f"run.root={work}", "run.progress=false",
    )  # fmt: skip
    assert result.status == 0, result.err
    names = {cell.dataset for cell in labelled(work)}
    assert f"image_folder (root={other}, target=second)".encode("utf-8", "backslashreplace").decode() in names
    assert called(capfd, lambda: dispatch(["report", str(work)])).status == 0
