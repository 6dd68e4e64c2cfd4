"""Every preset composes, builds and runs, by existing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tiny import ROOT, pictures

from attrib.config import build, classifier, experiment, options_of, with_input
from attrib.datasets import ImageTransform
from attrib.models import torchvision_net
from attrib.models.zoo import input_of
from attrib.run import run

CONFIGS = ROOT / "configs"


def presets(axis: str) -> list[str]:
    return sorted(p.stem for p in (CONFIGS / axis).glob("*.yaml"))


def composed(*overrides: str) -> dict:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("run", list(overrides))
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


# What a preset leaves to the user, and how to do without a download.
MODEL = {
    "torchvision": ["model.arch=resnet18", "model.layers={bottleneck: layer2, cam: layer4}"],
    "timm": ["model.arch=vit_tiny_patch16_224", "model.layers={bottleneck: blocks.4, cam: blocks.11}"],
}


@pytest.mark.parametrize("name", presets("model"))
def test_model(name):
    """Builds with random weights where the preset would download; every role is a layer that can be cut at."""
    node = with_input(composed(f"model={name}", *MODEL.get(name, [])))["model"]
    if not node.get("checkpoint"):
        node |= {"weights": None} if "weights" in node else {"pretrained": False}
    model = classifier(node, options_of({"rows": 4, "device": "cpu"}))
    x = torch.zeros(1, 3, 224, 224)
    assert model.logits(x).shape == (1, 1000)
    assert {"bottleneck", "cam"} <= model.layers.keys()
    z, rest = model.until("bottleneck", x)
    torch.testing.assert_close(model.after("bottleneck", z, rest), model.logits(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "weights"), [("vgg16", "DEFAULT"), ("resnet50", "IMAGENET1K_V1")])
def test_the_named_weights_want_what_the_preset_says(name, weights):
    config = composed(f"model={name}", "dataset=imagenet")
    assert config["model"]["weights"] == weights
    known = input_of(torchvision_net, arch=name, weights=weights)
    assert ImageTransform(**known) == build(config["dataset"]["transform"], "transform")


@pytest.mark.parametrize("dataset", presets("dataset"))
def test_images_are_prepared_as_the_library_says(dataset):
    """The nulls of model=torchvision and model=timm reach both transforms of every dataset."""
    root = [] if dataset in ("photos", "imagenet") else ["dataset.root=x"]
    config = with_input(composed("model=torchvision", "model.arch=resnet50", f"dataset={dataset}", *root))
    for node in (config["dataset"], config["dataset"]["estimation"]):
        made = build(node["transform"], "transform")
        assert (made.size, made.resize, made.resize_size) == ((224, 224), "crop", 232)
    given = ["model.input.interpolation=bilinear", "dataset.transform.resize=squash"]
    config = with_input(composed("model=timm", "model.arch=vit_small_patch16_224", f"dataset={dataset}", *root, *given))
    made = build(config["dataset"]["transform"], "transform")
    assert made == ImageTransform(224, (0.5,) * 3, (0.5,) * 3, "squash", None, "bilinear")
    assert config["model"]["input"]["resize_size"] == 248


@pytest.mark.parametrize("name", presets("method"))
def test_method_fields_are_all_in_the_yaml(name):
    """A reader of the YAML sees every hyper-parameter, at its default."""
    node = yaml.safe_load((CONFIGS / "method" / f"{name}.yaml").read_text())
    assert node.pop("name") == name
    method = build(node, name)
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(method).items()}
    assert {k: v for k, v in node.items() if k != "_target_"} == fields
    assert method == type(method)()


@pytest.mark.parametrize("name", presets("metric"))
def test_metric(name):
    node = composed(f"metric=[{name}]")["metric"]
    assert list(node) == [name]
    metric = build(node[name], name)
    assert set(metric.COLUMNS.values()) <= {"higher", "lower", "none"}


@pytest.mark.parametrize("method", presets("method"))
def test_every_method_with_every_metric(method, tmp_path: Path):
    """The whole way of the command line, on a small net and three pictures."""
    images = pictures(tmp_path, 3)
    cheap = {"steps": 2, "samples": 2, "epochs": 1, "batch": 2, "window": 16, "stride": 16}
    node = yaml.safe_load((CONFIGS / "method" / f"{method}.yaml").read_text())
    overrides = [f"method.{k}={v}" for k, v in cheap.items() if k in node]
    metrics = ",".join(presets("metric"))
    config = composed(
        f"method={method}", "dataset=boxed_images", f"dataset.root={images}", "dataset.classes=null",
        f"metric=[{metrics}]", *(f"metric.{m}.steps=3" for m in presets("metric") if "insertion" in m),
        f"run.root={tmp_path / 'work'}", "run.progress=false", *overrides,
    )  # fmt: skip
    config["model"] = yaml.safe_load((ROOT / "tests" / "configs" / "model" / "small_cnn.yaml").read_text())
    cell = experiment(config)
    summary = run(cell, options_of(config["run"]))
    assert summary.failed == 0
    assert (summary.maps_computed, summary.scores_computed) == (3, 3 * len(presets("metric")))
