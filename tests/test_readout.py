"""Readout IBA: parity with the released code, a slow re-derivation, training that survives a kill."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import yaml
from contracts import close, forbid_global_rng, unchanged
from nets import golden, small_cnn, small_cnn_images
from torch import Tensor, nn
from torchvision import models

from attrib.config.objects import build
from attrib.methods import readout
from attrib.methods.iba import capacity, restrict
from attrib.methods.parts.statistics import Moments
from attrib.methods.readout import IBAReadout, ReadoutFit
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError

CONFIGS = Path(__file__).parent.parent / "configs"
READOUTS = ("readout_1", "readout_2", "readout_3")
LAYERS = {
    "bottleneck": "features.5",
    "readout_1": "features.5",
    "readout_2": "features.8",
    "readout_3": "classifier",
}


def classifier(rows: int = 64, dtype: torch.dtype = torch.float64) -> Classifier:
    return Classifier(small_cnn(), LAYERS, rows=rows, dtype=dtype)


def method(**fields) -> IBAReadout:
    return IBAReadout(**{"readouts": READOUTS, "epochs": 2, "train_batch": 4, "lr": 1e-2, **fields})


class Data:
    """The first ``count`` estimation images, in batches of ``size``."""

    def __init__(self, model: Classifier, count: int = 6, size: int = 4) -> None:
        x, labels = small_cnn_images("est_images")
        self.uids = tuple(f"train/{i}" for i in range(count))
        self._all = Batch(self.uids, x[:count], labels[:count]).to(model.device, model.dtype)
        self._size = size

    def batch(self, uids: Sequence[str]) -> Batch:
        return self._all[[self.uids.index(uid) for uid in uids]]

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.uids), self._size):
            yield self._all[start : start + self._size]


class KilledError(Exception):
    pass


class OnDisk:
    """Keeps what is saved as bytes; ``kill`` ends the process, so to say, after so many saves."""

    def __init__(self, kill: int | None = None) -> None:
        self.bytes: bytes | None = None
        self.saves, self.kill = 0, kill

    def load(self) -> dict[str, Tensor] | None:
        return None if self.bytes is None else safetensors.torch.load(self.bytes)

    def save(self, state: dict[str, Tensor]) -> None:
        self.bytes = safetensors.torch.save(state)
        self.saves += 1
        if self.saves == self.kill:
            raise KilledError

    def wanted(self) -> bool:
        return False


def train(fit: ReadoutFit, model: Classifier, partial: OnDisk | None = None, data: Data | None = None):
    """The state, and what was reported."""
    lines: list[str] = []
    state = fit.run(model, data or Data(model), partial or OnDisk(), lines.append)
    return state, lines


def images(count: int = 5) -> Batch:
    x, labels = small_cnn_images()
    return Batch(tuple(f"test/{i}" for i in range(count)), x[:count], labels[:count])


# ---- the released code ------------------------------------------------------------------------


def released_state() -> dict[str, Tensor]:
    stored = {k: torch.tensor(v) for k, v in golden("iba_readout_f5").items()}
    state = {f"net.{k.removeprefix('sd.')}": v for k, v in stored.items() if k.startswith("sd.")}
    state |= {f"bottleneck.{k}": stored[k] for k in ("mean", "std", "active")}
    for i, role in enumerate(READOUTS):
        state |= {f"{role}.{k}": stored[f"readout{i}_{k}"] for k in ("mean", "std")}
    return state


class Replayed:
    """The released code's noise: numpy's generator, one draw per sample."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.RandomState(seed)

    def normal(self, *shape: int, ragged: int | None = None) -> Tensor:
        return torch.tensor(self._random.randn(1, *shape).astype(np.float32))


@pytest.mark.parametrize("i", range(3))
def test_golden(i):
    stored, model, state = golden("iba_readout_f5"), classifier(dtype=torch.float32), released_state()
    batch, iba = images()[[i]], method()
    predicted, reading = iba.predict(model, batch, state)
    expected = torch.tensor(stored[f"im{i}_alpha"])
    torch.testing.assert_close(predicted.alpha, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    found = iba.attribute(model, batch, state, Noise(batch.uids))
    expected = torch.tensor(stored[f"im{i}_map"])
    torch.testing.assert_close(found["map"][0], expected, rtol=1e-4, atol=1e-4 * expected.max().item())
    # The loss of every class is -log softmax of the logits under restriction.
    front = model.until("bottleneck", batch.x)
    for relu, name in ((False, "logits"), (True, "logits__buggy_clamped")):
        losses = [
            restrict(
                model, "bottleneck", front, predicted.lam, reading.prior, Replayed(1300 + i), 1, torch.tensor([k]), relu
            ).loss
            for k in range(10)
        ]
        torch.testing.assert_close(
            -torch.stack(losses, 1), torch.tensor(stored[f"im{i}_{name}"]).log_softmax(1), rtol=1e-4, atol=1e-3
        )


def test_as_released_clamps_the_pass_and_not_the_map():
    # In front of a ReLU a clamp changes nothing (as in the golden), so the logits are the bottleneck.
    model = Classifier(small_cnn(), LAYERS | {"bottleneck": "classifier"}, dtype=torch.float64)
    batch = images().to("cpu", torch.float64)
    state, _ = train(method().fit, model)
    plain, released = method(), method(as_released=True)
    with_noise = [m.restricted(model, batch, state, Noise(batch.uids, dtype=torch.float64)) for m in (plain, released)]
    assert (with_noise[0].grad != with_noise[1].grad).any()
    close(*(m.attribute(model, batch, state, Noise(batch.uids)) for m in (plain, released)))
    assert released.fit == method(relu=True).fit
    assert released.fit != plain.fit


# ---- slow and obvious -------------------------------------------------------------------------


def gaussian_2d(sigma: float) -> Tensor:
    radius = round(2 * sigma)
    kernel = torch.zeros(2 * radius + 1, 2 * radius + 1, dtype=torch.float64)
    for i in range(-radius, radius + 1):
        for j in range(-radius, radius + 1):
            kernel[i + radius, j + radius] = math.exp(-(i * i + j * j) / (2 * sigma**2))
    return kernel / kernel.sum()


class Slow:
    """One sample at a time, autograd through the whole net."""

    def __init__(self, state: dict[str, Tensor], net: nn.Sequential) -> None:
        self.state = {k: v.double() for k, v in state.items()}
        self.net, self.cnn = net, small_cnn().double()

    def capacity_and_logits(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        s = self.state
        r = self.cnn.features[:6](x).detach()
        second = self.cnn.features[6:9](r)
        logits = self.cnn(x)
        normalised = [
            (value - s[f"{role}.mean"]) / s[f"{role}.std"].clamp(min=0.01)
            for role, value in zip(READOUTS, (r, second, logits))
        ]
        normalised[1] = F.interpolate(normalised[1], (16, 16), mode="bilinear", align_corners=True)
        normalised[2] = normalised[2][..., None, None].expand(1, 10, 16, 16)
        alpha = self.net(torch.cat(normalised, 1).detach()).clamp(-5, 5)
        kernel = gaussian_2d(1.0)
        lam = torch.cat([F.conv2d(F.pad(a[:, None], [2] * 4, "reflect"), kernel[None, None])[:, 0] for a in
                         torch.sigmoid(alpha)[0][:, None]])  # fmt: skip
        std, active = s["bottleneck.std"], (s["bottleneck.active"] > 0.01).double()
        mu, var = lam * (r[0] - s["bottleneck.mean"]) / std, (1 - lam) ** 2
        nats = -0.5 * (1 + var.log() - mu**2 - var) * active
        z = (lam * r[0] + (1 - lam) * (std * eps + s["bottleneck.mean"])) * active
        return nats, self.cnn.classifier(self.cnn.pool(self.cnn.features[6:](z[None])).flatten(1))


def as_module(net: dict[str, Tensor]) -> nn.Sequential:
    shapes = [net[f"conv{i}.weight"].shape for i in (1, 2, 3)]
    convs = [nn.Conv2d(s[1], s[0], 1).double() for s in shapes]
    for i, conv in enumerate(convs, 1):
        conv.load_state_dict({k: net[f"conv{i}.{k}"].double() for k in ("weight", "bias")})
    return nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])


def test_training_is_that_of_a_slow_loop():
    """Four steps: batches of 4 and 2 samples, two epochs."""
    iba, model = method(draws=2, beta=3.0), classifier()
    data = Data(model)
    state, _ = train(iba.fit, model, data=data)
    start = readout.initial_net(32 + 32 + 10, 32, iba.train_seed)
    slow = Slow(state, as_module(start))
    optimizer = torch.optim.Adam(slow.net.parameters(), lr=iba.lr)
    curve = []
    for epoch in range(2):
        order = Noise([f"readout/order/epoch-{epoch}"], 0).permutation(6)[0].tolist()
        for chosen in (order[:4], order[4:]):
            optimizer.zero_grad()
            losses, infos = [], []
            for i in chosen:
                batch = data.batch([f"train/{i}"])
                noise = Noise([f"train/{i}/epoch-{epoch}"], 0, dtype=torch.float64).normal(2, 32, 16, 16)[0]
                passes = [slow.capacity_and_logits(batch.x, eps) for eps in noise]
                losses.append(torch.stack([F.cross_entropy(logits, batch.target) for _, logits in passes]).mean())
                infos.append(passes[0][0].mean())
            (sum(losses) / 4 + 3.0 * sum(infos) / 4).backward()
            optimizer.step()
            model_loss, info = (torch.stack(values).mean().item() for values in (losses, infos))
            curve.append([model_loss + 3.0 * info, model_loss, info])
    torch.testing.assert_close(state["curve"][:, :3], torch.tensor(curve, dtype=torch.float64), rtol=1e-9, atol=0)
    trained = as_module(readout.part(state, "net")).state_dict()
    before = as_module(start).state_dict()
    for name, value in slow.net.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-5, atol=1e-6)  # kept as float32
        assert (value - before[name]).abs().max() > 1e-3


def test_attribute_is_that_of_a_slow_loop():
    model, batch = classifier(), images(2).to("cpu", torch.float64)
    state, _ = train(method().fit, model)
    found = method().attribute(model, batch, state, Noise(batch.uids))
    slow = Slow(state, as_module(readout.part(state, "net")))
    for i in range(2):
        nats, _ = slow.capacity_and_logits(batch.x[i : i + 1], torch.zeros(32, 16, 16).double())
        torch.testing.assert_close(found["capacity"][i], nats.sum(0).detach() / math.log(2))


def test_statistics_are_those_of_all_samples_at_once():
    model = classifier()
    data = Data(model)
    state, _ = train(method(epochs=0).fit, model, data=data)
    found = model.record(LAYERS, data.batch(data.uids).x)
    for role, value in found.items():
        std, mean = torch.std_mean(value, dim=0)
        torch.testing.assert_close(state[f"{role}.mean"], mean.float())
        torch.testing.assert_close(state[f"{role}.std"], std.float())


def test_untrained_it_is_the_identity():
    model, batch = classifier(), images().to("cpu", torch.float64)
    state, lines = train(method(epochs=0).fit, model)
    predicted, _ = method().predict(model, batch, state)
    assert (predicted.alpha > 4.9).all()
    assert state["curve"].shape == (0, 4)
    assert not any("epoch" in line for line in lines)
    weight = state["net.conv1.weight"]  # uniform within 1 / sqrt(fan in)
    assert 0.9 < weight.abs().max() * math.sqrt(74) <= 1
    assert abs(weight.std() * math.sqrt(3 * 74) - 1) < 0.05


def test_units_that_never_vary_do_no_harm():
    model, batch = classifier(), images().to("cpu", torch.float64)
    state, _ = train(method().fit, model)
    for role in ("bottleneck", *READOUTS):
        state[f"{role}.std"].view(-1)[:3] = 0
    assert method().attribute(model, batch, state, Noise(batch.uids))["map"].isfinite().all()
    assert method().restricted(model, batch, state, Noise(batch.uids, dtype=torch.float64)).loss.isfinite().all()


@pytest.mark.parametrize("count", [4, 7, 33])
def test_a_unit_is_constant_whatever_rounding_makes_of_its_mean(count):
    """0.7 + 0.7 + ... is not quite n times 0.7: that is no standard deviation to measure information by."""
    moments, varying = Moments(), torch.linspace(0, 1, count, dtype=torch.float64)
    for rows in torch.stack((torch.full_like(varying, 0.7), 100.1 + 0 * varying, varying), 1).split(4):
        moments.add(rows)
    rounded = Moments()  # a layer in float32 gives other last digits in batches of other sizes
    rounded.add(torch.tensor([0.7, np.nextafter(np.float32(0.7), np.float32(1))] * count)[:, None])
    assert rounded.state()["std"] == 0
    assert moments.state()["std"][:2].tolist() == [0, 0]
    torch.testing.assert_close(moments.state()["std"][2], varying.std().float())

    # Three of the bottleneck's channels give a bias, and no information, wherever the others' ends.
    model, batch = classifier(), images(3).to("cpu", torch.float64)
    conv = model.module.features[5]
    conv.weight.data[:3] = 0
    conv.bias.data[:3] = torch.tensor([0.7, 1.3, 100.1], dtype=torch.float64)
    state, _ = train(method(lr=1e-4).fit, model, data=Data(model, count=count))
    predicted, _ = method().predict(model, batch, state)
    nats = capacity(torch.zeros(()), predicted.lam, torch.zeros(()), torch.ones(()))  # where r is the mean
    torch.testing.assert_close(predicted.capacity[:, :3], nats[:, :3], rtol=0, atol=1e-6)


# ---- the contract of a method -----------------------------------------------------------------


def test_contract():
    batch, model = images().to("cpu", torch.float64), classifier()
    state, _ = train(method().fit, model)

    def attribute(batch: Batch, rows: int = 64, seed: int = 3) -> dict[str, Tensor]:
        return dict(method().attribute(classifier(rows), batch, state, Noise(batch.uids, seed)))

    with forbid_global_rng(), unchanged(batch, model, *state.values()):
        found = dict(method().attribute(model, batch, state, Noise(batch.uids)))
    assert found.keys() == IBAReadout.MAPS.keys() | IBAReadout.EXTRAS.keys()
    assert found["map"].shape == (5, 32, 32)
    assert found["capacity"].shape == (5, 16, 16)
    assert all(value.isfinite().all() and (value >= 0).all() for value in found.values())
    singles = [attribute(batch[[i]]) for i in range(5)]
    atol = 1e-14 * found["capacity"].max().item()
    close({name: torch.cat([s[name] for s in singles]) for name in found}, found, atol)
    close(attribute(batch[[4, 3, 2, 1, 0]]), {name: value.flip(0) for name, value in found.items()}, atol)
    for rows in (1, 3, 64):
        close(attribute(batch, rows), found, atol)


def test_the_fit_is_the_same_for_any_row_limit_and_any_cut_of_the_data():
    model = classifier()
    with forbid_global_rng(), unchanged(model):
        whole, _ = train(method().fit, model)
    for rows, size in ((1, 6), (3, 1), (64, 5)):
        model = classifier(rows)
        again, _ = train(method().fit, model, data=Data(model, size=size))
        close(again, whole, atol=1e-6)  # what is kept is float32
    assert not torch.equal(train(method(train_seed=1).fit, model)[0]["curve"], whole["curve"])


def test_what_cannot_be_read_is_left_out_of_the_training():
    model = classifier()

    class Holed(Data):
        def batch(self, uids: Sequence[str]) -> Batch:
            assert "train/2" not in uids
            return super().batch(uids)

        def __iter__(self) -> Iterator[Batch]:
            for batch in super().__iter__():
                yield batch[[i for i, uid in enumerate(batch.uids) if uid != "train/2"]]

    state, _ = train(method().fit, model, data=Holed(model))
    assert state["bottleneck.n"] == 5
    assert len(state["curve"]) == 4


# ---- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_killed_training_goes_on_bit_by_bit(monkeypatch, dtype):
    monkeypatch.setattr(readout, "SAVE_SECONDS", 0.0)  # a checkpoint after every step
    model, fit = classifier(dtype=dtype), method(epochs=2).fit
    straight, partial = train(fit, model)[0], OnDisk()
    for _ in range(20):
        partial.kill = partial.saves + 1
        try:
            state, _ = train(fit, model, partial)
        except KilledError:
            continue
        break
    assert partial.saves == 5  # the statistics, then each of the four steps
    assert state.keys() == straight.keys()
    assert all(torch.equal(state[name], straight[name]) for name in state)
    assert not any(name.startswith("adam.") for name in state)


def test_a_killed_training_may_go_on_in_another_precision():
    fit, partial = method().fit, OnDisk(kill=2)
    with pytest.raises(KilledError):
        train(fit, classifier(dtype=torch.float64), partial)
    state, _ = train(fit, classifier(dtype=torch.float32), partial)
    torch.testing.assert_close(state["curve"], train(fit, classifier())[0]["curve"], rtol=1e-3, atol=1e-3)


def test_a_checkpoint_and_a_line_per_epoch():
    partial = OnDisk()
    _, lines = train(method(epochs=3).fit, classifier(), partial)
    assert partial.saves == 4
    last = [line for line in lines if "epoch" in line][-1]
    assert last.startswith(f"readout of features.5: {last.total} / {last.total} steps, epoch 3: loss ")


def test_training_lowers_the_loss():
    """And not by closing the bottleneck: the class is still seen."""
    model = classifier(dtype=torch.float32)
    fit = method(beta=1.0, lr=1e-3, epochs=12, train_batch=4).fit
    curve = train(fit, model, data=Data(model, 24))[0]["curve"]
    assert curve[-6:, 0].mean() < 0.6 * curve[:6, 0].mean()
    assert curve[-6:, 2].mean() < 0.3 * curve[:6, 2].mean()
    assert curve[-6:, 1].mean() < math.log(10)


def test_more_beta_lets_less_pass():
    model, batch = classifier(dtype=torch.float32), images()
    bits = []
    for beta in (0.01, 1.0, 10.0):
        state, _ = train(method(beta=beta, lr=1e-3, epochs=20).fit, model, data=Data(model, 12))
        assert state["curve"][-1, 3] < 1
        bits.append(method().attribute(model, batch, state, Noise(batch.uids))["map"].sum().item())
    assert bits[0] > bits[1] > bits[2] > 0


def test_a_loss_that_is_not_finite_names_epoch_and_step():
    model = classifier()
    data = Data(model)
    bad = Noise(["readout/order/epoch-0"], 0).permutation(6)[0].tolist()[4]  # in the second batch
    fit, partial = method().fit, OnDisk(kill=1)
    with pytest.raises(KilledError):
        train(fit, model, partial, data)
    data._all.x[bad] = math.nan
    with pytest.raises(UserError, match=r"features\.5: epoch 1 of 2, step 2 of 2: the loss is nan"):
        train(fit, model, partial, data)
    assert partial.load()["net.conv1.weight"].isfinite().all()


def test_a_bottleneck_that_closed_for_good_is_an_error():
    with pytest.raises(UserError, match=r"features\.5: epoch \d+ of 20: the bottleneck is closed everywhere"):
        train(method(beta=100.0, lr=0.1, epochs=20).fit, classifier(dtype=torch.float32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"train_batch": 0}, "train_batch"), ({"draws": 0}, "draws"), ({"readouts": ()}, "at least one role")],
)
def test_fields_that_make_no_sense(fields, message):
    with pytest.raises(UserError, match=message):
        _ = method(**fields).roles


# ---- other layers -----------------------------------------------------------------------------


def test_a_vector_as_bottleneck():
    model = Classifier(small_cnn(), LAYERS | {"bottleneck": "classifier.0"}, dtype=torch.float64)
    batch = images().to("cpu", torch.float64)
    state, _ = train(method().fit, model)
    found = method().attribute(model, batch, state, Noise(batch.uids))
    assert found["capacity"].shape == (5, 1, 1)
    assert (found["map"] > 0).all()


class Tokens(nn.Module):
    """A class token in front of a 4 x 4 grid."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.block, self.head = nn.Conv2d(3, 6, 8, 8), nn.Linear(6, 6), nn.Linear(6, 10)
        for i, weight in enumerate(self.parameters()):
            weight.data = Noise([str(i)]).normal(*weight.shape)[0] * 0.3

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.block(torch.cat((patches.mean(1, keepdim=True), patches), 1))[:, 0])


def test_tokens():
    layers = {"bottleneck": "block", "readout_1": "block", "readout_2": "patch", "readout_3": "head"}
    model, batch = Classifier(Tokens(), layers, dtype=torch.float64), images().to("cpu", torch.float64)
    state, _ = train(method().fit, model)
    predicted, _ = method(sigma=None).predict(model, batch, state)
    assert predicted.alpha.shape == (5, 17, 6)
    torch.testing.assert_close(predicted.alpha[:, 0], predicted.alpha[:, 1:].mean(1))
    assert method().attribute(model, batch, state, Noise(batch.uids))["map"].shape == (5, 32, 32)


# ---- Classifier.record ------------------------------------------------------------------------


def hooks(model: Classifier) -> int:
    return sum(len(module._forward_hooks) for module in model.module.modules())


def test_record():
    x = images().x.double()
    cnn = small_cnn().double()
    for rows in (1, 2, 64):
        found = classifier(rows).record(LAYERS, x)
        assert tuple(found) == tuple(LAYERS)
        torch.testing.assert_close(found["readout_1"], cnn.features[:6](x), atol=1e-12, rtol=0)
        torch.testing.assert_close(found["readout_2"], cnn.features[:9](x), atol=1e-12, rtol=0)
        torch.testing.assert_close(found["readout_3"], cnn(x), atol=1e-12, rtol=0)


def test_record_counts_its_rows_once():
    model = classifier()
    model.record(LAYERS, images().x.double())
    assert model.passed == 5


def test_record_keeps_what_is_written_over_later():
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x * 1)
            y += 1
            return y

    model = Classifier(Adds(), {"a": "a"})
    torch.testing.assert_close(model.record(["a"], torch.ones(2, 3))["a"], torch.ones(2, 3))


def test_record_leaves_no_hooks():
    model, x = classifier(), images().x.double()
    model.record(LAYERS, x)
    assert hooks(model) == 0
    with pytest.raises(RuntimeError):
        model.record(LAYERS, x[:, :1])  # the net fails
    assert hooks(model) == 0
    with pytest.raises(UserError, match="no layer for the role 'nowhere'"):
        model.record(["readout_1", "nowhere"], x)
    assert hooks(model) == 0


def test_record_wants_layers_that_run_once():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.a(x))

    model = Classifier(Twice(), {"a": "a", "b": "unused"})
    for role, message in (("a", r"layer a runs 2 times .* model\.layers\.a"), ("b", "layer unused runs 0 times")):
        with pytest.raises(UserError, match=message):
            model.record([role], torch.zeros(2, 3))
    assert hooks(model) == 0


# ---- presets ----------------------------------------------------------------------------------


def test_the_preset_is_the_default():
    node = yaml.safe_load((CONFIGS / "method" / "iba_readout.yaml").read_text())
    del node["name"]
    assert build(node, "configs/method/iba_readout") == IBAReadout()
    assert set(node) == {"_target_", *(field.name for field in dataclasses.fields(IBAReadout))}


@pytest.mark.parametrize(
    ("name", "net"),
    [
        ("vgg16", lambda: models.vgg16()),
        ("resnet50", lambda: models.resnet50()),
        ("efficientnet_lite0", lambda: timm.create_model("tf_efficientnet_lite0")),
    ],
)
def test_the_models_have_the_layers_that_it_reads(name, net):
    layers = yaml.safe_load((CONFIGS / "model" / f"{name}.yaml").read_text())["layers"]
    with torch.device("meta"):
        known = dict(net().named_modules())
    assert {*IBAReadout().roles, "readout_4", "readout_5"} <= layers.keys()
    assert set(layers.values()) <= known.keys()
