"""Metrics that ask for other maps: how the runner serves them; Lipschitz estimate and max-sensitivity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from contracts import close, forbid_global_rng, metric_contract
from test_run import maps, only_cell, run, scores, summary  # noqa: F401 (run is a fixture)
from torch import Tensor, nn

from attrib.methods.baselines import Gradient, Random, SmoothGrad
from attrib.metrics import Lipschitz
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError

H, W, K = 5, 6, 4


def small_net() -> nn.Module:
    """Weights without a random generator."""
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * H * W, K))
    for i, p in enumerate(net.parameters()):
        p.data = torch.arange(p.numel()).add(7.0 * i).mul(1.7).sin().mul(0.3).view_as(p)
    return net


def classifier(rows: int = 64, net: nn.Module | None = None) -> Classifier:
    return Classifier(net or small_net(), rows=rows, dtype=torch.float64)


def samples(n: int = 3) -> Batch:
    r = np.random.RandomState(0)
    return Batch(tuple(f"s{i}" for i in range(n)), torch.tensor(r.randn(n, 2, H, W)), torch.tensor(r.randint(0, K, n)))


def explainer(method: Any, model: Classifier, seed: int = 3) -> Callable[[Batch], Tensor]:
    """As ``Experiment.explain`` does it."""
    return lambda b: method.attribute(model, b, {}, Noise(b.uids, seed, dtype=torch.float64))["map"]


@dataclass(frozen=True)
class With:
    """The metric with a method, as the contract calls metrics."""

    metric: Any
    method: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.metric, name)

    def score(self, model: Classifier, batch: Batch, map: Tensor, noise: Noise) -> dict[str, Tensor]:
        return self.metric.score(model, batch, map, noise, explainer(self.method, model))


def score(metric: Lipschitz, method: Any, batch: Batch, model: Classifier | None = None) -> dict[str, Tensor]:
    model = model or classifier()
    map = explainer(method, model)(batch)
    return With(metric, method).score(model, batch, map, Noise(batch.uids))


@pytest.mark.parametrize("normalize", ["norm", "max", "none"])
@pytest.mark.parametrize("method", [Gradient(), SmoothGrad(samples=3)])
def test_equals_one_point_at_a_time(method, normalize):
    batch, net = samples(), small_net().double()
    found = score(Lipschitz(samples=6, radius=0.2, normalize=normalize), method, batch)

    def explained(i: int, x: Tensor) -> np.ndarray:
        """Gradients one at a time; SmoothGrad's noise is the sample's own at every point."""
        stream = Noise([batch.uids[i]], 3, dtype=torch.float64)
        copies = [x]
        if isinstance(method, SmoothGrad):
            sigma = 0.15 * (x.max() - x.min())
            copies = [x + sigma * stream.normal(*x.shape)[0] for _ in range(3)]
        total = np.zeros((H, W))
        for copy in copies:
            leaf = copy.clone().requires_grad_()
            net(leaf[None])[0, batch.target[i]].backward()
            total += leaf.grad.sum(0).numpy() / len(copies)
        return total

    for i, (uid, x) in enumerate(zip(batch.uids, batch.x, strict=True)):
        stream, here = Noise([uid], dtype=torch.float64), explained(i, x)
        largest = ratio = 0.0
        for _ in range(6):
            step = 0.2 * (x.max() - x.min()) * (2 * stream.uniform(*x.shape)[0] - 1)
            there = explained(i, x + step)
            divide = {"norm": (np.linalg.norm(here),) * 2, "max": (abs(here).max(), abs(there).max()), "none": (1, 1)}
            first, second = divide[normalize]
            moved = np.sqrt(((there / second - here / first) ** 2).sum())
            largest, ratio = max(largest, moved), max(ratio, moved / np.sqrt((step.numpy() ** 2).sum()))
        assert abs(found["lipschitz"][i].item() - ratio) < 1e-9
        assert abs(found["max_sensitivity"][i].item() - largest) < 1e-9


class Quadratic(nn.Module):
    """The first logit is half the sum of weighted squares, so its gradient is the weighted input; the other is 0."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: Tensor) -> Tensor:
        logit = (self.weight * x**2).flatten(1).sum(1) / 2
        return torch.stack((logit, torch.zeros_like(logit)), 1)


def test_known_lipschitz_constants():
    r = np.random.RandomState(1)
    batch = Batch(("a", "b"), torch.tensor(r.randn(2, 1, H, W)), torch.zeros(2).long())
    for weight in (0.5, -3.0):
        found = score(Lipschitz(normalize="none"), Gradient(), batch, classifier(net=Quadratic(weight)))
        torch.testing.assert_close(found["lipschitz"], torch.full((2,), abs(weight)).double())
    constant = nn.Sequential(nn.Flatten(), nn.Linear(H * W, 2))
    found = score(Lipschitz(normalize="none"), Gradient(), batch, classifier(net=constant))
    assert found["lipschitz"].abs().max() < 1e-9
    # Of a gradient that is the input, normalised, the max-sensitivity is the largest |step| / |x|.
    wide, narrow = (
        score(Lipschitz(radius=radius), Gradient(), batch, classifier(net=Quadratic(1.0)))["max_sensitivity"]
        for radius in (0.1, 0.01)
    )
    torch.testing.assert_close(wide / narrow, torch.full((2,), 10.0).double())
    span = batch.x.flatten(1).amax(1) - batch.x.flatten(1).amin(1)
    assert (wide <= 0.1 * span * (H * W) ** 0.5 / batch.x.flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("normalize", ["norm", "max"])
def test_the_scale_of_a_map_does_not_matter(normalize):
    batch, model, metric = samples(), classifier(), Lipschitz(samples=3, normalize=normalize)
    explain = explainer(Gradient(), model)
    one = metric.score(model, batch, explain(batch), Noise(batch.uids), explain)
    other = metric.score(model, batch, explain(batch) * 1e-3, Noise(batch.uids), lambda b: explain(b) * 1e-3)
    close(one, other)


@pytest.mark.parametrize("normalize", ["norm", "max", "none"])
def test_contract(normalize):
    batch = samples(4)
    map = explainer(SmoothGrad(samples=2), classifier())(batch)
    map[1, 2, 3] = torch.nan
    found = metric_contract(
        With(Lipschitz(samples=3, normalize=normalize), SmoothGrad(samples=2)), classifier, batch, map
    )
    for value in found.values():
        assert value.isnan().tolist() == [False, True, False, False]


def test_sounds():
    r = np.random.RandomState(1)
    batch = Batch(("a", "b"), torch.tensor(r.randn(2, 1, 20)), torch.zeros(2).long())
    found = score(Lipschitz(normalize="none"), Gradient(), batch, classifier(net=Quadratic(2.0)))
    torch.testing.assert_close(found["lipschitz"], torch.full((2,), 2.0).double())


def test_undefined():
    batch = samples()
    batch.x[1] = 0.7  # no range
    model = classifier()
    map = explainer(Gradient(), model)(batch)
    map[0] = 0.0  # no norm

    def broken(b: Batch) -> Tensor:
        found = explainer(Gradient(), model)(b)
        found[2, 0, 0] = torch.inf
        return found

    found = Lipschitz().score(model, batch, map, Noise(batch.uids), broken)
    assert all(value.isnan().all() for value in found.values())


def test_as_many_maps_at_once_as_samples():
    asked: list[int] = []

    def explain(b: Batch) -> Tensor:
        asked.append(len(b))
        return b.x.sum(1)

    batch, model = samples(), classifier()
    with forbid_global_rng():
        Lipschitz(samples=7).score(model, batch, batch.x.sum(1), Noise(batch.uids), explain)
    assert asked == [3] * 7


def test_errors():
    for wrong in ({"samples": 0}, {"radius": 0.0}, {"normalize": "l1"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Lipschitz(**wrong)


# ---- the runner ----------------------------------------------------------------------------------

AGAIN = "+metric.again._target_=tiny_methods.MapAgain"


@pytest.mark.parametrize("method", ["smooth_grad", "iba", "random"])
def test_an_unchanged_input_gives_the_stored_map(run, method):  # noqa: F811
    """By the method's own noise and, where it has one, its fitted state; also when only the score is missing."""
    cheap = {"smooth_grad": ["method.samples=2"], "iba": ["method.steps=2"]}.get(method, [])
    first = run(f"method={method}", "metric=[]", *cheap)
    assert first.status == 0, first.err
    second = run(f"method={method}", "metric=[]", *cheap, AGAIN, "run.batch=5")
    assert summary(second) == dict(maps_computed=0, maps_present=6, scores_computed=6, scores_present=0, failed=0)
    found = {column: [] for column in ("same", "other")}
    for (*_, column), value in scores(run.root).items():
        found[column].append(value)
    assert max(found["same"]) < 1e-3
    assert (max(found["other"]) < 1e-3) == (method == "random")  # whose map does not depend on the input


def test_several_maps_are_scored_each_by_its_own(run):  # noqa: F811
    result = run("method=random", "method._target_=tiny_methods.TwoMaps", "metric=[]", AGAIN)
    assert result.status == 0, result.err
    assert summary(result)["scores_computed"] == 6
    same = {key: value for key, value in scores(run.root).items() if key[-1] == "same"}
    assert {key[2] for key in same} == {"input", "noisy"}
    assert max(same.values()) < 1e-5


def test_what_fails_is_in_the_ledger(run):  # noqa: F811
    """Flaky raises for p001 and gives NaN for p004, whose maps are missing; the other maps can be asked for."""
    result = run("method=flaky", "metric=[]", AGAIN)
    assert summary(result)["scores_computed"] == 4
    assert set(maps(run.root)) == {"p000", "p002", "p003", "p005"}
    assert only_cell(run.root).folder.exists()


def test_random_maps_do_not_change():
    """Their noise is the sample's own, so the worst explanation is the most robust: low is not good by itself."""
    found = score(Lipschitz(), Random(), samples())
    assert all((value == 0).all() for value in found.values())
