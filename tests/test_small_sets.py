"""The presets of the small image sets: they compose with a net, build, and agree with their estimation sets."""

from __future__ import annotations

from pathlib import Path

import hydra.utils
import pytest
import test_cars
import test_cifar
import test_idx
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tiny import ROOT

from attrib.datasets import Dataset, Selection

WRITE = {
    "cars": test_cars.write_set,
    "cifar10": lambda root: test_cifar.write_set(root, train=True),
    "digits": None,
    "digits_canvas": None,
    "fashion_mnist": test_idx.write_set,
    "mnist": test_idx.write_set,
}


def preset(name: str, tmp_path: Path, *overrides: str) -> tuple[Dataset, Dataset]:
    """The dataset of ``configs/dataset/<name>.yaml`` with small files, and its estimation set."""
    if WRITE[name] is not None:
        WRITE[name](tmp_path)
        overrides = (f"dataset.root={tmp_path}", *overrides)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("run", [f"dataset={name}", "model=lenet", *overrides])
    node = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)["dataset"]
    assert node.pop("name") == name
    assert node.pop("target") == "label"
    assert hydra.utils.instantiate(node.pop("select")) == Selection()
    estimation = node.pop("estimation")
    assert estimation.pop("select") == {"count": 500}
    return hydra.utils.instantiate(node), hydra.utils.instantiate(estimation)


@pytest.mark.parametrize("name", WRITE)
def test_preset(name, tmp_path):
    dataset, estimation = preset(name, tmp_path)
    assert dataset.modality == "image"
    assert dataset.transform == estimation.transform
    assert len(dataset.names) == (3 if name == "cars" else 10)
    for made, split in ((dataset, "test/"), (estimation, "train/")):
        assert all(uid.startswith(split) for uid in made.uids)
        batch = made.batch(made.uids[:3])
        assert batch.x.shape == (3, 1, 32, 32)
        assert batch.x.dtype == torch.float32
        assert set(batch.target.tolist()) <= dataset.names.keys()
        assert (batch.roi is not None) == (name in ("cars", "digits_canvas"))


def test_estimation_canvases_follow_the_explained_ones(tmp_path):
    changed = ["digits=2", "clutter=3", "fragment=6", "size=80", "digit=30", "seed=5"]
    dataset, estimation = preset("digits_canvas", tmp_path, *(f"dataset.{c}" for c in changed))
    for made in (dataset, estimation):
        assert made.size(made.uids[0]) == (80, 80)
        assert len(made.boxes(made.uids[0])) == 2
    twin = hydra.utils.get_class("attrib.datasets.DigitsCanvas")(
        dataset.transform, "train", size=80, digit=30, digits=2, clutter=3, fragment=6, seed=5
    )
    assert estimation.key == twin.key


def test_the_source_of_the_canvas_can_be_another_set(tmp_path):
    test_idx.write_set(tmp_path, 30)
    source = ("dataset.source._target_=attrib.datasets.MNIST", f"+dataset.source.root={tmp_path}")
    dataset, estimation = preset("digits_canvas", tmp_path, *source)
    assert len(dataset.uids) == 30
    assert set(estimation.uids) < {f"train/{i:05d}/view-00" for i in range(30)}
