"""What people hand to the three functions, and what is made of it: scales, modes, names, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import hydra
import numpy as np
import pandas as pd
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from nets import small_cnn, small_cnn_images
from PIL import Image
from torch import nn

import attrib
from attrib.datasets import ImageTransform, WaveTransform
from attrib.methods.baselines import Gradient
from attrib.models import Classifier
from attrib.types import Batch

SOUNDS = WaveTransform(rate=4000, length=400)


class Listener(nn.Module):
    """Of sounds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 4, 9, stride=4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean(-1))


def listener() -> nn.Module:
    torch.manual_seed(0)
    return Listener().eval()


def wave(n: int = 400) -> np.ndarray:
    return 0.6 * np.sin(np.arange(n) / 7)


@pytest.fixture(scope="module")
def images():
    return small_cnn_images()[0][:3]


# ---- the caller's modes -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gradient", "grad_cam"])
def test_the_callers_autocast_and_inference_mode_change_nothing(images, method):
    net = small_cnn()
    expected = attrib.explain(net, images, method=method).map
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attrib.explain(net, images, method=method)
        scores = attrib.evaluate(net, images, found.map, "insertion_deletion")
    assert torch.equal(found.map, expected)
    pd.testing.assert_frame_equal(scores, attrib.evaluate(net, images, expected, "insertion_deletion"))
    with torch.inference_mode():
        assert torch.equal(attrib.explain(net, images, method=method).map, expected)
        assert torch.equal(attrib.explain(net, images.clone(), method=method).map, expected)


@pytest.mark.parametrize("method", ["lrp_epsilon", "kernel_shap", "integrated_gradients", "cd"])
def test_the_callers_default_device_changes_nothing(images, method):
    net, x = small_cnn(), images[:1]
    expected = attrib.explain(net, x, 1, method, run={"device": "cpu"})
    torch.set_default_device("meta")
    try:
        found = attrib.explain(net, x, 1, method, run={"device": "cpu"})
        scored = found.evaluate("insertion_deletion"), attrib.evaluate(net, x, found.map, "infidelity", target=1)
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)
    assert torch.equal(found.map, expected.map)
    assert all((rows["state"] == "ok").all() for rows in scored)
    with torch.device("meta"):
        assert torch.equal(attrib.explain(net, x, 1, method, run={"device": "cpu"}).map, expected.map)


def test_names_that_no_file_can_hold(images, tmp_path):
    """A lone surrogate is refused before anything is computed; in a file's name it is shown as in folders of images."""
    for x, uids in ((images[:1], ["\ud800"]), (Batch(("a\udcff",), images[:1], torch.tensor([0])), None)):
        with pytest.raises(attrib.UserError, match=r"^uids: 'a?\\ud.* no text file can hold .*another name"):
            attrib.explain(small_cnn(), x, 0, "gradient", uids=uids)
    file = tmp_path / os.fsdecode(b"caf\xe9.png")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(file)
    found = attrib.explain(small_cnn(), file, 0, "gradient", transform=ImageTransform(32, (0.0,) * 3, (1.0,) * 3))
    assert found.uids == ("caf\\xe9.png",)
    found.save(tmp_path / "saved")


def test_hydra_of_the_caller_stays(images):
    with hydra.initialize(version_base=None, config_path=None):
        theirs = GlobalHydra.instance().hydra
        assert attrib.explain(small_cnn(), images, method="gradient").map.any()
        assert GlobalHydra.instance().hydra is theirs
    assert not GlobalHydra.instance().is_initialized()


def test_threads(images):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: attrib.explain(small_cnn(), images, method="gradient").map, range(4)))
    assert all(torch.equal(one, found[0]) for one in found)


# ---- explanations of something else -------------------------------------------------------------------


def test_an_explanation_is_scored_as_what_it_is_of(images):
    net = small_cnn()
    found = attrib.explain(net, images, method="gradient")
    pd.testing.assert_frame_equal(attrib.evaluate(net, images, found), attrib.evaluate(None, None, found))
    for target in ([1, 2, 0], np.array([1, 2, 0]), torch.eye(3, 10).long()):  # labels are no part of what x is
        of_labels = attrib.explain(net, images, target, method="gradient")
        scores = [attrib.evaluate(net, x, of_labels, ["ehr"], torch.ones(3, 32, 32).bool()) for x in (images, None)]
        pd.testing.assert_frame_equal(*scores)
    for arguments, words in [
        ((small_cnn(), None, found), "net is not the one"),
        ((net, images + 1, found), "x is not what was explained"),
        ((net, images[:2], found), "3 names for 2 samples"),
        ((net, images, [found]), "give an Explanation, or real numbers"),
    ]:
        with pytest.raises(attrib.UserError, match=words):
            attrib.evaluate(*arguments)
    for name, value in {"target": 0, "seed": 5, "uids": ["a"], "run": {"batch": 1}}.items():
        with pytest.raises(attrib.UserError, match=f"{name}: an Explanation brings its own"):
            attrib.evaluate(net, images, found, **{name: value})


def test_two_methods_never_share_a_folder(images, tmp_path):
    methods = {"a/b": "random", "a-b": "gradient", "A b": "input_x_gradient", "c": "smooth_grad"}
    found = attrib.compare(small_cnn(), images, methods)
    found.save(tmp_path)
    saved = {p.parent.name: json.loads(p.read_text())["names"] for p in tmp_path.glob("*/explanation.json")}
    assert {folder: names["method"] for folder, names in saved.items()} == {
        "a-b": "a/b",
        "a-b-2": "a-b",
        "A-b-3": "A b",
        "c": "c",
    }


def test_explanations_can_be_pickled_and_copied(images):
    found = attrib.explain(small_cnn(), images, method="gradient", uids=["a", "b", "c"])
    for again in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert torch.equal(again.map, found.map)
        pd.testing.assert_frame_equal(again.evaluate("insertion_deletion"), found.evaluate("insertion_deletion"))
    compared = attrib.compare(small_cnn(), images, ["gradient", "random"])
    pd.testing.assert_frame_equal(pickle.loads(pickle.dumps(compared)).table, compared.table)


# ---- sounds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int16", "int32", "uint8"])
def test_whole_numbers_are_of_full_scale(kind):
    """As scipy.io.wavfile reads a file; those without a sign are around their middle."""
    half = 2 ** (8 * np.dtype(kind).itemsize - 1)
    whole = np.round(wave() * (half - 1)) + (half if kind == "uint8" else 0)
    found = attrib.explain(listener(), (whole.astype(kind), 4000), method="gradient", transform=SOUNDS)
    expected = attrib.explain(listener(), (wave(), 4000), method="gradient", transform=SOUNDS)
    assert (found.map - expected.map).norm() < 0.05 * expected.map.norm()


def test_sounds_of_other_libraries():
    expected = attrib.explain(listener(), wave(), method="gradient", transform=SOUNDS).map
    for x in ((wave(), 4000.0), (wave(), np.int64(4000)), (torch.tensor(wave())[None], 4000), [(wave(), 4000)]):
        assert torch.equal(attrib.explain(listener(), x, method="gradient", transform=SOUNDS).map, expected)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (wave() * 1000, "numbers lie in -1 .. 1; these reach 6"),
        (np.stack([wave()] * 2, 1), r"400 sounds of 2 numbers\? .* x.mean\(1\)"),
        ((wave(), 0), "whole number of samples per second, not 0"),
        ((wave(), 4000.5), "whole number of samples per second"),
        ((wave(), True), "x holds bool; give"),
        (wave() * np.nan, "NaN or infinite"),
        (np.zeros(0), "one channel"),
    ],
)
def test_sounds_that_are_none(x, words):
    with pytest.raises(attrib.UserError, match=words):
        attrib.explain(listener(), x, method="gradient", transform=SOUNDS)


def test_names_beside_a_batch_are_its_samples(images):
    batch = Batch(("a", "b", "c"), images, torch.tensor([0, 1, 2]))
    found = attrib.explain(small_cnn(), batch, "label", "random", uids=["x", "y", "z"])
    same = attrib.explain(small_cnn(), images, [[0], [1], [2]], "random", uids=["x", "y", "z"])
    assert found.uids == same.uids == ("x", "y", "z")
    assert found.target.tolist() == same.target.tolist() == [0, 1, 2]
    torch.testing.assert_close(found.map, same.map, rtol=0, atol=0)
    with pytest.raises(attrib.UserError, match="uids: 1 names for 3 samples"):
        attrib.explain(small_cnn(), batch, "label", "random", uids=["x"])


def test_no_global_random_number_is_drawn_by_the_import_either():
    """In a process of its own, as modules are imported once."""
    code = """
        import random, attrib
        import numpy as np, torch
        states = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 2))
        torch.set_rng_state(torch.tensor(states[2], dtype=torch.uint8))
        x = torch.ones(2, 1, 16, 16) * torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
        print(attrib.compare(net, x, ["random", "smooth_grad"], "insertion_deletion", target=0))
        attrib.results
        assert random.getstate() == states[0]
        assert np.random.get_state()[1].tobytes() == states[1]
        assert torch.get_rng_state().tolist() == states[2]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True)


def test_a_command_leaves_open_where_the_data_lie():
    found = attrib.explain("lenet", torch.zeros(1, 1, 32, 32), method="gradient")
    assert "dataset=boxed_images dataset.root=ROOT dataset.target=predicted" in found.command("boxed_images")
    assert "dataset=mnist dataset.target=predicted" in found.command("mnist")


def test_messages_are_in_the_words_of_python(images):
    net = small_cnn()
    for given, words in [
        ({"x": images.numpy()}, r"torch\.from_numpy\(x\)$"),
        ({"x": images[0]}, r"of one image x\[None\]$"),
        ({"target": "label"}, r'with target="predicted", or .* with target=NUMBER'),
        ({"target": 70}, r"^target=70, but"),
        ({"method": "attention_rollout"}, r'Take method="lrp_epsilon"'),
        ({"run": {"device": "cuda:99"}}, r'take run=\{"device": "cpu"\}'),
    ]:
        with pytest.raises((attrib.UserError, attrib.SampleError), match=words):
            attrib.explain(net, **({"x": images, "method": "gradient"} | given))
    with pytest.raises(attrib.UserError, match=r"is \(3, 32, 32\), but .*such as maps\.sum\(1\)$"):
        attrib.evaluate(net, images, images, "insertion_deletion")
    found = attrib.explain(net, Batch(("a", "b"), images[:2], torch.tensor([1, -1])), "label", "gradient")
    assert 'with target="predicted"' in found.failures["b"]


# ---- images and tensors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_the_samples(images, bad):
    x = images.clone()
    x[1, 0, 3, 3] = bad
    found = attrib.explain(small_cnn(), x, method="gradient", uids=["a", "b", "c"])
    assert (found.uids, found.failures) == (("a", "c"), {"b": "b has NaN or infinite numbers"})
    with pytest.raises(attrib.UserError, match=r"no sample .* can be read \(b has NaN or infinite numbers\)"):
        attrib.explain(small_cnn(), x[1:2], method="gradient", uids=["b"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"x": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}, "uint8; a net reads floats"),
        ({"x": pd.DataFrame({"text": ["a"], "label": [1]})}, "x is DataFrame"),
        (
            {
                "x": Image.fromarray(np.full((9, 9), 60000, np.int32)),
                "transform": ImageTransform(32, (0.0,) * 3, (1.0,) * 3),
            },
            "no fixed range",
        ),
        ({"target": ["cat", "dog", "cat"]}, "list of numbers of classes"),
        ({"target": [None] * 3}, "list of numbers of classes"),
        ({"seed": "a"}, "seed must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 2**80}, "seed must be a whole number"),
        ({"layers": 3}, "layers is int; give the path"),
        ({"layers": ["3"]}, "layers is list; give the path"),
        ({"layers": {"bottleneck": "features.0"}}, "only cam is read here"),
        ({"precision": 16}, "precision is the name of an arithmetic"),
        ({"overrides": None}, "overrides: give a list"),
        ({"overrides": [3]}, "overrides: give a list"),
        ({"overrides": "method.steps=3"}, "overrides: give a list"),
        ({"method": "GradCAM"}, "there are: grad_cam"),
        ({"tranform": 3}, "explain itself has the argument 'transform'"),
    ],
)
def test_refused(images, given, words):
    with pytest.raises(attrib.UserError, match=words):
        attrib.explain(**{"net": small_cnn(), "x": images, "method": "grad_cam", **given})


@pytest.mark.parametrize(
    "maps", [None, "maps", 3.0, {}, np.array(["a"] * 3), torch.zeros(3, 32, 32, dtype=torch.complex64)]
)
def test_maps_that_are_none(images, maps):
    with pytest.raises(attrib.UserError, match=r"^maps: "):
        attrib.evaluate(small_cnn(), images, maps)


def test_nothing_to_compare(images):
    with pytest.raises(attrib.UserError, match="methods: none is given"):
        attrib.compare(small_cnn(), images, [])
    with pytest.raises(attrib.UserError, match="metrics is NoneType"):
        attrib.compare(small_cnn(), images, ["random"], None)
    with pytest.raises(attrib.UserError, match="roi is int"):
        attrib.compare(small_cnn(), images, ["random"], "ehr", 3)


def test_names_of_classes():
    names = [f"kind {i}" for i in range(10)]
    model = Classifier(small_cnn(), classes=names, input_shape=(3, 32, 32))
    found = attrib.explain(model, small_cnn_images()[0][:2], "kind 3", Gradient())
    assert found.target.tolist() == [3, 3]
    assert found.target_names == ["kind 3 (3)"] * 2
    assert "kind 3" in found._repr_html_()
    with pytest.raises(attrib.UserError, match="names 2 classes, but the net has 10"):
        Classifier(small_cnn(), classes=("a", "b"), input_shape=(3, 32, 32))
    with pytest.raises(attrib.UserError, match="give the name of each class"):
        Classifier(small_cnn(), classes=[1, 2])


def test_a_net_that_gives_nan():
    class Broken(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3] * torch.nan

    with pytest.raises(attrib.UserError, match="Broken gives NaN"):
        attrib.explain(Broken(), torch.rand(1, 3, 8, 8), method="gradient")


def test_samples_of_different_sizes():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    found = attrib.explain(net, [torch.rand(3, 16, 16), torch.rand(3, 9, 12)], method="gradient", run={"batch": 1})
    with pytest.raises(attrib.UserError, match="different sizes"):
        found.maps  # noqa: B018


def test_messages_that_name_what_is_wrong(tmp_path):
    text = tmp_path / "no_image.txt"
    text.write_text("words")
    with pytest.raises(attrib.UserError, match=r"can be read \(.*no_image.txt"):
        attrib.explain(small_cnn(), [text], method="gradient", transform=ImageTransform(32, (0.0,) * 3, (1.0,) * 3))
    found = attrib.explain("lenet", np.zeros((9, 9, 3), np.uint8), method="gradient")
    with pytest.raises(attrib.UserError, match="there is no dataset 'photo'"):
        found.command("photo")
