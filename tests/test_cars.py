"""Stanford Cars: tables as its authors' MATLAB wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from tiny import save

from attrib.datasets import Box, ImageTransform, StanfordCars
from attrib.types import UNREADABLE, SampleError, UserError

SMALL = ImageTransform(20, resize="squash")
FIELDS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
ROWS = [(3, 2, 12, 10, 2, "00001.jpg"), (1, 1, 20, 14, 1, "00002.jpg"), (5, 5, 5, 5, 3, "00003.jpg")]
NAMES = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ford F-150 Regular Cab 2012"]


def struct(rows: list[tuple[Any, ...]], fields: tuple[str, ...] = FIELDS) -> np.ndarray:
    """MATLAB's 1 x N struct array; numbers are 1 x 1, in the smallest type that holds them, as in the devkit."""
    array = np.empty((1, len(rows)), dtype=[(f, object) for f in fields])
    for i, row in enumerate(rows):
        array[0, i] = tuple(np.array([[v]], np.min_scalar_type(v)) if isinstance(v, int) else v for v in row)
    return array


def cells(names: list[Any]) -> np.ndarray:
    array = np.empty((1, len(names)), object)
    array[0, :] = names
    return array


def write_set(root: Path, rows: list[tuple[Any, ...]] = ROWS, fields: tuple[str, ...] = FIELDS) -> Path:
    (root / "devkit").mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(root / "devkit" / "cars_meta.mat", {"class_names": cells(NAMES)})
    for split, name in (("train", "cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        scipy.io.savemat(root / "devkit" / name, {"annotations": struct(rows, fields)}, do_compression=True)
        for i, row in enumerate(ROWS):
            save(root / f"cars_{split}" / row[-1], i)
    return root


def test_layout(tmp_path):
    dataset = StanfordCars(str(write_set(tmp_path)), SMALL)
    assert dataset.uids == ("test/00001", "test/00002", "test/00003")
    assert dataset.names == dict(enumerate(NAMES))
    assert dataset.batch(dataset.uids).target.tolist() == [1, 0, 2]
    assert [dataset.boxes(u) for u in dataset.uids] == [
        (Box(2, 1, 12, 10),),
        (Box(0, 0, 20, 14),),
        (Box(4, 4, 5, 5),),
    ], "counted from 1 and inclusive there, edges of pixels here"
    assert [dataset.box_area(u) for u in dataset.uids] == [10 * 9 / (20 * 14), 1, 1 / (20 * 14)]
    roi = dataset.batch(dataset.uids).roi
    assert roi[1].all()
    assert roi[0, :, 2:12].any(0).all()
    assert not roi[0, :, :2].any()
    assert not roi[0, :, 12:].any()


def test_splits_and_places(tmp_path):
    root = write_set(tmp_path / "a")
    train, test = (StanfordCars(str(root), SMALL, split) for split in ("train", "test"))
    assert train.uids[0] == "train/00001"
    assert train.key != test.key
    other = write_set(tmp_path / "b")
    (other / "devkit" / "cars_test_annos_withlabels.mat").rename(other / "cars_test_annos_withlabels.mat")
    moved = StanfordCars(str(other), SMALL)
    assert moved.key == test.key
    assert [moved.fingerprint(u) for u in moved.uids] == [test.fingerprint(u) for u in test.uids]
    with pytest.raises(UserError, match=r"dataset\.split must be train or test, not 'val'"):
        StanfordCars(str(root), SMALL, "val")


def test_one_image_is_a_set_too(tmp_path):
    assert StanfordCars(str(write_set(tmp_path, ROWS[:1])), SMALL).uids == ("test/00001",)


def test_a_missing_image_costs_one_sample(tmp_path):
    root = write_set(tmp_path)
    (root / "cars_test" / "00002.jpg").unlink()
    dataset = StanfordCars(str(root), SMALL)
    with pytest.raises(SampleError, match=r"cars_test/00002\.jpg: cannot be read: No such file"):
        dataset.batch(["test/00002"])
    assert dataset.fingerprint("test/00002") == UNREADABLE
    assert len(dataset.batch(["test/00001", "test/00003"])) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((3, 2, 2, 10, 2, "00009.jpg"), "row 4: box 2, 1, 2, 10 is inverted or empty"),
        ((3, 2, 9, 10, 4, "00009.jpg"), "row 4: class 4 is not one of the 3 in .*cars_meta"),
        ((3, 2, 9, 10, 0, "00009.jpg"), "row 4: class 0"),
        ((3, 2, 9, 10, 1, "00001.jpg"), r"row 4: a second row for 00001\.jpg"),
        ((3, 2, 9, 10, 1, "../00009.jpg"), r"row 4: fname '\.\./00009\.jpg' is not the name of a file"),
        ((3, 2, 9, 10, 1, "..\\9.jpg"), "row 4: fname"),
        ((3, 2, 9, 10, 1, ""), "row 4: fname"),
        ((3, 2, 9, 10, 1, 7), "row 4: fname is int, not a text"),
        (("wide", 2, 9, 10, 1, "00009.jpg"), "row 4: bbox_x1 is str, not a whole number"),
        ((np.array([[1, 2]]), 2, 9, 10, 1, "00009.jpg"), "row 4: bbox_x1 is ndarray, not a whole number"),
        ((3, 2, 9, 10, {"a": 1.0}, "00009.jpg"), "row 4: class is .*, not a whole number"),
        ((3, 2, 9.5, 10, 1, "00009.jpg"), "row 4: bbox_x2 is float, not a whole number"),
    ],
)
def test_wrong_rows_are_named(tmp_path, row, message):
    root = write_set(tmp_path, [*ROWS, row])
    with pytest.raises(UserError, match=rf"dataset\.root: .*withlabels\.mat, {message}"):
        StanfordCars(str(root), SMALL)


def test_numbers_of_any_type(tmp_path):
    rows = [(3.0, 2.0, 12.0, 10.0, 2.0, "00001.jpg")]  # MATLAB's own type
    assert StanfordCars(str(write_set(tmp_path, rows)), SMALL).boxes("test/00001") == (Box(2, 1, 12, 10),)


def test_tables_that_are_missing_damaged_or_others(tmp_path):
    root = write_set(tmp_path)
    table = root / "devkit" / "cars_test_annos_withlabels.mat"
    write_set(root, [row[:4] + row[5:] for row in ROWS], FIELDS[:4] + FIELDS[5:])  # cars_test_annos.mat is like that
    with pytest.raises(UserError, match=r"withlabels\.mat: annotations has no field class"):
        StanfordCars(str(root), SMALL)
    scipy.io.savemat(table, {"annotations": np.arange(6.0)})
    with pytest.raises(UserError, match="annotations has no field bbox_x1, bbox_y1"):
        StanfordCars(str(root), SMALL)
    scipy.io.savemat(table, {"other": np.arange(6.0)})
    with pytest.raises(UserError, match=r"withlabels\.mat holds no variable annotations"):
        StanfordCars(str(root), SMALL)
    whole = (root / "devkit" / "cars_train_annos.mat").read_bytes()
    for content in (b"", b"<html>not found</html>" * 20, whole[:150], whole[:-9]):
        table.write_bytes(content)
        with pytest.raises(UserError, match=r"withlabels\.mat cannot be read as a MATLAB file"):
            StanfordCars(str(root), SMALL)
    table.unlink()
    with pytest.raises(UserError, match=r"there is no .*withlabels\.mat; data/README"):
        StanfordCars(str(root), SMALL)
    scipy.io.savemat(root / "devkit" / "cars_meta.mat", {"class_names": cells(["a", 5.0])})
    with pytest.raises(UserError, match=r"cars_meta\.mat, class 2 is float, not a text"):
        StanfordCars(str(root), SMALL, "train")
    with pytest.raises(UserError, match=r"there is no .*cars_test; data/README"):
        StanfordCars(str(root / "devkit"), SMALL)
