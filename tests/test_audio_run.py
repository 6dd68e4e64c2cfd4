"""Sounds through the command line's own doors: train, run, resume, table, report with spectrograms."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_audio import sine, write
from tiny import command, only_cell, stored, tool

from attrib import report
from attrib.drawing.spectrogram import SIZE, STRIP, draw, limit, moments, spectrogram
from attrib.models import ToneCNN, save_checkpoint
from attrib.report import gallery
from attrib.store.cell import Arrays
from attrib.training.batches import EpochBatches, LoadedSamples
from attrib.types import UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six sounds of two classes, of which one is damaged, and a net with random weights."""
    for i in range(3):
        write(tmp_path / "sounds" / "low" / f"l{i}.wav", sine(300 + 50 * i, 16000), rate=16000)
        write(tmp_path / "sounds" / "<b>high" / f"h{i}.wav", sine(1500 + 50 * i))
    (tmp_path / "sounds" / "low" / "l2.wav").write_bytes(b"RIFF")
    rows = [f"{name}.wav,0.1,0.3" for name in ("low/l0", "low/l1", "<b>high/h0", "<b>high/h1", "<b>high/h2")]
    (tmp_path / "intervals.csv").write_text("\n".join(["file,start,end", *rows]) + "\n")
    torch.manual_seed(0)
    arguments = {"num_classes": 2, "channels": 1, "width": 4}
    save_checkpoint(
        tmp_path / "net.safetensors",
        ToneCNN(**arguments),
        {"target": "attrib.models.ToneCNN", "arguments": arguments},
    )
    return tmp_path


@pytest.fixture
def run(monkeypatch, capfd, folder):
    call = command(capfd)

    def run_here(*arguments: str, root: str = "work"):
        return call(
            "dataset=wav_folder", "model=tone_cnn", f"dataset.root={folder / 'sounds'}",
            f"dataset.intervals={folder / 'intervals.csv'}", f"model.checkpoint={folder / 'net.safetensors'}",
            f"run.root={folder / root}", "run.progress=false",
            *([] if any(a.startswith("metric=") for a in arguments) else ["metric.insertion_deletion.steps=4"]),
            *arguments,
        )  # fmt: skip

    return run_here


def test_iba_on_sounds_end_to_end(run, folder):
    method = ("method=iba", "method.steps=3", "method.batch=2", "run.png=true")
    result = run(*method, "run.batch=6")
    assert result.status == 0, result.err
    assert "maps_computed=5 maps_present=0 scores_computed=10 scores_present=0 failed=1" in result.out
    maps = stored(folder / "work")
    assert {uid: m["map"].shape for uid, m in maps.items()} == dict.fromkeys(maps, (4096,))
    assert {m["capacity"].shape for m in maps.values()} == {(128,)}
    (failure,) = only_cell(folder / "work").ledger.entries()
    assert "l2.wav: empty, damaged or not a sound" in failure["reason"]

    # Again: only the damaged one is tried. In single samples and one row at a time: the same numbers.
    assert "maps_computed=0 maps_present=5 scores_computed=0 scores_present=10 failed=1" in run(*method).out
    assert run(*method, "run.batch=1", "run.rows=1", root="single").status == 0
    for uid, arrays in stored(folder / "single").items():
        for name, value in arrays.items():
            np.testing.assert_allclose(value, maps[uid][name], rtol=1e-3, atol=1e-6, err_msg=f"{uid} {name}")

    # What people look at.
    pictures = sorted((only_cell(folder / "work").folder / "masks" / "map").rglob("*.png"))
    assert len(pictures) == 5
    with Image.open(pictures[0]) as picture:
        assert picture.size == SIZE[::-1]
    page = report.page(folder / "work")
    assert page.count("data:image/jpeg") == 10
    assert "&lt;b&gt;high (0)" in page
    assert "<b>high" not in page
    assert "for the class: bars up" in page
    assert "l2.wav: empty, damaged" in page
    assert tool("table").main([str(folder / "work"), "--wide"]) == 0
    assert tool("show").main([str(folder / "work")]) == 2  # holds no texts


def test_without_pictures_the_bars_are_drawn_alone(run, folder):
    assert run("method=gradient", "metric=[]", "run.limit=3").status == 0
    shutil.rmtree(folder / "work" / "state")
    page = report.page(folder / "work")
    assert page.count("data:image/jpeg") == 3
    assert "for the class: bars up" in page
    assert '<div class="words">' not in page


def test_what_the_report_needs_is_kept(run, folder):
    assert run("method=gradient", "metric=[]", "run.limit=3").status == 0
    (state,) = (folder / "work" / "state").glob("pictures.*")
    store = Arrays(state)
    for key, entry in store.index().items():
        found = store.read(key, ["wave", "roi"])
        assert entry.info["rate"] == 8000
        assert found["wave"].shape == found["roi"].shape == (4096,)
        assert found["roi"].sum() == 1600
    assert len(store.index()) == 3


def test_every_audio_method_runs(run):
    for method in ("random", "gradient", "input_x_gradient", "integrated_gradients", "smooth_grad", "occlusion"):
        cheap = {"integrated_gradients": ["method.steps=2"], "smooth_grad": ["method.samples=2"]}
        more = cheap.get(method, ["method.window=512", "method.stride=512"] if method == "occlusion" else [])
        result = run(f"method={method}", *more, root=method)
        assert result.status == 0, result.err
        assert "scores_computed=10" in result.out


def test_what_is_not_for_sounds_is_refused(run):
    for method in ("grad_cam", "guided_backprop", "deep_lift_shap", "input_iba", "extremal_perturbation"):
        result = run(f"method={method}", "metric=[]")
        assert result.status == 2
        assert f"{method} is for image" in result.err
        assert "but dataset wav_folder holds audio" in result.err
    result = run("method=random", "metric=[eraser,ehr]")
    assert result.status == 2
    assert "eraser is for text data" in result.err
    assert "take metric=[ehr]" in result.err


def test_models_and_data_of_other_kinds(run, monkeypatch, capfd, folder):
    result = run("method=random", "model=lenet", "model.checkpoint=null", "metric=[]")
    assert result.status == 2
    assert "the chosen model does not say how it wants its sounds" in result.err
    call = command(capfd)
    result = call("dataset=digits", "model=tone_cnn", "method=random", f"run.root={folder / 'x'}")
    assert result.status == 2
    assert "does not say how it wants them (model.input): is it for texts or sounds?" in result.err
    result = call(
        "dataset=text_csv", f"dataset.path={folder / 'intervals.csv'}", "dataset.text=file", "dataset.label=null",
        "dataset.target=predicted", "model=tone_cnn", "method=random", "metric=[]", f"run.root={folder / 'x'}",
    )  # fmt: skip
    assert result.status == 2
    assert "the chosen model does not say how texts become ids" in result.err
    result = run("method=occlusion", "method.window=5000", "metric=[]", root="wide")
    assert "Occlusion.window is 5000, must not be larger than the input, (4096,)" in result.err


def test_sounds_that_are_not_marked(run):
    result = run("method=random", "dataset.intervals=null", "metric=[ehr,insertion_deletion]")
    assert result.status == 2
    assert "ehr needs regions of interest, and dataset wav_folder has none" in result.err
    assert run("method=random", "dataset.intervals=null", "metric=[insertion_deletion]").status == 0


def test_tones_train(tmp_path, monkeypatch, capfd):
    """The recipe's own way, on a few clips: a checkpoint that the preset's model takes."""
    arguments = ("train=tone_cnn_tones", "train.limit=24", "train.epochs=2", f"train.root={tmp_path}")
    assert tool("train").main([*arguments, "train.progress=false", "model.width=4"]) == 0
    folder = tmp_path / "train" / "tone_cnn_tones"
    assert json.loads((folder / "result.json").read_text())["samples"] == {"train": 24, "validation": 24, "test": 24}
    assert command(capfd)(
        "dataset=tones", "model=tone_cnn_tones", f"model.checkpoint={folder / 'model.safetensors'}",
        "method=gradient", "metric=[ehr]", "dataset.select.count=2", f"run.root={tmp_path}", "run.progress=false",
    ).status == 0  # fmt: skip
    samples = LoadedSamples(*_clips())
    assert not samples.are_images
    with pytest.raises(UserError, match="is for images"):
        EpochBatches(samples, size=4, seed=0, augment="crop_flip")


def _clips():
    from attrib.datasets import Tones, WaveTransform

    data = Tones(WaveTransform(8000, 4096))
    return data, data.uids[:4]


@pytest.mark.slow
def test_the_recipe_learns_the_tones(tmp_path, monkeypatch):
    assert tool("train").main(["train=tone_cnn_tones", f"train.root={tmp_path}"]) == 0
    result = json.loads((tmp_path / "train" / "tone_cnn_tones" / "result.json").read_text())
    assert result["accuracy"]["test"] >= 0.95


# ---- pictures -------------------------------------------------------------------------------------------


def test_a_spectrogram_shows_the_pitch():
    for hertz in (500, 2000, 3500):
        grey = spectrogram(sine(hertz), 8000, (80, 60))
        assert grey.shape == (80, 60)
        assert 0 <= grey.min() <= grey.max() <= 1
        row = grey[:, 30].argmax()
        assert (1 - (row + 0.5) / 80) * 4000 == pytest.approx(hertz, abs=100)  # low pitches at the bottom
    late = np.concatenate((np.zeros(2000), sine(1000, seconds=0.25)))
    grey = spectrogram(late, 8000, (80, 60)).max(0)
    assert grey[:25].max() < 0.1 < 0.9 < grey[35:].min()


def test_bars_are_where_and_as_high_as_the_map_says():
    map = np.zeros(4096)
    map[1024:2048] = 2.0
    map[3072:] = -1.0
    assert limit(map) == pytest.approx(2.0)
    up, down = moments(map, 4)
    assert up.tolist() == [0, 2, 0, 0]
    assert down.tolist() == [0, 0, 0, 1]
    below = draw(sine(500, seconds=0.512), 8000, map)[-STRIP:].astype(int)
    red, blue = (below[..., 0] > below[..., 2] + 30), (below[..., 2] > below[..., 0] + 30)
    assert red[: STRIP // 2, 58:110].all()
    assert not red[:, :55].any()
    assert not red[STRIP // 2 :].any()
    heights = blue[:, 170:222].sum(0)
    assert (heights == STRIP // 4).all()  # half as long as the longest
    white = np.abs(np.sin(np.arange(4096)))
    assert draw(white, 8000, white)[-STRIP:].shape == (STRIP, SIZE[1], 3)


def test_the_region_is_marked():
    roi = np.zeros(4096, bool)
    roi[1000:2000] = True
    plain, marked = (draw(sine(500, seconds=0.512), 8000, None, r) for r in (None, roi))
    green = (marked == (0, 255, 102)).all(-1)
    columns = np.flatnonzero(green[20])
    assert columns.tolist() == pytest.approx([1000 / 4096 * 224, 2000 / 4096 * 224], abs=1.5)
    assert np.array_equal(plain[-STRIP:], marked[-STRIP:])


@pytest.mark.parametrize("length", [1, 7, 100, 40_000])
@pytest.mark.parametrize("value", [0.0, 1.0, np.nan, np.inf])
def test_degenerate_sounds_are_drawn(length, value):
    wave, map = np.zeros(length), np.full(length, value)
    assert draw(wave, 8000, map, np.ones(length, bool)).shape == (*SIZE, 3)
    assert draw(np.ones(length), 200, None).shape == (*SIZE, 3)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="a map of shape"):
        draw(np.zeros(10), 8000, np.zeros(9))
    with pytest.raises(ValueError, match="a roi of shape"):
        draw(np.zeros(10), 8000, None, np.zeros((10, 1), bool))
    assert SIZE[1] == gallery.SIZES[0]  # drawn as large as it is shown
