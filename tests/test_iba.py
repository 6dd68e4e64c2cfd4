"""IBA: parity with the released code, a slow re-derivation from the paper's formulas, an oracle, every documented edge."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from nets import golden, small_cnn, small_cnn_images
from torch import Tensor, nn

from attrib.methods import State
from attrib.methods.iba import IBA, Gaussian, capacity
from attrib.methods.losses import target_loss
from attrib.methods.statistics import FeatureStatistics
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError

# ---- parity with the released code ----------------------------------------------------------------


class ReleasedNoise:
    """The released code's draws: one numpy stream per sample, float32."""

    def __init__(self, *seeds: int) -> None:
        self.streams = [np.random.RandomState(seed) for seed in seeds]

    def normal(self, *shape: int) -> Tensor:
        return torch.tensor(np.stack([r.randn(*shape).astype(np.float32) for r in self.streams]))


class StoredNoise:
    """The draws themselves, (step, draw, *layer), for one sample."""

    def __init__(self, draws: np.ndarray) -> None:
        self.draws = iter(torch.tensor(draws))

    def normal(self, *shape: int) -> Tensor:
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
    ends = torch.zeros_like(data["r"])
    ends[:, :2] = 1  # found from the golden: its first channels are the open ones
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
    maps, found = explain_released(
        "features.8", [image], state, lambda: StoredNoise(data["noise"]), batch=4, steps=3
    )
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
