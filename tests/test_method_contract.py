"""What every method promises, tested by registration: a YAML in ``configs/method`` is enough."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from audio_nets import audio_classifier, sounds
from contracts import fit_contract, method_contract, seeded
from text_nets import text_classifier, texts
from tiny import ROOT, tool
from tiny import pictures as tiny_pictures
from torch import Tensor, nn

from attrib.causal import CausalGraphs
from attrib.config.objects import build
from attrib.methods.parts.losses import target_score
from attrib.methods.parts.statistics import FeatureStatistics
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError

METHODS = sorted((ROOT / "configs" / "method").glob("*.yaml"))
H, W, K = 12, 10, 5

# What makes a method cheap, wherever it has such a field. Nothing else is taken from the YAML but its own values.
CHEAP = {
    "steps": 3, "samples": 3, "batch": 2, "draws": 2, "epochs": 2, "train_batch": 4, "window": 4, "stride": 3,
    "sigma": 0.5, "side": 4, "dataset_size": 6, "sub_dataset_size": 4, "correct": False,
    "low": -1e6, "high": 1e6,
}  # fmt: skip


class Net(nn.Module):
    """A conv net with a ReLU, a pool, a functional ReLU and a layer for every role that a method may ask for."""

    LAYERS = ("conv2", "conv3", "conv4", "hidden", "head")

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.conv3, self.conv4 = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.hidden, self.head = nn.Linear(4 * 6 * 5, 8), nn.Linear(8, K)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv1(x)))
        x = F.relu(self.conv2(x))
        x = self.relu(self.conv3(x))
        x = self.conv4(x).relu()
        return self.head(F.relu(self.hidden(x.flatten(1))))


def layers(roles: Sequence[str]) -> dict[str, str]:
    """The bottleneck first, the layer for CAMs behind it, any other roles from front to back."""
    known = {"bottleneck": "conv2", "cam": "conv4"}
    others = [role for role in roles if role not in known]
    return known | dict(zip(others, Net.LAYERS, strict=False))


def classifier(roles: Sequence[str]) -> Callable[[int, torch.dtype], Classifier]:
    return lambda rows, dtype: Classifier(seeded(Net()), layers(roles), rows=rows, dtype=dtype)


def pictures(n: int, seed: int = 0) -> Batch:
    r = np.random.RandomState(seed)
    uids = tuple(f"{seed}/{i}" for i in range(n))
    x, target = torch.tensor(r.randn(n, 3, H, W)), torch.tensor(r.randint(0, K, n))
    return Batch(uids, x, target, torch.tensor(r.rand(n, H, W) < 0.3))


def load(path: Path, values: Mapping[str, Any] = CHEAP) -> Any:
    """The method of a YAML, made cheap by these values."""
    node = yaml.safe_load(path.read_text())
    node.pop("name"), node.pop("modalities", None)

    def cheap(node: dict[str, Any]) -> dict[str, Any]:
        return {k: cheap(v) if isinstance(v, dict) else values.get(k, v) for k, v in node.items()}

    return build(cheap(node), path.stem)


# Of attention; test_attention_methods.py has their contract, on transformers.
ATTENTION = [path for path in METHODS if path.stem.startswith("attention_")]


# Of texts; test_causal_transformers.py has its contract.
NEED_A_TRANSFORMER = [*ATTENTION, *(path for path in METHODS if path.stem == "causal_paths")]


def explained(method: Any, batch: Batch, state: Mapping[str, Tensor]) -> Batch:
    """With targets that the method can explain: causal graphs know the classes that their fit has seen."""
    if isinstance(method.fit, CausalGraphs):
        return dataclasses.replace(batch, target=state["classes"][-1:].repeat(len(batch)))
    return batch


@pytest.mark.parametrize("path", [p for p in METHODS if p not in ATTENTION], ids=lambda path: path.stem)
@pytest.mark.quick(but=["lrp_*", "acd_text", "input_iba_*", "deconvolution"])
def test_method(path):
    method = load(path)
    roles = (*method.roles, *(method.fit.roles if method.fit else ()))
    build_model = classifier(roles)
    state = fit_contract(method.fit, build_model, pictures(10, seed=1)) if method.fit else {}
    method_contract(method, build_model, explained(method, pictures(4), state), state)


# They differ from lrp_epsilon in what they do with convolutions, of which these nets have none. (causal_gradient makes
# many graphs; test_causal_transformers.py has quick tests of it on texts.)
OF_CONVOLUTIONS = ("lrp", "lrp_epsilon_alpha2_beta1", "lrp_epsilon_gamma_box")


# Their quick tests are on the simpler net, those of the others on the recurrent one.
DEAR = ("acd", "captum", "cd")


OF_TEXTS = {p: type(method) for p in METHODS if "text" in (method := load(p)).MODALITIES}


def alike(path: Path) -> bool:
    """Whether a preset before it has the same class: the slow tests have all of them."""
    before = [of for p, of in OF_TEXTS.items() if p.stem < path.stem and p.stem not in OF_CONVOLUTIONS]
    return OF_TEXTS[path] in before


@pytest.mark.parametrize(
    ("path", "net"),
    [
        pytest.param(
            p,
            net,
            marks=[pytest.mark.slow]
            if p.stem in (*OF_CONVOLUTIONS, "causal_gradient") or alike(p) or (net == "mean") != (p.stem in DEAR)
            else [],
            id=f"{p.stem}-{net}",
        )
        for p in OF_TEXTS
        for net in ("lstm", "mean")
    ],
)
def test_method_of_texts(path, net):
    method, build_model = load(path), text_classifier(net)
    if path in NEED_A_TRANSFORMER:
        with pytest.raises(UserError, match=r"needs self-attention|no convolution or linear layer"):
            method.attribute(build_model(8, torch.float64), texts(4), {}, Noise(texts(4).uids))
        return
    state = fit_contract(method.fit, build_model, texts(10, seed=1)) if method.fit else {}
    method_contract(method, build_model, explained(method, texts(4), state), state)


@pytest.mark.parametrize("path", [p for p in METHODS if "audio" in load(p).MODALITIES], ids=lambda path: path.stem)
@pytest.mark.quick(every=2)
def test_method_of_sounds(path):
    method = load(path)
    build_model = audio_classifier((*method.roles, *(method.fit.roles if method.fit else ())))
    state = fit_contract(method.fit, build_model, sounds(10, seed=1)) if method.fit else {}
    method_contract(method, build_model, sounds(4), state)


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_method_says_what_it_explains(path):
    method = load(path)
    assert set(method.MODALITIES) <= {"image", "text", "audio"}
    assert method.TEXT_ROLES == () or "text" in method.MODALITIES
    assert set(method.TOKENS) <= set(method.EXTRAS)


def test_there_are_methods():
    assert {"iba", "gradient", "random"} <= {path.stem for path in METHODS}


# ---- the contract itself ------------------------------------------------------------------------------


def saliency(model: Classifier, batch: Batch) -> Tensor:
    _, grad = model.gradient(batch.x, lambda logits, rows: target_score(logits, batch.target[rows]))
    return grad.sum(1)


def over_the_batch(model, batch, noise):
    maps = saliency(model, batch)
    return maps / maps.abs().max()


def global_noise(model, batch, noise):
    return saliency(model, batch) + 1e-6 * torch.randn(batch.x.shape[0], H, W)


def noise_by_position(model, batch, noise):
    return saliency(model, batch) + Noise([str(i) for i in range(len(batch))]).normal(H, W)


def noise_in_pieces(model, batch, noise):
    return saliency(model, batch) + model.chunked(lambda rows: noise.normal(H, W)[rows], len(batch))


def leaves_a_hook(model, batch, noise):
    model.module.conv1.register_forward_hook(lambda *_: None)
    return saliency(model, batch)


def leaves_a_hook_after_an_error(model, batch, noise):
    handle = model.module.conv1.register_forward_hook(lambda *_: None)
    maps = saliency(model, batch)
    handle.remove()
    return maps


def trains(model, batch, noise):
    model.module.train()
    return saliency(model, batch)


def thaws(model, batch, noise):
    model.module.requires_grad_()
    return saliency(model, batch)


def overwrites_the_input(model, batch, noise):
    return saliency(model, dataclasses.replace(batch, x=batch.x.mul_(1.0).add_(1e-3)))


def wants_gradients_of_the_input(model, batch, noise):
    batch.x.requires_grad_()
    return saliency(model, dataclasses.replace(batch, x=batch.x.detach()))


def forgives_a_wrong_target(model, batch, noise):
    return saliency(model, dataclasses.replace(batch, target=batch.target.clamp(max=K - 1)))


def not_finite(model, batch, noise):
    return saliency(model, batch).log()


def wrong_shape(model, batch, noise):
    return saliency(model, batch)[:, 1:]


def single_precision_is_another_method(model, batch, noise):
    return saliency(model, batch) * (1 + 0.01 * (model.dtype == torch.float32))


BROKEN = [
    over_the_batch, global_noise, noise_by_position, noise_in_pieces, leaves_a_hook, leaves_a_hook_after_an_error,
    trains, thaws, overwrites_the_input, wants_gradients_of_the_input, forgives_a_wrong_target, not_finite, wrong_shape,
    single_precision_is_another_method,
]  # fmt: skip


class Given:
    """A method that computes what it is given."""

    MAPS, EXTRAS, COLUMNS, DOCUMENTS, TOKENS = {"map": ""}, {}, {}, {}, ()

    def __init__(self, compute: Callable[[Classifier, Batch, Noise], Tensor]) -> None:
        self.compute = compute

    def attribute(self, model, batch, state, noise):
        return {"map": self.compute(model, batch, noise)}


@pytest.mark.parametrize("compute", BROKEN, ids=lambda f: f.__name__)
def test_the_contract_notices(compute):
    with pytest.raises(AssertionError):
        method_contract(Given(compute), classifier(()), pictures(4), {})


def test_the_contract_lets_a_good_method_pass():
    method_contract(Given(lambda model, batch, noise: saliency(model, batch)), classifier(()), pictures(4), {})


def token_gradient(model: Classifier, batch: Batch) -> Tensor:
    front = model.until("embedding", batch.x)
    score = lambda logits, rows: target_score(logits, batch.target[rows])  # noqa: E731
    return model.gradient(front.z, score, "embedding", front.rest)[1].sum(2) * batch.mask


def counts_padding(model, batch, noise):
    return token_gradient(model, batch) * batch.x.shape[1]


def marks_padding(model, batch, noise):
    return token_gradient(model, batch) + ~batch.mask


def noise_that_is_not_ragged(model, batch, noise):
    return token_gradient(model, batch) + noise.normal(*batch.x.shape[1:]) * batch.mask


def map_of_vectors(model, batch, noise):
    return token_gradient(model, batch)[:, :, None]


@pytest.mark.parametrize(
    "compute", [counts_padding, marks_padding, noise_that_is_not_ragged, map_of_vectors], ids=lambda f: f.__name__
)
def test_the_contract_notices_what_is_wrong_with_texts(compute):
    with pytest.raises(AssertionError):
        method_contract(Given(compute), text_classifier("lstm"), texts(4), {})


def test_the_contract_lets_a_good_method_of_texts_pass():
    method_contract(Given(lambda model, batch, _: token_gradient(model, batch)), text_classifier("lstm"), texts(4), {})


# ---- docs/how-to/add-a-method.md --------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    page = (ROOT / "docs" / "how-to" / "add-a-method.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


@pytest.fixture
def as_on_the_page(tmp_path, monkeypatch) -> Path:
    """A folder with the page's files."""
    (tmp_path / "my_module.py").write_text(blocks("python")[0])
    config = tmp_path / "my_configs" / "method" / "positive_cam.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(blocks("yaml")[0])
    for part in ("dataset", "model"):
        shutil.copytree(ROOT / "tests" / "configs" / part, config.parents[1] / part)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    return tmp_path


def test_the_method_of_the_page_keeps_the_contract(as_on_the_page):
    method = load(as_on_the_page / "my_configs" / "method" / "positive_cam.yaml")
    build_model, batch = classifier(method.roles), pictures(4)
    maps = method_contract(method, build_model, batch, {})
    assert maps["map"].min() >= 0
    with pytest.raises(UserError, match="no field 'layr'; did you mean 'layer'"):
        build({"_target_": "my_module.PositiveCAM", "layr": "cam"}, "positive_cam")
    # The second block gives it a fit.
    fit = textwrap.dedent(blocks("python")[1])
    scope = {"FeatureStatistics": FeatureStatistics}
    exec(fit, scope)
    assert scope["fit"].fget(method) == FeatureStatistics("cam")


@pytest.mark.slow
def test_the_commands_of_the_page_run(as_on_the_page, monkeypatch, capfd):
    with_yaml, *_ = blocks("bash")[0].splitlines()
    (without,) = re.findall(r"Without a YAML: `(.*?)`", (ROOT / "docs" / "how-to" / "add-a-method.md").read_text())

    def arguments(command: str) -> list[str]:
        small = ["dataset=tiny", "model=small_cnn"]
        places = [f"dataset.root={tiny_pictures(as_on_the_page, 2)}", f"run.root={as_on_the_page / 'work'}"]
        return [
            *command.removeprefix("attrib run ").split(),
            *small,
            *places,
            "metric=[]",
            "run.device=cpu",
        ]

    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "tests"),
    }  # for nets.small_cnn; my_module lies where it starts
    command = [sys.executable, ROOT / "tools" / "run.py", *arguments(with_yaml)]
    done = subprocess.run(command, cwd=as_on_the_page, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tiny small_cnn positive_cam: maps_computed=2 maps_present=0" in done.stdout

    # The other one explains another layer, so it is another cell; in this process, as starting Python is slow.
    assert tool("run").main(["--config-dir", str(as_on_the_page / "my_configs"), *arguments(without)]) == 0
    assert "tiny small_cnn positive_cam: maps_computed=2 maps_present=0" in capfd.readouterr().out
