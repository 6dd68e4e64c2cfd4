"""IBA: parity with the released code, a slow re-derivation from the paper's formulas, an oracle, the edges."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from contracts import seeded
from nets import golden, small_cnn, small_cnn_images
from torch import Tensor, nn

from attrib.fit import State
from attrib.methods.iba import IBA, Gaussian, capacity
from attrib.methods.parts.losses import target_loss
from attrib.methods.parts.statistics import FeatureStatistics, Moments
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError

# ---- parity with the released code ----------------------------------------------------------------


class ReleasedNoise:
    """The released code's draws: one numpy stream per sample, float32."""

    def __init__(self, *seeds: int) -> None:
        self.streams = [np.random.RandomState(seed) for seed in seeds]

    def normal(self, *shape: int, ragged: int | None = None) -> Tensor:
        return torch.tensor(np.stack([r.randn(*shape).astype(np.float32) for r in self.streams]))


class StoredNoise:
    """The draws themselves, (step, draw, *layer), for one sample."""

    def __init__(self, draws: np.ndarray) -> None:
        self.draws = iter(torch.tensor(draws))

    def normal(self, *shape: int, ragged: int | None = None) -> Tensor:
        draw = next(self.draws)
        assert draw.shape == shape
        return draw[None]


def close(found: Tensor, expected: np.ndarray, rel: float) -> None:
    """The goldens' measure: largest difference over largest value."""
    found = found.detach().numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= rel * np.abs(expected).max()


def released_state(data: dict[str, np.ndarray], prefix: str = "") -> State:
    return {name: torch.tensor(data[prefix + name]) for name in ("mean", "std", "active")}


def explain_released(layer: str, images: list[int], state: State, noise: object, **fields: object):
    model = Classifier(small_cnn(), {"bottleneck": layer})
    x, labels = small_cnn_images()
    batch = Batch(tuple(map(str, images)), x[images], labels[images])
    method, streams = IBA(**fields), noise()
    found, _ = method.optimise(model, batch, state, streams)
    return method.attribute(model, batch, state, noise()), found


def test_capacity_equals_the_released_code():
    data = {k: torch.tensor(v) for k, v in golden("iba_pieces").items()}
    close(capacity(data["r"], data["lam"], data["mean"], data["std"]), data["kl"].numpy(), 1e-5)
    expected = data["kl_lam_0_and_1"]
    lam = expected.isinf().to(expected.dtype)
    assert set(expected.unique().tolist()) == {0.0, float("inf")}
    assert torch.equal(capacity(data["r"], lam, data["mean"], data["std"]), expected)


@pytest.mark.parametrize("layer", ["5", "9"])
def test_statistics_equal_the_released_code(layer):
    data = golden("iba_analyze")
    x, _ = small_cnn_images("est_images")
    model = Classifier(small_cnn(), {"bottleneck": f"features.{layer}"})
    state = FeatureStatistics().run(model, Estimation(x, 37), NoPartial(), lambda line: None)
    assert state["n"] == 200
    close(state["mean"], data[f"f{layer}_mean"], 1e-5)
    close(state["std"], data[f"f{layer}_std"], 1e-5)
    prior = Gaussian.of(state, 0.01, 0.01, state["mean"])
    assert np.array_equal(prior.active.numpy(), data[f"f{layer}_active"])
    if layer == "9":
        half = Gaussian.of(state, 0.01, 0.5, state["mean"])
        assert np.array_equal(half.active.numpy(), data["f9_active_thr_p5"])
        assert 0 < half.active.mean() < prior.active.mean()


class Estimation:
    """Images to fit on, in batches."""

    def __init__(self, x: Tensor, size: int) -> None:
        self.x, self.size = x, size
        self.uids = tuple(f"e{i}" for i in range(len(x)))

    def batch(self, uids):
        index = [self.uids.index(uid) for uid in uids]
        return Batch(tuple(uids), self.x[index], torch.zeros(len(uids)).long())

    def __iter__(self):
        return (self.batch(self.uids[i : i + self.size]) for i in range(0, len(self.uids), self.size))


class NoPartial:
    def load(self):
        return None

    def save(self, state):
        raise AssertionError("statistics are cheap: nothing to save")

    def wanted(self):
        return False


def test_all_images_at_once_equal_the_released_code_one_by_one():
    data = golden("iba_analyze")
    images = [0, 2, 3, 4]
    maps, found = explain_released(
        "features.5", images, released_state(data, "f5_"), lambda: ReleasedNoise(*(1000 + i for i in images))
    )
    for row, image in enumerate(images):
        close(maps["map"][row], data[f"f5_im{image}_map"], 1e-3)
        for ours, theirs in (("loss", "loss"), ("loss_model", "model_loss"), ("loss_info", "info_loss")):
            close(found.losses[ours][row], data[f"f5_im{image}_{theirs}"], 1e-4)
            assert torch.equal(maps[ours][row], found.losses[ours][row])
    close(found.capacity[0], data["f5_im0_capacity_nats"], 1e-3)
    close(found.alpha[0], data["f5_im0_alpha"], 1e-2)
    bits = data["f5_im0_capacity_nats"].sum(0) / np.log(2)
    close(maps["capacity"][0], bits, 1e-3)


@pytest.mark.parametrize(
    ("name", "layer", "seed", "fields"),
    [
        ("f5_b1_s3", "features.5", 1100, {"batch": 1, "steps": 3, "beta": 1.0, "lr": 0.5, "min_std": 0.1}),
        ("f9_nosmooth_relu", "features.9", 1200, {"sigma": None, "relu": True}),
    ],
)
def test_options_equal_the_released_code(name, layer, seed, fields):
    data = golden("iba_analyze")
    state = released_state(data, name[:3])
    maps, found = explain_released(layer, [0], state, lambda: ReleasedNoise(seed), **fields)
    close(maps["map"][0], data[f"{name}_im0_map"], 1e-3)
    close(found.capacity[0], data[f"{name}_im0_capacity_nats"], 1e-3)
    close(found.alpha[0], data[f"{name}_im0_alpha"], 1e-2)
    for ours, theirs in (("loss", "loss"), ("loss_model", "model_loss"), ("loss_info", "info_loss")):
        close(found.losses[ours][0], data[f"{name}_im0_{theirs}"], 1e-4)


def test_given_noise_equals_the_released_code():
    data = golden("iba_explicit_noise")
    state, image = released_state(data), int(data["image_index"])
    maps, found = explain_released("features.8", [image], state, lambda: StoredNoise(data["noise"]), batch=4, steps=3)
    close(maps["map"][0], data["map"], 1e-4)
    close(found.capacity[0], data["capacity_nats"], 1e-4)
    close(found.alpha[0], data["alpha"], 1e-4)
    close(found.losses["loss"][0], data["loss"], 1e-4)


def test_our_own_noise_agrees_with_the_released_code_over_seeds():
    data = golden("iba_analyze")
    state = released_state(data, "f5_")
    maps = torch.cat(
        [explain_released("features.5", [0], state, lambda s=s: Noise(["0"], seed=s))[0]["map"] for s in range(5)]
    ).numpy()
    mean, std = data["f5_im0_seeds_mean"], data["f5_im0_seeds_std"]
    assert np.corrcoef(maps.mean(0).ravel(), mean.ravel())[0, 1] >= 0.95
    np.testing.assert_allclose(maps.mean(), mean.mean(), rtol=0.05)
    np.testing.assert_allclose(maps.std(0).mean(), std.mean(), rtol=0.5)


# ---- the paper's formulas, slowly -------------------------------------------------------------------


def smoothing_matrix(size: int, sigma: float | None) -> Tensor:
    """(size, size): what a place gets from each other one; the border is a mirror. The radius is 2 sigma."""
    matrix = torch.zeros(size, size, dtype=torch.float64)
    radius = min(round(2 * sigma), size - 1) if sigma else 0
    weights = {d: np.exp(-(d**2) / (2 * sigma**2)) if sigma else 1.0 for d in range(-radius, radius + 1)}
    for place in range(size):
        for d, weight in weights.items():
            at = abs(place + d)
            at = 2 * (size - 1) - at if at >= size else at
            matrix[place, at] += weight / sum(weights.values())
    return matrix


def smoothed(lam: Tensor, kind: str, sigma: float | None) -> Tensor:
    """``lam`` (*layer) of one sample."""
    if kind == "channels_first":
        rows, columns = smoothing_matrix(lam.shape[1], sigma), smoothing_matrix(lam.shape[2], sigma)
        return torch.einsum("ij,cjk,lk->cil", rows, lam, columns)
    if kind == "channels_last":
        rows, columns = smoothing_matrix(lam.shape[0], sigma), smoothing_matrix(lam.shape[1], sigma)
        return torch.einsum("ij,jkc,lk->ilc", rows, lam, columns)
    if kind == "tokens":  # one class token, then a square
        side = round((len(lam) - 1) ** 0.5)
        square = smoothed(lam[1:].reshape(side, side, -1), "channels_last", sigma)
        return torch.cat((lam[:1], square.reshape(side * side, -1)))
    return lam


def reference(
    net: nn.Module, layer: str, x: Tensor, target: Tensor, state: State, eps: list[Tensor], method: IBA, kind: str
) -> tuple[Tensor, Tensor, list[float], list[float]]:
    """alpha, capacity in nats, both losses per step: one sample, the whole net, autograd through everything.

    x (*input); eps[step] (draws, *layer) standard normal.
    """
    module = net.get_submodule(layer)
    caught: list[Tensor] = []
    handle = module.register_forward_hook(lambda _m, _i, out: caught.append(out))
    net(x[None])
    handle.remove()
    r = caught[0][0].detach()
    mean = state["mean"].double()
    std = state["std"].double().clamp(min=method.min_std)
    active = (state["active"] > method.active_neurons_threshold).double()
    alpha = torch.full_like(r, method.initial_alpha).requires_grad_()
    adam = torch.optim.Adam([alpha], lr=method.lr)
    model_losses, info_losses = [], []
    for draws in eps:
        lam = smoothed(torch.sigmoid(alpha), kind, method.sigma)
        restricted = []

        def bottleneck(_module, _inputs, out, lam=lam, draws=draws, restricted=restricted):
            z = torch.stack([lam * out[0] + (1 - lam) * (std * e + mean) for e in draws])  # eq. 3
            restricted.append(torch.relu(z * active) if method.relu else z * active)
            return restricted[0]

        handle = module.register_forward_hook(bottleneck)
        logits = net(x.expand(len(draws), *x.shape))
        handle.remove()
        if target.ndim == 0:
            loss = torch.stack([-torch.log(torch.softmax(row, 0)[target]) for row in logits]).mean()
        else:
            loss = torch.stack([-torch.log(torch.sigmoid(row[target == 1])).mean() for row in logits]).mean()
        # KL of two normal distributions: N(lam r + (1 - lam) mean, ((1 - lam) std)^2) and N(mean, std^2). Eq. 4.
        p = torch.distributions.Normal(lam * r + (1 - lam) * mean, (1 - lam) * std)
        nats = torch.distributions.kl_divergence(p, torch.distributions.Normal(mean, std)) * active
        adam.zero_grad()
        (loss + method.beta * nats.mean()).backward()
        adam.step()
        model_losses.append(loss.item())
        info_losses.append(nats.mean().item())
    return alpha.detach(), nats.detach(), model_losses, info_losses


class Permute(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


def conv_net() -> nn.Module:
    return seeded(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 5, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(5 * 8 * 8, 6),
        )
    )


def channels_last_net() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 2, 2), Permute(0, 2, 3, 1), nn.Linear(4, 5), nn.GELU(), nn.Flatten(), nn.Linear(320, 6)]
    return seeded(nn.Sequential(*layers))


def vision_transformer() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    net = VisionTransformer(img_size=16, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=6)
    seeded(net, 0.5).head.weight.mul_(30)
    return net


class Residual(nn.Module):
    """The bottleneck's input also goes around it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4 * 8 * 8, 6)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x).relu()
        return self.head((stem + self.branch(stem)).relu().flatten(1))


NETS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "conv": (conv_net, "3", "channels_first"),
    "behind_relu": (conv_net, "4", "channels_first"),
    "residual": (lambda: seeded(Residual()), "branch", "channels_first"),
    "channels_last": (channels_last_net, "2", "channels_last"),
    "tokens": (vision_transformer, "blocks.0", "tokens"),
    "vector": (lambda: nn.Sequential(*conv_net(), nn.ReLU(), seeded(nn.Linear(6, 6))), "6", "vector"),
}


def pictures(n: int, seed: int = 0) -> Batch:
    r = np.random.RandomState(seed)
    return Batch(
        tuple(f"s{i}" for i in range(n)), torch.tensor(r.randn(n, 3, 16, 16)), torch.tensor(r.randint(0, 6, n))
    )


def explain(net: nn.Module, layer: str, method: IBA, batch: Batch, rows: int = 64):
    """What attrib finds, and the state it found it with."""
    model = Classifier(net, {"bottleneck": layer}, rows=rows, dtype=torch.float64)
    state = FeatureStatistics().run(model, Estimation(pictures(20, 1).x, 7), NoPartial(), lambda line: None)
    found, _ = method.optimise(model, batch, state, Noise(batch.uids, 3, dtype=torch.float64))
    maps = method.attribute(model, batch, state, Noise(batch.uids, 3, dtype=torch.float64))
    return maps, found, state


def compare(kind: str, method: IBA, batch: Batch) -> None:
    build, layer, place = NETS[kind]
    maps, found, state = explain(build(), layer, method, batch)
    assert found.alpha.std() > 0.1, "the optimisation went nowhere"
    for i, uid in enumerate(batch.uids):
        stream = Noise([uid], 3, dtype=torch.float64)
        eps = [stream.normal(method.batch, *found.alpha.shape[1:])[0] for _ in range(method.steps)]
        expected = reference(build(), layer, batch.x[i], batch.target[i], state, eps, method, place)
        alpha, nats, model_loss, info_loss = expected
        np.testing.assert_allclose(found.alpha[i], alpha, rtol=0, atol=1e-9)
        np.testing.assert_allclose(found.capacity[i], nats, rtol=0, atol=1e-9)
        np.testing.assert_allclose(maps["loss_model"][i], model_loss, rtol=0, atol=1e-9)
        np.testing.assert_allclose(maps["loss_info"][i], info_loss, rtol=0, atol=1e-9)
        total = np.array(model_loss) + method.beta * np.array(info_loss)
        np.testing.assert_allclose(maps["loss"][i], total, rtol=0, atol=1e-9)
        np.testing.assert_allclose(maps["capacity"][i], bits_by_hand(nats, place), rtol=0, atol=1e-9)


def bits_by_hand(nats: Tensor, kind: str) -> np.ndarray:
    """(h, w): the sum over channels, in bits; a class token lies nowhere."""
    bits = nats.numpy() / np.log(2)
    if kind == "channels_first":
        return bits.sum(0)
    if kind == "vector":
        return bits.sum().reshape(1, 1)
    if kind == "tokens":
        side = round((len(bits) - 1) ** 0.5)
        return bits[1:].sum(-1).reshape(side, side)
    return bits.sum(-1)


OPTIONS = [
    IBA(steps=6, batch=3, beta=0.01),
    IBA(steps=6, batch=2, beta=0.1, sigma=None, lr=0.5, min_std=0.5, initial_alpha=2.0),
    IBA(steps=6, batch=2, beta=0.01, sigma=1.7, relu=True, active_neurons_threshold=0.6),
]


@pytest.mark.parametrize("method", OPTIONS, ids=["default", "not_smoothed", "relu_inactive"])
@pytest.mark.parametrize("kind", NETS)
def test_equals_the_formulas_of_the_paper(kind, method):
    if kind == "channels_last":
        method = dataclasses.replace(method, layout="channels_last")
    compare(kind, method, pictures(3))


@pytest.mark.parametrize("kind", ["conv", "tokens"])
def test_several_labels_equal_the_formulas_of_the_paper(kind):
    batch = pictures(2)
    target = torch.tensor([[0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0]])
    compare(kind, IBA(steps=5, batch=2, beta=0.01), dataclasses.replace(batch, target=target))


def test_a_layer_with_units_that_never_fire():
    method = IBA(steps=5, batch=2, sigma=None, active_neurons_threshold=0.5)
    maps, found, state = explain(conv_net(), "4", method, pictures(2))
    off = state["active"] <= 0.5
    assert 0.1 < off.float().mean() < 0.9
    assert not found.capacity[:, off].any()
    assert (found.capacity[:, ~off] > 0).all()
    assert torch.equal(found.alpha[:, off], torch.full_like(found.alpha[:, off], 5.0))
    assert maps["map"].isfinite().all()


@pytest.mark.parametrize("rows", [1, 5])
def test_rows_do_not_matter(rows):
    method = IBA(steps=4, batch=3)
    many, few = (explain(conv_net(), "3", method, pictures(3), rows=r)[0] for r in (64, rows))
    for name in many:
        torch.testing.assert_close(few[name], many[name], rtol=0, atol=1e-9)


# ---- what must hold -----------------------------------------------------------------------------------


class Corner(nn.Module):
    """The logits depend on the upper left quarter alone."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)[:, :, :8, :8].mean((2, 3)) * 8)


def test_information_is_found_where_the_net_looks():
    maps, _, _ = explain(seeded(Corner()), "features", IBA(steps=20, batch=4, beta=0.1), pictures(3))
    for one in maps["map"]:
        inside = one[:8, :8].mean()
        one[:9, :9] = 0  # smoothing reaches a little further
        assert inside > 20 * one.mean()
    assert (maps["loss"][:, -1] < maps["loss"][:, 0]).all()
    assert (maps["map"] >= 0).all()


def test_more_weight_on_information_leaves_less_of_it():
    bits = [explain(conv_net(), "3", IBA(steps=8, batch=2, beta=b), pictures(2))[0]["map"] for b in (0.01, 0.1, 10.0)]
    totals = [b.flatten(1).sum(1) for b in bits]
    assert (totals[0] > totals[1]).all()
    assert (totals[1] > totals[2]).all()


def test_the_map_is_before_the_last_step():
    """As in the released code: the capacity belongs to the alpha that the last forward pass used."""
    batch = pictures(2)
    _, five, state = explain(conv_net(), "3", IBA(steps=5, batch=2, sigma=None), batch)
    _, four, _ = explain(conv_net(), "3", IBA(steps=4, batch=2, sigma=None), batch)
    r = Classifier(conv_net(), {"bottleneck": "3"}, dtype=torch.float64).until("bottleneck", batch.x).z
    prior = Gaussian.of(state, 0.01, 0.01, r)
    expected = capacity(r, four.alpha.sigmoid(), prior.mean, prior.std) * prior.active
    torch.testing.assert_close(five.capacity, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_open_bottleneck_stays_finite(dtype):
    """sigmoid(alpha) rounds to 1, where the capacity is infinite."""
    model = Classifier(conv_net(), {"bottleneck": "3"}, dtype=dtype)
    batch = pictures(2).to("cpu", dtype)
    state = FeatureStatistics().run(model, Estimation(batch.x, 2), NoPartial(), lambda line: None)
    for sigma in (None, 1.0):
        method = IBA(steps=3, batch=2, initial_alpha=60.0, sigma=sigma)
        maps = method.attribute(model, batch, state, Noise(batch.uids, dtype=dtype))
        assert all(value.isfinite().all() for value in maps.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_prior_does_not_depend_on_precision(dtype):
    """A standard deviation of zero is raised to min_std; 12 samples of 20 are not more than 0.6 of them."""
    moments = Moments()
    moments.add(torch.tensor([[1.0, i >= 8, i >= 7] for i in range(20)]))
    prior = Gaussian.of(moments.state(), 0.01, 0.6, torch.zeros(3, dtype=dtype))
    assert prior.active.tolist() == [1, 0, 1]
    assert prior.std[0] == torch.tensor(0.01, dtype=dtype)
    assert {t.dtype for t in prior} == {dtype}


def test_losses():
    logits = torch.tensor([[0.0, 2.0, -1.0], [1.0, 3.0, 5.0]], dtype=torch.float64)
    one = target_loss(logits, torch.tensor([1, 0]))
    np.testing.assert_allclose(
        one, [-np.log(np.exp(2) / (1 + np.exp(2) + np.exp(-1))), np.log(1 + np.exp(2) + np.exp(4))]
    )
    several = target_loss(logits, torch.tensor([[1, 1, 0], [0, 0, 1]]))
    np.testing.assert_allclose(several, [(np.log(2) + np.log(1 + np.exp(-2))) / 2, np.log(1 + np.exp(-5))])


def test_a_role_that_the_model_lacks_is_named():
    model = Classifier(conv_net(), {"cam": "3"}, dtype=torch.float64)
    with pytest.raises(UserError, match=r"'rear'.*cam"):
        IBA(layer="rear").attribute(model, pictures(1), {}, Noise(["s0"]))


@pytest.mark.parametrize("field", ["steps", "batch"])
def test_nothing_can_be_found_in_no_steps(field):
    with pytest.raises(UserError, match=f"{field} is 0, must be at least 1"):
        IBA(**{field: 0})
