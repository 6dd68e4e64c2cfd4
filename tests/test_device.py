"""Everything on a pretended accelerator (``pretend_device``): the CPU's numbers, and how often the host waits."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pretend_device
import pytest
import torch
import yaml
from audio_nets import SoundNet, sounds
from audio_nets import layers as audio_layers
from contracts import FitSamples, PartialInMemory, close, seeded
from pretend_device import DeviceError, watched
from safetensors.torch import load_file
from test_method_contract import ATTENTION, CHEAP, METHODS, Net, layers, load, pictures
from test_training import TEXT, configured, table  # noqa: F401
from text_nets import text_net, texts
from tiny import ROOT, only_cell, quickly, stored
from tiny import pictures as small_pictures
from torch import Tensor, nn
from transformer_nets import batch_of, net_of

from attrib.causal import CausalGraphs
from attrib.config.objects import build
from attrib.methods.causal import CausalPaths
from attrib.methods.fisher import FunctionalInformation
from attrib.methods.iba import IBA
from attrib.methods.parts.covariance import Covariance
from attrib.methods.readout import IBAReadout
from attrib.models import Classifier
from attrib.models.text import BiLSTM
from attrib.noise import Noise
from attrib.process import exit_status
from attrib.results import tables
from attrib.running import batch_size
from attrib.running.batch_size import FIXED, Budget
from attrib.running.options import Options
from attrib.training import recipe
from attrib.types import Batch
from attrib.units import Partition

pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot pretend",
)
DEVICE = "pretend:0"
# Twice the work of each sample, for which the host should not wait more often.
MORE = {**CHEAP, **{name: 2 * CHEAP[name] for name in ("steps", "samples", "draws", "epochs")}}


@pytest.fixture(autouse=True, scope="module")
def _device():
    pretend_device.install()


@pytest.fixture(autouse=True)
def _revived():
    yield
    pretend_device.revive()


# ---- the device itself -----------------------------------------------------------------------------------


def on_device(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape).to(DEVICE)


REFUSED: dict[str, Callable[[], Any]] = {
    "a tensor of the CPU": lambda: on_device(3) + torch.ones(3),
    "a mask of the CPU": lambda: torch.where(torch.ones(3, dtype=torch.bool), on_device(3), on_device(3)),
    "an index on the device into a tensor of the CPU": lambda: torch.ones(3)[on_device(2).long()],
    "a limit on the CPU": lambda: on_device(3).clamp(max=torch.tensor(1.0)),
    "numpy": lambda: on_device(3).numpy(),
    "integers multiplied": lambda: on_device(2, 2).long() @ on_device(2, 2).long(),
    "a generator of the CPU": lambda: torch.rand(3, device=DEVICE, generator=torch.Generator()),
    "least squares by another driver": lambda: torch.linalg.lstsq(on_device(2, 2), on_device(2, 1), driver="gelsd"),
    "lengths on the device": lambda: nn.utils.rnn.pack_padded_sequence(on_device(2, 3, 1), on_device(2).long() + 1),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cuda_refuses_is_refused(what):
    with pytest.raises((DeviceError, RuntimeError, TypeError)):
        REFUSED[what]()


def test_gradients_of_a_recurrent_net_in_eval_mode_are_refused():
    net, x = nn.LSTM(2, 3).to(DEVICE), on_device(4, 1, 2).requires_grad_()
    net(x)[0].sum().backward()
    with pytest.raises(DeviceError, match="only be called in training mode"):
        net.eval()(x)[0].sum().backward()


def test_after_an_index_out_of_range_nothing_works():
    with pytest.raises(torch.AcceleratorError, match="device-side assert"):
        on_device(3)[on_device(5).long()]
    with pytest.raises(torch.AcceleratorError):
        on_device(3) + 1


def test_waits_and_kernels_are_counted():
    x = torch.ones(3, device=DEVICE)
    with watched() as seen:
        y = (x * 2).view(3, 1)
    assert seen.waits.total() == 0
    assert seen.launches == {"mul": 1}
    for wait in (y.sum().item, y.cpu, lambda: y[y > 1], y.nonzero, lambda: bool(y.sum()), lambda: torch.ones(3).to(x)):
        with watched() as seen:
            wait()
        assert seen.waits.total() == 1, seen.waits


def test_its_numbers_are_those_of_the_cpu():
    net = seeded(Net())
    x = pictures(2).x
    leaf = x.to(DEVICE).requires_grad_()
    logits = net.to(DEVICE)(leaf)
    (grad,) = torch.autograd.grad(logits.sum(), leaf)
    assert logits.device.type == "pretend"
    leaf = x.clone().requires_grad_()
    expected = net.to("cpu")(leaf)
    assert torch.equal(logits.cpu(), expected)
    assert torch.equal(grad.cpu(), torch.autograd.grad(expected.sum(), leaf)[0])


# ---- methods and their fits ------------------------------------------------------------------------------

ONE_BY_ONE = {"captum": "captum's algorithms take one sample at a time"}
# The host decides each step: it draws random graphs, or chooses what is joined next.
STEP_BY_STEP = {"causal_paths", "acd", "acd_text"}


def twice(batch: Batch) -> Batch:
    return batch[[*range(len(batch))] * 2]


def explained(method: Any, model: Classifier, batch: Batch, state: dict[str, Tensor]) -> dict[str, Any]:
    batch = batch.to(model.device, model.dtype)
    return dict(method.attribute(model, batch, state, Noise(batch.uids, 3, model.device, model.dtype)))


def fitted(method: Any, model: Classifier, samples: Batch) -> dict[str, Tensor]:
    samples = samples.to(model.device, model.dtype)
    state = method.fit.run(model, FitSamples(samples, len(samples)), PartialInMemory(), lambda line: None)
    return {name: value.cpu() for name, value in state.items()}  # as it comes from the disk


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    tensors = [{k: v.cpu() for k, v in maps.items() if isinstance(v, Tensor)} for maps in (found, expected)]
    largest = max(value.abs().max().item() for value in tensors[1].values())
    close(*tensors, 1e-12 * max(1.0, largest))
    for name in expected.keys() - tensors[1].keys():  # documents
        assert found[name] == expected[name]


def no_more_waits(few: Callable[[], Any], more: Callable[[], Any], but: str = "nothing") -> None:
    """``but``: in places with this in their description as many as there are."""
    counts = []
    for work in (few, more):
        with watched() as seen:
            work()
        counts.append(Counter({place: n for place, n in seen.waits.items() if but not in place}))
    assert counts[1].total() <= counts[0].total(), counts[1] - counts[0]


def method_on_the_device(
    path: Path, classifier: Callable[[Any, str], Classifier], batch: Batch, samples: Batch
) -> None:
    """The CPU's maps and state; and twice the samples, each with twice the steps, need no more waits."""
    method, more = LOADED[path], load(path, CHEAP if path.stem in STEP_BY_STEP else MORE)
    near, far = classifier(method, "cpu"), classifier(method, DEVICE)
    state = {}
    if method.fit:
        state = fitted(method, near, samples)
        same(fitted(method, far, samples), state)
        if not isinstance(method, IBAReadout):  # whose training reads a batch from the disk for every step
            no_more_waits(lambda: fitted(method, far, samples), lambda: fitted(method, far, twice(samples)))
    same(explained(method, far, batch, state), explained(method, near, batch, state))
    if path.stem not in ONE_BY_ONE:
        no_more_waits(lambda: explained(method, far, batch, state), lambda: explained(more, far, twice(batch), state))


def roles(method: Any) -> tuple[str, ...]:
    fit = getattr(method, "fit", None)
    return (*method.roles, *(fit.roles if fit else ()))


def on(device: str, net: nn.Module, names: dict[str, str]) -> Classifier:
    return Classifier(net, names, rows=16, device=device, dtype=torch.float64)  # no wait a piece, either


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[tuple[str, ...]], dict[str, str]]]] = {
    "image": (lambda: seeded(Net()), layers),
    "text": (lambda: text_net("mean"), lambda _: {"embedding": "embedding", "bottleneck": "embedding"}),
    "tokens": (lambda: text_net("per_token"), lambda _: {"bottleneck": "hidden"}),
    "audio": (lambda: seeded(SoundNet()), audio_layers),
}


@functools.cache
def shared(kind: str, names: tuple[str, ...], device: str) -> Classifier:
    """One for all methods that read these roles, since the graph of a net takes a second."""
    net, layers = NETS[kind]
    return on(device, net(), layers(names))


def of_images(method: Any, device: str) -> Classifier:
    return shared("image", roles(method), device)


def of_texts(method: Any, device: str) -> Classifier:
    return shared("tokens" if isinstance(method, CausalPaths) else "text", (), device)


def of_sounds(method: Any, device: str) -> Classifier:
    return shared("audio", roles(method), device)


LOADED = {path: load(path) for path in METHODS if path not in ATTENTION}


def presets(modality: str) -> list[Path]:
    """One for each class of methods that explain such samples, and for each kind of functional information.

    Of texts and sounds one for a class and those that derive from it.
    """
    found: dict[Any, Path] = {}
    for path, method in LOADED.items():
        if modality in method.MODALITIES:
            kind = next((k for k in type(method).__mro__ if modality != "image" and (k, ()) in found), type(method))
            found.setdefault((kind, getattr(method, "measures", ())), path)
    return list(found.values())


def of_seen_classes(path: Path, batch: Batch, samples: Batch) -> tuple[Batch, Batch]:
    """For a method that explains only classes that its fit has seen: every class of the fit is one of two samples."""
    if isinstance(LOADED[path].fit, CausalGraphs):
        batch = dataclasses.replace(batch, target=torch.full((3,), 2))
        samples = dataclasses.replace(samples, target=torch.tensor([2, 2, 2, 0, 0, 0, 1, 1]))
    return batch, samples


@pytest.mark.parametrize("path", presets("image"), ids=lambda path: path.stem)
@pytest.mark.quick(every=2)
def test_method(path):
    method_on_the_device(path, of_images, *of_seen_classes(path, pictures(3), pictures(8, seed=1)))


@pytest.mark.parametrize("path", presets("text"), ids=lambda path: path.stem)
@pytest.mark.quick(every=2)
def test_method_of_texts(path):
    method_on_the_device(path, of_texts, *of_seen_classes(path, texts(3), texts(8, seed=1)))


@pytest.mark.parametrize("path", presets("audio"), ids=lambda path: path.stem)
def test_method_of_sounds(path):
    method_on_the_device(path, of_sounds, sounds(3), sounds(8, seed=1))


@pytest.mark.parametrize("path", ATTENTION, ids=lambda path: path.stem)
@pytest.mark.quick("attention_rollout")
def test_method_of_attention(path):
    method, batch = load(path), batch_of("vit", 3)
    near, far = (on(device, net_of("vit"), {}) for device in ("cpu", DEVICE))
    same(explained(method, far, batch, {}), explained(method, near, batch, {}))
    no_more_waits(lambda: explained(method, far, batch, {}), lambda: explained(method, far, twice(batch), {}))


def test_units_of_each_sample_are_found_without_waiting_for_each():
    """Superpixels, with a covariance: as many quadratic forms as superpixels."""
    fit = Covariance("matrix")
    method = FunctionalInformation(
        measures=("set_information",), samples=3, covariance=fit, units=Partition("superpixels", segments=6)
    )
    near, far = of_images(method, "cpu"), of_images(method, DEVICE)
    state = fitted(method, near, pictures(12, seed=1))
    batch = pictures(3)
    same(explained(method, far, batch, state), explained(method, near, batch, state))
    no_more_waits(lambda: explained(method, far, batch, state), lambda: explained(method, far, twice(batch), state))


class OfAUser(nn.Module):
    """Recurrent layers that nobody prepared, over the columns of an image."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(36, 5, 2, batch_first=True, bidirectional=True, dropout=0.5), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.flatten(1, 2).mT)[0].mean(1))


def gradients(model: Classifier, batch: Batch, role: str | None) -> dict[str, Tensor]:
    batch = batch.to(model.device)

    def score(logits: Tensor, rows: slice) -> Tensor:
        return logits.gather(1, batch.target[rows, None])[:, 0]

    with watched() as seen:
        if role is None:
            value, grad = model.gradient(batch.x, score)
        else:
            front = model.until(role, batch.x)
            value, grad = model.gradient(front.z, score, role, front.rest)
    assert seen.launches["cudnn"] or model.device.type == "cpu"
    return {"value": value, "grad": grad, "logits": model.logits(batch.x)}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_gradients_of_recurrent_layers(kind):
    """cuDNN, which refuses them in eval mode, gives those of the CPU, and the layers are what they were."""
    near, far = (on(device, seeded(OfAUser(kind)), {}) for device in ("cpu", DEVICE))
    same(gradients(far, pictures(3), None), gradients(near, pictures(3), None))
    assert (far.module.rnn.training, far.module.rnn.dropout) == (False, 0.5)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_recurrent_nets_of_texts(packed):
    near, far = (
        on(
            device,
            seeded(BiLSTM(12, embedding_dim=6, hidden_dim=5, num_classes=5, pad_id=1)) if packed else text_net("lstm"),
            {"embedding": "embedding"},
        )
        for device in ("cpu", DEVICE)
    )
    same(gradients(far, texts(3), "embedding"), gradients(near, texts(3), "embedding"))


# ---- metrics ---------------------------------------------------------------------------------------------

FEW = {"steps": 4, "samples": 4, "points": 3, "segments": 6, "tile": (4, 4), "window": 4, "kernel": 3}
WITH_MORE = {**FEW, "steps": 8, "samples": 8}
METRICS = {
    name: node
    for path in sorted((ROOT / "configs" / "metric").glob("*.yaml"))
    for name, node in yaml.safe_load(path.read_text()).items()
}


def metric_of(name: str, values: dict[str, Any]) -> Any:
    return build({key: values.get(key, value) for key, value in METRICS[name].items()}, name)


def scored(metric: Any, model: Classifier, batch: Batch, map: Tensor) -> dict[str, Tensor]:
    batch = batch.to(model.device, model.dtype)
    noise = Noise(batch.uids, 3, model.device, model.dtype)
    explain = {"explain": lambda batch: batch.x.sum(1).sin()} if metric.NEEDS_EXPLAIN else {}
    return dict(metric.score(model, batch, map.to(model.device, model.dtype), noise, **explain))


def with_regions(batch: Batch) -> Batch:
    roi = torch.zeros(len(batch), *batch.x.shape[2:], dtype=torch.bool)
    roi[..., 2:8] = True
    return dataclasses.replace(batch, roi=roi)


SAMPLES: dict[str, tuple[Callable[[Any, str], Classifier], Batch]] = {
    "image": (of_images, with_regions(pictures(3))),
    "text": (of_texts, texts(3)),
    "audio": (of_sounds, sounds(3)),
}
MADE_ON_THE_HOST = "copy to the device at attrib/metrics/road.py"  # of each block of images that it fills in
SAMPLE_BY_SAMPLE = {  # of images
    "quantus": "quantus works on the host",
    "quantus_2": "quantus works on the host",
    "adversarial": "the attacks of ART work on the host",
    "irof": "its images are made sample by sample, each with as many as it has superpixels",
}


@pytest.mark.parametrize(
    ("name", "kind"), [(n, kind) for n in METRICS for kind in SAMPLES if kind in metric_of(n, FEW).MODALITIES]
)
def test_metric(name, kind):
    metric, more = (metric_of(name, values) for values in (FEW, WITH_MORE))
    classifier, batch = SAMPLES[kind]
    map = batch.x.double().sin() * batch.mask if kind == "text" else batch.x.sum(1).sin()
    near, far = classifier(metric, "cpu"), classifier(metric, DEVICE)
    same(scored(metric, far, batch, map), scored(metric, near, batch, map))
    if name not in SAMPLE_BY_SAMPLE:
        both = map.repeat(2, *[1] * (map.ndim - 1))
        no_more_waits(
            lambda: scored(metric, far, batch, map), lambda: scored(more, far, twice(batch), both), MADE_ON_THE_HOST
        )


# ---- runs and trainings ----------------------------------------------------------------------------------


def test_a_run(capfd, tmp_path):
    """With a fit, metrics, and a sample that fails, through the command line's own door."""
    run, images = quickly(capfd), small_pictures(tmp_path, 5)
    (images / "p004.png").write_bytes(b"no picture")
    metrics = ("metric.insertion_deletion.steps=4", "metric.sensitivity_n.samples=4")
    found = {}
    for device in ("cpu", "pretend"):
        root = tmp_path / device
        result = run(
            "dataset=tiny", "model=small_cnn", "method=iba", "metric=[ehr,insertion_deletion,sensitivity_n]", *metrics,
            "method.steps=2", "run.batch=3", "run.progress=false", f"dataset.root={images}", f"run.root={root}",
            f"run.device={device}", "run.fold=false",  # which has another memory format for the CPU alone
        )  # fmt: skip
        assert result.status == 0, result.err
        rows = {(r.metric, r.uid, r.column): r.value for r in tables.rows(root).itertuples()}
        found[device] = stored(root), rows, only_cell(root).folder.name
    maps, rows, name = found["pretend"]
    assert (maps.keys(), name) == (found["cpu"][0].keys(), found["cpu"][2])
    assert rows == pytest.approx(found["cpu"][1], rel=0, abs=1e-12, nan_ok=True)
    assert len(maps) == 4
    for uid, arrays in maps.items():
        for key, value in arrays.items():
            np.testing.assert_array_equal(value, found["cpu"][0][uid][key])


def test_by_default_memory_says_how_many_samples_go_at_once(monkeypatch):
    model = Classifier(nn.Linear(2, 2), device=DEVICE)
    there = Budget(None, model, IBA())
    assert (there.open, there.most) == (False, FIXED)  # nothing tells what is free on a device that is pretended
    monkeypatch.setattr(batch_size, "free_memory", lambda device: 2**30)
    there = Budget(None, model, IBA())
    assert (there.open, there.most, there.expected) == (True, 1, FIXED)
    assert not Budget(Options(deterministic=True).explained, model, IBA()).open


def test_a_device_that_is_lost_blames_no_sample(capfd, tmp_path, monkeypatch):
    run, explain = quickly(capfd), IBA.attribute

    def dying(self, model, batch, *more):
        if calls and "p003" in batch.uids:
            pretend_device.lose("an illegal memory access was encountered")
        calls.append(batch)
        return explain(self, model, batch, *more)

    arguments = (
        "dataset=tiny", "model=small_cnn", "method=iba", "metric=[]", "method.steps=2", "run.batch=2",
        "run.progress=false", f"dataset.root={small_pictures(tmp_path, 5)}", f"run.root={tmp_path / 'work'}",
        "run.device=pretend",
    )  # fmt: skip
    calls: list[Batch] = []
    with monkeypatch.context() as patch:
        patch.setattr(IBA, "attribute", dying)
        with pytest.raises(
            torch.AcceleratorError, match="illegal memory access"
        ):  # the tool prints it and exits with 1
            run(*arguments)
    assert exit_status.report_error(torch.AcceleratorError("CUDA error")) == 1  # which the tool does with it
    assert len(calls) == 2  # not once more for each sample of the batch
    cell = only_cell(tmp_path / "work")
    assert len(cell.maps.index()) == 2
    assert not list(cell.folder.glob("failures*"))
    pretend_device.revive()
    assert "maps_computed=3 maps_present=2" in run(*arguments).out


@pytest.mark.parametrize("name", ["acd_cnn_digits", "tone_cnn_tones", "acd_lstm_sst2"])
@pytest.mark.quick("acd_*")
def test_a_training(name, tmp_path, table):  # noqa: F811
    """The CPU's weights; a batch of twice as many needs no more waits."""
    arguments = ["train.limit=40", "train.epochs=1", "train.progress=false"]
    if name == "acd_lstm_sst2":
        arguments += [*TEXT[1:], f"dataset.root={table}", "train.baseline=false"]
    weights, waits = {}, []
    for device, batch in (("cpu", 10), ("pretend", 10), ("pretend", 20)):
        root = tmp_path / f"{device}-{batch}"
        how = (f"train.batch={batch}", f"train.device={device}", f"train.root={root}")
        with watched() as seen:
            recipe.train(configured(f"train={name}", *arguments, *how))
        waits.append(sum(n for place, n in seen.waits.items() if "attrib/training/loop.py" in place))
        (path,) = root.rglob("model.safetensors")
        weights[device, batch] = load_file(path)
    for key, value in weights["cpu", 10].items():
        torch.testing.assert_close(weights["pretend", 10][key], value, rtol=0, atol=1e-5)
    assert 0 < waits[2] <= waits[1]
