"""``attrib dataset``: what a set holds, and whether its labels mean what the net's classes mean."""

from __future__ import annotations

import errno
import os
import re

import numpy as np
import pytest
from tiny import command, pictures, save

from attrib.cli.common import writing
from attrib.errors import UserError
from attrib.report.label_order import LabelOrder, label_order
from attrib.store import files
from attrib.store.temporary import temporary

N, K = 100, 10


def drawn(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and predictions that are right in about four of five."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, K, N)
    return labels, np.where(random.random(N) < 0.8, labels, random.integers(0, K, N))


def order_of(labels: np.ndarray, predicted: np.ndarray) -> LabelOrder:
    """Of one label each."""
    return label_order([{label} for label in labels.tolist()], predicted.tolist())


def test_a_net_that_is_mostly_right_is_not_warned_of():
    labels, predicted = drawn()
    found = order_of(labels, predicted)
    assert found.accuracy == np.mean(labels == predicted)
    expected = sum(np.mean(labels == k) * np.mean(predicted == k) for k in range(K))
    assert found.chance == pytest.approx(expected)
    assert found.warning == ""


def test_labels_moved_by_one_are_named():
    labels, predicted = drawn()
    right = np.mean(labels == predicted)
    assert f"labels moved by +1 would be right in {right:.0%}" in order_of(labels, predicted + 1).warning
    assert "labels moved by -1" in order_of(labels + 1, predicted).warning


def test_labels_in_another_order_are_named():
    labels, predicted = drawn()
    order = np.random.default_rng(5).permutation(K)
    assert "labels in another order would be right in" in order_of(labels, order[predicted]).warning


@pytest.mark.parametrize("classes", [10, 1000])
def test_chance_is_no_order(classes):
    """Among a thousand classes some order fits any hundred samples: it must not be believed."""
    for seed in range(5):
        labels, predicted = np.random.default_rng(seed).integers(0, classes, (2, N))
        assert "near chance" in order_of(labels, predicted).warning


def test_one_class_says_nothing_of_an_order():
    one = np.full(20, 3)
    assert order_of(one, one).warning == ""
    assert order_of(one, one + 1).warning == "none is right"
    assert order_of(one, np.where(np.arange(20) < 5, 3, 4)).warning == ""


@pytest.mark.parametrize("labels", [[0] * 60 + [1] * 25 + [2] * 15, [0, 0, 1, 1, 2, 3]])
def test_a_net_that_always_says_the_same_is_no_other_order(labels):
    """Some order makes it right for the commonest class; and among six samples, chance does much."""
    predicted = [7] * len(labels) if len(labels) > 10 else [5, 8, 6, 3, 9, 1]
    assert "near chance" in label_order([{label} for label in labels], predicted).warning


def test_several_labels():
    """The predicted class is right if it is one of them; an order is found as of one."""
    random = np.random.default_rng(1)
    labels = [set(random.choice(K, 2, replace=False).tolist()) for _ in range(N)]
    right = [min(some) if i % 5 else 0 for i, some in enumerate(labels)]
    found = label_order(labels, right)
    assert found.accuracy == np.mean([p in some for p, some in zip(right, labels)])
    shares = [np.mean([k in some for some in labels]) * np.mean([p == k for p in right]) for k in range(K)]
    assert found.chance == pytest.approx(sum(shares))
    assert found.warning == ""
    assert "moved by +3" in label_order(labels, [p + 3 for p in right]).warning
    order = random.permutation(K)
    assert "in another order" in label_order(labels, order[right].tolist()).warning


# ---- the command ---------------------------------------------------------------------------------


def test_the_page_shows_samples_classes_and_regions(tmp_path, capfd):
    images, out = pictures(tmp_path, 12), tmp_path / "w" / "dataset.tiny.html"
    ended = command(capfd, "dataset")(
        "dataset=tiny", f"dataset.root={images}", "model=small_cnn", f"run.root={tmp_path / 'w'}", "method=iba"
    )
    assert ended.status == 0, ended.err
    for fact in ("samples +12", "40 x 40, in 12 samples", "boxes or masks +12 of 12", "accuracy of the net +"):
        assert re.search(fact, ended.out), fact
    html = out.read_text()
    assert html.count('<img src="data:image/') == 10
    assert "http" not in html
    assert "p003" in html


def test_a_folder_alone_is_looked_at(tmp_path, capfd):
    (tmp_path / "it's = mine").mkdir()
    root = pictures(tmp_path / "it's = mine", 2)
    look = command(capfd, "dataset")
    ended = look(str(root), "model=small_cnn", f"run.root={tmp_path / 'w'}")
    assert ended.status == 0, ended.err
    [page] = (tmp_path / "w").glob("dataset.*.html")
    assert page.name.startswith("dataset.it-s---mine-images-")
    assert "it&#39;s = mine/images" in page.read_text()
    other = look(str(pictures(tmp_path / "other" / "it's = mine", 2)), "model=small_cnn", f"run.root={tmp_path / 'w'}")
    assert other.status == 0, other.err
    assert len(list((tmp_path / "w").glob("dataset.*.html"))) == 2  # of another folder with the same name
    named = look(str(root), "dataset=image_folder", "model=small_cnn", f"run.root={tmp_path / 'w'}")
    assert (named.status, (tmp_path / "w" / "dataset.image_folder.html").is_file()) == (0, True)
    for wrong in (["nowhere"], [str(root), str(tmp_path)]):
        assert "give one folder (or shard) that exists" in look(*wrong).err


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_page_that_cannot_be_written_says_what_to_do(number, tmp_path, capfd, monkeypatch):
    def refused(path, data):
        raise OSError(number, os.strerror(number), *([] if number == errno.ENOSPC else [str(path)]))

    monkeypatch.setattr(files, "write_synced", refused)
    ended = command(capfd, "dataset")(
        "dataset=tiny", f"dataset.root={pictures(tmp_path, 2)}", "model=small_cnn", f"run.root={tmp_path / 'w'}"
    )
    assert ended.status == 2
    assert "Traceback" not in ended.err
    wanted = f"error: {tmp_path / 'w' / 'dataset.tiny.html'} cannot be written: {os.strerror(number)}; --out FILE"
    assert wanted in ended.err
    with pytest.raises(UserError, match=r"x\.html cannot be written: .*; --out FILE"), writing(tmp_path / "x.html"):
        refused(temporary(tmp_path / "x.html"), b"")


def test_what_cannot_be_read_is_not_said_to_be_unwritable(tmp_path):
    with pytest.raises(PermissionError), writing(tmp_path / "report.html"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "spec.json"))


@pytest.mark.parametrize("read", ["value", "region, region: predicted"])
def test_a_net_that_decides_for_no_class_is_not_asked_for_one(read, tmp_path, capfd):
    kind = "Values" if read == "value" else "Segments"
    ended = command(capfd, "dataset")(
        str(pictures(tmp_path, 2)), "model=other_output", f"model._target_=test_other_outputs.{kind}",
        f"model.output={{read: {read}}}", f"run.root={tmp_path / 'w'}",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    assert "accuracy" not in ended.out
    [page] = (tmp_path / "w").glob("dataset.*.html")
    assert "net: " not in page.read_text()


def test_classes_that_the_net_does_not_know_are_shown_not_refused(tmp_path, capfd):
    for name in ("dog", "zebra"):
        save(tmp_path / "mine" / name / "<b>.png")
    ended = command(capfd, "dataset")(
        "dataset=image_folder", f"dataset.root={tmp_path / 'mine'}", "model=small_cnn", f"run.root={tmp_path}",
        "+model.classes=[a,b,c,d,e,f,g,h,zebra,j]", f"--out={tmp_path / 'page.html'}",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    assert "WARNING dataset: 1 of 2 classes of the data are not the net's: 'dog' is none of" in ended.out
    assert "accuracy" not in ended.out
    html = (tmp_path / "page.html").read_text()
    assert "<b>" not in html
    assert "dog (0)" in html


def test_samples_that_cannot_be_read_are_counted(tmp_path, capfd):
    images = pictures(tmp_path, 4)
    (images / "p001.png").write_bytes(b"no image")
    ended = command(capfd, "dataset")(
        "dataset=tiny", f"dataset.root={images}", "model=small_cnn", f"run.root={tmp_path / 'w'}"
    )
    assert ended.status == 0, ended.err
    assert "1 of 4 samples cannot be read; the first: p001" in ended.out
