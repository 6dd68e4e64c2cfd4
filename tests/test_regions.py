"""Regions of any shape: masks become ``Batch.roi`` by the image's own geometry; what is wrong with one is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import command, only_cell, pictures, quickly, save
from torchvision.transforms import functional as tv

from attrib.datasets import DigitsCanvas, ImageFolder, ImageTransform
from attrib.datasets.images import ImageDataset
from attrib.metrics import EHR, Localisation
from attrib.noise import Noise
from attrib.results import tables
from attrib.types import UNREADABLE, Batch, SampleError, UserError

SMALL = ImageTransform(16)


def png(path: Path, values: np.ndarray, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(path)
    return path


def disc(height: int = 14, width: int = 20) -> np.ndarray:
    y, x = np.ogrid[:height, :width]
    return ((y - 6) ** 2 + (x - 9) ** 2 < 20).astype(np.uint8)


# The transform ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 40), st.sampled_from(["squash", "crop"]), st.integers(1, 12), st.integers(1, 12)
)
def test_a_region_goes_where_the_images_pixels_go(height, width, resize, out_h, out_w):
    """The oracle: torchvision's nearest neighbour and centre crop of the same mask."""
    mask = np.random.default_rng(height * 41 + width).random((height, width)) < 0.4
    transform = ImageTransform((out_h, out_w), resize=resize)
    image = Image.fromarray(mask.astype(np.uint8))
    if resize == "squash":
        expected = tv.resize(image, [out_h, out_w], tv.InterpolationMode.NEAREST)
    else:
        shorter = tv.resize(image, transform.resize_size, tv.InterpolationMode.NEAREST)
        expected = tv.center_crop(shorter, [out_h, out_w])
    assert np.array_equal(transform.region(mask).numpy(), np.asarray(expected, bool))


def test_a_rectangular_region_is_its_box_where_edges_fall_on_pixels():
    inside = np.zeros((32, 48), bool)
    inside[8:20, 12:30] = True
    transform = ImageTransform((16, 24))
    from attrib.datasets import Box

    assert torch.equal(transform.region(inside), transform.mask([Box(12, 8, 30, 20)], (48, 32)))


# A folder of masks ------------------------------------------------------------------------------


def folder(tmp_path: Path) -> Path:
    for i, name in enumerate(("cat/a.jpg", "cat/b.jpg", "dog/c.jpg")):
        save(tmp_path / "images" / name, i)
    for name in ("cat/a", "cat/b", "dog/c"):
        png(tmp_path / "masks" / f"{name}.png", disc() * 255)
    return tmp_path


def masked(tmp_path: Path, **fields) -> ImageFolder:
    return ImageFolder(str(tmp_path / "images"), SMALL, masks=str(tmp_path / "masks"), **fields)


def test_binary_masks_beside_the_images(tmp_path):
    dataset = masked(folder(tmp_path))
    png(tmp_path / "masks" / "cat" / "b.png", disc() * 255, "1")
    batch = dataset.batch(dataset.uids)
    expected = SMALL.region(disc().astype(bool))
    assert batch.roi.shape == (3, 16, 16)
    assert all(torch.equal(roi, expected) for roi in batch.roi)
    assert torch.equal(dataset.regions(dataset.uids), batch.roi)
    assert ImageFolder(str(tmp_path / "images"), SMALL).regions(dataset.uids) is None
    assert dataset.box_area("cat/a") == pytest.approx(disc().mean())


def test_masks_of_class_indices(tmp_path):
    folder(tmp_path)
    values = disc() + np.array(1, np.uint8)  # 1: cat, 2: dog
    for name in ("cat/a", "cat/b", "dog/c"):
        png(tmp_path / "masks" / f"{name}.png", values)
    palette = Image.fromarray(values).convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    palette.putdata(values.ravel().tolist())
    palette.save(tmp_path / "masks" / "cat" / "b.png")
    dataset = masked(tmp_path, mask_values="index", first_class=1)
    batch = dataset.batch(dataset.uids)
    cat, dog = SMALL.region(values == 1), SMALL.region(values == 2)
    assert [torch.equal(roi, e) for roi, e in zip(batch.roi, (cat, cat, dog))] == [True] * 3
    other = masked(tmp_path, mask_values="index", first_class=0)
    assert other.fingerprint("cat/a") != dataset.fingerprint("cat/a")
    assert other.described("cat/a") != dataset.described("cat/a")


def test_a_mask_is_part_of_the_fingerprint(tmp_path):
    folder(tmp_path)
    before = {uid: masked(tmp_path).fingerprint(uid) for uid in masked(tmp_path).uids}
    png(tmp_path / "masks" / "cat" / "a.png", np.roll(disc(), 1, 0))
    after = {uid: masked(tmp_path).fingerprint(uid) for uid in before}
    assert [uid for uid in before if before[uid] != after[uid]] == ["cat/a"]
    assert str(tmp_path / "masks" / "cat" / "a.png") in masked(tmp_path).sources("cat/a")
    plain = ImageFolder(str(tmp_path / "images"), SMALL)
    assert plain.described("cat/a") == (0, ()), "memories of fingerprints from before there were masks stay good"


@pytest.mark.parametrize(
    ("values", "mode", "reason"),
    [
        (disc(7, 20), None, r"its mask is 7x20 pixels \(height x width\), not 14x20"),
        (disc() + np.arange(20, dtype=np.uint8), None, "so it is not binary; if they are classes"),
        (disc(), "RGB", "gray or have a palette, not RGB"),
        (disc(), "RGBA", "gray or have a palette, not RGBA"),
        (b"\x89PNG\r\n\x1a\n not really", None, "cannot be read as a mask"),
    ],
)
def test_a_bad_mask_costs_its_sample_only(tmp_path, values, mode, reason):
    folder(tmp_path)
    path = tmp_path / "masks" / "cat" / "b.png"
    if isinstance(values, bytes):
        path.write_bytes(values)
    else:
        png(path, values, mode)
    dataset = masked(tmp_path)
    with pytest.raises(SampleError, match=reason):
        dataset.batch(["cat/b"])
    assert dataset.batch(["cat/a", "dog/c"]).roi.any((1, 2)).all()


def test_missing_masks_are_counted(tmp_path, caplog):
    folder(tmp_path)
    (tmp_path / "masks" / "cat" / "b.png").unlink()
    dataset = masked(tmp_path)
    assert "has no mask for 1 of 3 images, such as cat/b.png" in caplog.text
    assert dataset.batch(dataset.uids).roi.any((1, 2)).tolist() == [True, False, True]
    assert dataset.box_area("cat/b") is None
    for name in ("cat/a", "dog/c"):
        (tmp_path / "masks" / f"{name}.png").unlink()
    with pytest.raises(UserError, match=r"dataset\.masks: .* has no mask for any image, such as cat/a\.png"):
        masked(tmp_path)


def test_contradictory_settings(tmp_path):
    folder(tmp_path)
    (tmp_path / "boxes.csv").write_text("file,x1,y1,x2,y2\ncat/a.jpg,0,0,5,5\n")
    with pytest.raises(UserError, match=r"give masks or dataset\.boxes, not both"):
        masked(tmp_path, boxes=str(tmp_path / "boxes.csv"))
    with pytest.raises(UserError, match=r"mask_values must be binary or index, not 'colours'"):
        masked(tmp_path, mask_values="colours")


# Digits with exact masks --------------------------------------------------------------------------


def test_the_mask_of_a_digit_is_its_ink():
    as_is = ImageTransform(64, (0.0,), (1.0,), resize="none")
    boxes, masks = DigitsCanvas(as_is, clutter=0), DigitsCanvas(as_is, clutter=0, regions="masks")
    some = masks.uids[:20]
    boxed, masked = boxes.batch(some), masks.batch(some)
    assert torch.equal(masked.x, boxed.x)
    assert torch.equal(masked.roi, masked.x[:, 0] > 0), "without clutter nothing else is bright"
    assert (masked.roi <= boxed.roi).all()
    assert torch.equal(masks.regions(some), masked.roi)
    assert torch.equal(boxes.regions(some), boxed.roi)
    rows, columns = masked.roi.any(2), masked.roi.any(1)
    tight = rows[:, :, None] & columns[:, None, :]
    spans = [(r.nonzero().min(), r.nonzero().max()) for r in rows]
    assert all(boxed.roi[i, lo].any() and boxed.roi[i, hi].any() for i, (lo, hi) in enumerate(spans))
    assert (tight <= boxed.roi).all()
    assert boxes.key != masks.key
    with pytest.raises(UserError, match=r"regions must be boxes or masks"):
        DigitsCanvas(as_is, regions="polygons")


# Metrics on regions of any shape ------------------------------------------------------------------


def slow_energy(heat: np.ndarray, inside: np.ndarray) -> float:
    heat = np.maximum(heat, 0)
    return sum(heat[y, x] for y, x in np.argwhere(inside)) / heat.sum()


def slow_ehr(heat: np.ndarray, inside: np.ndarray, steps: int = 11, base: float = 0.1) -> float:
    """InputIBA's definition, pixel by pixel: the heat inside over the number of pixels at or above each quantile."""
    heat = np.maximum(heat, 0) / heat.max()
    effective = np.sort(heat[heat >= base])
    quantiles = np.linspace(0, 1, steps)
    curve = []
    for q in quantiles:
        threshold = min(np.quantile(effective, q), 0.99 * heat.max())
        chosen = heat >= max(threshold, base)
        curve.append(heat[chosen & inside].sum() / (chosen.sum() + 1e-8))
    return float(np.trapezoid(curve, quantiles))


@pytest.mark.parametrize("seed", range(5))
def test_metrics_of_a_region_are_their_formulas_whatever_its_shape(seed):
    rng = np.random.default_rng(seed)
    map = rng.normal(size=(2, 12, 15))
    roi = rng.random((2, 12, 15)) < 0.3
    batch = Batch(("a", "b"), torch.zeros(2, 3, 12, 15), torch.zeros(2, dtype=torch.long), torch.from_numpy(roi))
    noise = Noise(batch.uids, 0)
    found = Localisation().score(None, batch, torch.from_numpy(map), noise)
    ehr = EHR().score(None, batch, torch.from_numpy(map), noise)["ehr"]
    for i in range(2):
        hottest = np.unravel_index(map[i].argmax(), map[i].shape)
        n = roi[i].sum()
        top = np.zeros(map[i].size, bool)
        top[np.argsort(-np.maximum(map[i], 0).ravel())[:n]] = True
        assert float(found["energy"][i]) == pytest.approx(slow_energy(map[i], roi[i]), abs=1e-12)
        assert bool(found["pointing"][i]) == roi[i][hottest]
        assert float(found["bbox_ratio"][i]) == pytest.approx((top & roi[i].ravel()).sum() / n)
        assert float(ehr[i]) == pytest.approx(slow_ehr(map[i], roi[i]), abs=1e-9)


# Tables of labels with gaps ------------------------------------------------------------------------


def test_a_missing_and_a_double_row_cost_their_samples_the_label(tmp_path, caplog):
    for name in ("a.png", "b.png", "c.png", "d.png", "e.png"):
        save(tmp_path / "images" / name)
    rows = ("a.png,0", "b.png,1", "b.png,2", "c.png,7", "d.png,1", "d.png,1.0", "gone.png,1")
    (tmp_path / "labels.csv").write_text("\n".join(("file,label", *rows)) + "\n")
    (tmp_path / "classes.json").write_text('{"0": "ape", "1": "bee", "2": "cat"}')
    dataset = ImageFolder(
        str(tmp_path / "images"), SMALL, labels=str(tmp_path / "labels.csv"), classes=str(tmp_path / "classes.json")
    )
    assert dataset.uids == ("a", "b", "c", "d", "e", "gone")
    assert dataset.batch(dataset.uids[:5]).target.tolist() == [0, -1, -1, 1, -1]
    with pytest.raises(SampleError, match=r"line 8: there is no image gone\.png"):
        dataset.batch(["gone"])
    assert dataset.fingerprint("gone") == UNREADABLE
    assert "gives no label to 3 of 5 images" in caplog.text
    assert "line 8: there is no image gone.png (1 of 7 rows are of images that are not there)" in caplog.text
    assert list(dataset.label_problems) == ["b", "c", "e"]
    assert "line 4: a second label for b.png, 2 after 1" in dataset.label_problems["b"]
    assert "label 7 is not one of the 3" in dataset.label_problems["c"]
    assert "has no row for e.png" in dataset.label_problems["e"]


def test_metrics_of_map_and_region_decode_no_image(tmp_path, capfd, monkeypatch):
    """And say the same as if they had; another metric in between does decode."""
    run, arguments = quickly(capfd), ["dataset=tiny", "model=small_cnn", "method=random", "run.progress=false"]
    arguments.append(f"dataset.root={pictures(tmp_path, 3)}")
    whole, parts = f"run.root={tmp_path / 'whole'}", f"run.root={tmp_path / 'parts'}"
    few = "metric.insertion_deletion.steps=2"
    assert run(*arguments, "metric=[ehr,insertion_deletion,localisation]", few, whole).status == 0
    assert run(*arguments, "metric=[]", parts).status == 0
    monkeypatch.setattr(ImageDataset, "batch", lambda *_: pytest.fail("an image was decoded"))
    monkeypatch.setattr("attrib.running.run.check_metrics", lambda plan: None)  # looks for regions in one sample
    assert "scores_computed=6" in run(*arguments, "metric=[ehr,localisation]", parts).out

    def scores(root):
        frame = tables.rows(tmp_path / root)
        return {(r.metric, r.uid, r.column): r.value for r in frame.itertuples() if r.metric != "insertion_deletion"}

    assert scores("whole") == scores("parts") != {}


# A run with one of everything that can be wrong ------------------------------------------------------


def test_a_run_names_and_counts_what_is_wrong_and_goes_on(tmp_path, capfd):
    names = ("good", "odd", "empty", "unlabelled", "twice", "strange")
    for i, name in enumerate(names):
        save(tmp_path / "images" / f"{name}.png", i, 40, 40)
        values = np.zeros((40, 40), np.uint8)
        values[10:30, 5:20] = 255 * (name != "empty")
        png(tmp_path / "masks" / f"{name}.png", values[:30] if name == "odd" else values)
    rows = ("good.png,1", "odd.png,1", "empty.png,1", "twice.png,1", "twice.png,2", "strange.png,99")
    (tmp_path / "labels.csv").write_text("\n".join(("file,label", *rows)) + "\n")
    result = command(capfd)(
        "dataset=image_folder", f"dataset.root={tmp_path / 'images'}", f"dataset.labels={tmp_path / 'labels.csv'}",
        f"dataset.masks={tmp_path / 'masks'}", "model=small_cnn", "method=random", "metric=[ehr,localisation]",
        f"run.root={tmp_path / 'work'}", "run.progress=false",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert "maps_computed=2 maps_present=0 scores_computed=2 scores_present=0" in result.out
    reasons = {
        (e["uid"], e["stage"].partition(".")[0]): e["reason"] for e in only_cell(tmp_path / "work").ledger.entries()
    }
    expected = {
        ("odd", "load"): r"odd.png: its mask is 30x40 pixels (height x width), not 40x40",
        ("unlabelled", "load"): "unlabelled has no label (dataset.labels: ",
        ("twice", "load"): "a second label for twice.png, 2 after 1",
        ("strange", "load"): "strange has class 99, but the model has 10 classes",
        ("empty", "ehr"): "no region of interest",
        ("empty", "localisation"): "no region of interest",
    }
    assert reasons.keys() == expected.keys()
    assert all(text in reasons[place] for place, text in expected.items())
