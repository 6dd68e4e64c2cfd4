"""Agreement of maps under adversarial attacks: attacks by their formulas, ranks, and what Singh et al. printed."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from contracts import metric_contract
from scipy.stats import rankdata
from test_acd_2d import GOLDEN, net, rounds_as_theirs, walked_on_golden
from test_lipschitz import With, classifier, explainer, samples, small_net
from torch import Tensor

from attrib.agglomeration.walk import Agglomeration
from attrib.datasets.idx import read_idx
from attrib.methods.acd import ACD
from attrib.methods.baselines import Gradient, Random
from attrib.metrics import AdversarialAgreement
from attrib.metrics.adversarial import ranked, released
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError
from attrib.units import Partition

attacks = pytest.importorskip("attrib.metrics.attacks")
MINIMAL = {"minimal": True, "eps": 3.0, "eps_step": 0.02}
SETTINGS = {
    "saliency": {"theta": 0.2},
    "gradient": MINIMAL,
    "fgsm": MINIMAL,
    "boundary": {"max_iter": 5},
    "deepfool": {"max_iter": 40, "epsilon": 0.05},
}


def confident() -> Batch:
    """Samples with the class that the net decides for, so that an attack has something to do."""
    batch = samples(4)
    return dataclasses.replace(batch, target=small_net().double()(batch.x).argmax(1).detach())


def metric(kind: str, **fields) -> AdversarialAgreement:
    return AdversarialAgreement(**({"attack": kind, "settings": SETTINGS[kind], "margin": 1.0} | fields))


@pytest.mark.parametrize("kind", [kind for kind in SETTINGS if kind != "boundary"])
def test_the_contract(kind):
    batch, judged = confident(), With(metric(kind, as_released=True), Gradient())
    found = metric_contract(judged, classifier, batch, explainer(Gradient(), classifier())(batch), 1e-6)
    assert found["agreement"].isfinite().sum() >= 3
    assert (found["distance"].nan_to_num(1.0) > 0).all()


def test_the_boundary_attack_draws_from_each_samples_stream_and_leaves_numpys_as_it_was():
    """The toolbox draws from numpy's own state, which is lent to it for each sample."""
    batch, model = confident(), classifier()
    draw = lambda rows: attacks.twins(  # noqa: E731
        model, batch[rows], "boundary", SETTINGS["boundary"], 1.0, Noise([batch.uids[i] for i in rows], 3)
    )
    before, together = np.random.get_state()[1].copy(), draw([0, 1, 2, 3])
    np.random.rand(5)
    for i in range(4):
        torch.testing.assert_close(draw([i])[0], together[i], rtol=0, atol=1e-5)
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    torch.testing.assert_close(draw([3, 0]), together[[3, 0]], rtol=0, atol=1e-5)
    assert (np.random.get_state()[1] == state).all()
    assert (before != state).any()
    found = With(metric("boundary"), Gradient()).score(
        model, batch, explainer(Gradient(), model)(batch), Noise(batch.uids)
    )
    assert found["agreement"].isfinite().sum() >= 3


# ---- attacks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fgsm", "gradient"])
def test_the_smallest_step_along_the_gradient(kind):
    batch, module = confident(), small_net().double()
    found = attacks.twins(classifier(), batch, kind, MINIMAL, 1.0, Noise(batch.uids))
    for i, target in enumerate(batch.target.tolist()):
        x = batch.x[i : i + 1].clone().requires_grad_()
        low, high = x.min().item() - 1, x.max().item() + 1
        loss = torch.nn.functional.cross_entropy(module(x), batch.target[i : i + 1])
        (grad,) = torch.autograd.grad(loss, x)
        step = grad.sign() if kind == "fgsm" else grad / grad.norm()
        for size in np.arange(0.02, 3.0, 0.02):
            expected = (x.detach() + size * (high - low) * step).clamp(low, high)
            if module(expected).argmax() != target:
                break
        torch.testing.assert_close(found[i], expected[0], rtol=1e-4, atol=1e-5)


def test_deep_fool_goes_to_the_nearest_boundary_of_a_linear_net():
    weights = torch.tensor(np.random.RandomState(0).randn(3, 12))
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3, bias=False)).double()
    linear[1].weight.data = weights
    x = torch.tensor(np.random.RandomState(1).randn(2, 1, 3, 4))
    batch = Batch(("a", "b"), x, linear(x).argmax(1))
    found = attacks.twins(
        Classifier(linear, dtype=torch.float64), batch, "deepfool", {"epsilon": 0.0}, 9.0, Noise(batch.uids)
    )
    for i, own in enumerate(batch.target.tolist()):
        logits, moved = linear(x[i : i + 1])[0], (found[i] - x[i]).flatten()
        gaps = [((logits[own] - logits[k]) / (weights[own] - weights[k]).norm()).item() for k in range(3) if k != own]
        assert moved.norm().item() == pytest.approx(min(gaps), rel=1e-3)


def test_an_attack_that_finds_nothing_leaves_the_sample():
    batch = confident()
    weak = {"minimal": True, "eps": 1e-6, "eps_step": 1e-6}
    found = With(AdversarialAgreement("fgsm", weak), Gradient()).score(
        classifier(), batch, explainer(Gradient(), classifier())(batch), Noise(batch.uids)
    )
    assert found["agreement"].isnan().all()
    sure = With(metric("fgsm", min_confidence=1.0), Gradient())
    assert sure.score(classifier(), batch, torch.rand(4, 5, 6), Noise(batch.uids))["distance"].isnan().all()


def test_the_same_map_everywhere_agrees_with_itself():
    batch = confident()
    map = explainer(Random(), classifier())(batch)
    found = With(metric("fgsm"), Random()).score(classifier(), batch, map, Noise(batch.uids))
    torch.testing.assert_close(found["agreement"], torch.ones(4).double())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attack": "poison"}, "attack is 'poison'"),
        ({"settings": {"power": 3}}, "attack fgsm has no setting 'power'"),
        ({"settings": {"norm": 1}}, "has no setting 'norm'"),
        ({"settings": {"eps": -1.0}}, "attack fgsm refuses"),
        ({"settings": 3}, "must be names and values"),
        ({"margin": -1.0}, "margin"),
        ({"min_confidence": 2.0}, "min_confidence"),
    ],
)
def test_fields_that_make_no_sense_are_errors(fields, words):
    with pytest.raises(UserError, match=words):
        AdversarialAgreement(**fields)


# ---- ranks ----------------------------------------------------------------------------------------------


def by_the_authors(scores_list: list[np.ndarray]) -> np.ndarray:
    """From the description of ``compute_rankings`` of their experiment code: what turns to NaN, step by step."""
    ranks, base = np.zeros(scores_list[0].size), 0
    flat = [scores.ravel() for scores in scores_list]
    for before, after in itertools.pairwise(flat):
        new = np.flatnonzero(np.isnan(after) & ~np.isnan(before))
        ranks[new] = np.argsort(before[new], kind="stable")[::-1] + base
        base += len(new)
    rest = np.flatnonzero(~np.isnan(flat[-1]))
    ranks[rest] = np.argsort(flat[-1][rest], kind="stable")[::-1] + base
    return ranks


def told_apart(found: Agglomeration) -> np.ndarray:
    """The order of units if scores that differ by rounding did not count as equal, as to the authors they do not."""
    levels = np.floor(found.order())
    exact = levels.copy()
    for level in np.unique(levels):
        at = levels == level
        exact[at] += (rankdata(found.scores[int(len(found.combined) - level)][at]) - 0.5) / at.sum()
    return exact


@pytest.mark.parametrize("run", ["im3_cd_p99_s1_n5", "im4_cd_p95_s2_n4"])
def test_the_ranks_are_those_of_the_authors(run):
    found, _ = walked_on_golden(run, as_released=True)
    if not rounds_as_theirs(run, found):
        pytest.skip("this machine rounds otherwise than the authors' did: see test_acd_2d.py")
    order = found.order().ravel()
    theirs = by_the_authors(list(GOLDEN[f"{run}_scores"][: int(GOLDEN[f"{run}_num_before_final"])]))
    exact = told_apart(found).ravel()
    assert np.corrcoef(released(exact), theirs)[0, 1] > 0.999  # equal scores may change places
    assert (np.diff(order[exact.argsort(kind="stable")]) >= 0).all()
    levels = -np.floor(order)
    assert (np.diff(levels[ranked(order).argsort(kind="stable")]) >= 0).all()  # no rank crosses a level
    first = np.flatnonzero(levels == levels.min())
    scores = found.scores[0].ravel()
    assert scores[first].min() > np.delete(scores, first).max() - 1e-9
    np.testing.assert_array_equal(scores[first].argsort(), order[first].argsort())


def test_ranks_of_a_few_numbers():
    values = np.array([2.1, 2.9, 0.5, 2.5, 1.5])
    np.testing.assert_array_equal(ranked(values), [3, 1, 5, 2, 4])
    # The first level is 2.1, 2.9, 2.5, whose argsort is 0, 2, 1, reversed 1, 2, 0.
    np.testing.assert_array_equal(released(values), [1, 2, 4, 0, 3])


def test_the_map_of_the_order():
    batch = samples(2)
    method = ACD("build_up", Partition(side=4), steps=3, shows="order")
    model = classifier()
    found = method.attribute(model, batch, {}, Noise(batch.uids, dtype=torch.float64))["map"]
    alone = method.attribute(model, batch[[1]], {}, Noise(batch.uids[1:], dtype=torch.float64))["map"]
    torch.testing.assert_close(found[1:], alone)
    assert found.max() < 4
    assert found.min() >= 0
    with pytest.raises(UserError, match="shows=order has no level"):
        ACD(shows="order", level=1)


# ---- what the authors printed ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mnist() -> tuple[Tensor, Tensor]:
    places = (folder / "shared" / "data" / "mnist" for folder in Path(__file__).resolve().parents)
    folder = next((place for place in places if place.exists()), None)
    if folder is None:
        pytest.skip("shared/data/mnist is not here")
    pixels = read_idx(folder / "t10k-images-idx3-ubyte.gz", 3)
    labels = read_idx(folder / "t10k-labels-idx1-ubyte.gz", 1)
    x = (torch.tensor(pixels.copy()).float()[:, None] / 255 - 0.1307) / 0.3081
    return x, torch.tensor(labels.astype(np.int64))


def accuracy(module: torch.nn.Module, mnist: tuple[Tensor, Tensor]) -> float:
    x, y = mnist
    with torch.no_grad():
        return (torch.cat([module(rows) for rows in x.split(1000)]).argmax(1) == y).float().mean().item()


def test_their_net_and_their_weakened_net(mnist):
    module = net()
    assert accuracy(module, mnist) == pytest.approx(0.9772, abs=1e-6)
    # Section 4.1: a quarter of the numbers of each layer change places.
    random, weak = np.random.RandomState(17042018), copy.deepcopy(module)
    for p in weak.parameters():
        values = p.data.numpy()
        chosen = random.choice([True, False], values.shape, p=(0.25, 0.75))
        values[chosen] = random.permutation(values[chosen])
    assert accuracy(weak, mnist) == pytest.approx(0.7964, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "p", "tolerance"),
    [("fgsm", (0.060193013, 0.47139338), 1e-5), ("gradient", (0.99989164, 5.7216665e-05), 1e-3)],
)
def test_their_probabilities_after_one_step(mnist, kind, p, tolerance):
    x = mnist[0][3:4]
    model, span = Classifier(net()), (x.max() - x.min()).item() + 2
    batch = Batch(("3",), x, torch.tensor([0]))
    with torch.no_grad():
        before = model.logits(x).softmax(1)[0]
        assert before[[0, 2]].tolist() == pytest.approx([0.9999685, 1.7600636e-05], rel=1e-4)
        twin = attacks.twins(model, batch, kind, {"eps": 1 / span}, 1.0, Noise(batch.uids))
        assert model.logits(twin).softmax(1)[0, [0, 2]].tolist() == pytest.approx(p, rel=tolerance)
