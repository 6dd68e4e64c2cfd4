"""Every preset composes, builds and runs, by existing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tiny import ROOT, pictures

from attrib.config import build, classifier, experiment, options_of
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
    node = composed(f"model={name}", *MODEL.get(name, []))["model"]
    if not node.get("checkpoint"):
        node |= {"weights": None} if "weights" in node else {"pretrained": False}
    model = classifier(node, options_of({"rows": 4, "device": "cpu"}))
    x = torch.zeros(1, 3, 224, 224)
    assert model.logits(x).shape == (1, 1000)
    assert {"bottleneck", "cam"} <= model.layers.keys()
    z, rest = model.until("bottleneck", x)
    torch.testing.assert_close(model.after("bottleneck", z, rest), model.logits(x), rtol=1e-3, atol=1e-4)


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
