"""Infidelity: captum's and the released program's numbers, one square at a time, the contract, linear nets, edges."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from audio_nets import audio_classifier, sounds
from captum.metrics import infidelity as captum_infidelity
from contracts import metric_contract
from nets import small_cnn, small_cnn_images
from sentences import bag_of_words, lstm, score_of, sentence, some_map, some_sentences, texts
from sentences import classifier as text_classifier
from test_irof import H, Recorder, Sum, W, classifier, samples, small_net
from torch import Tensor

from attrib.metrics import Infidelity
from attrib.metrics.infidelity import Squares, sums
from attrib.metrics.perturb import baseline as replaced
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError


def score(metric: Infidelity, batch: Batch, map: Tensor, model: Classifier | None = None) -> dict[str, Tensor]:
    return metric.score(model or classifier(), batch, map, Noise(batch.uids))


def drawn(metric: Infidelity, uid: str, size: tuple[int, ...]) -> list[tuple[tuple[int, ...], int]]:
    """The squares of a sample, first place and side."""
    first, side, weight = metric._squares(torch.tensor([size]), Noise([uid]))
    return [(tuple(f), s) for f, s, w in zip(first[0].tolist(), side[0].tolist(), weight[0].tolist()) if w]


def mask(size: tuple[int, ...], first: tuple[int, ...], side: int) -> Tensor:
    inside = torch.zeros(size, dtype=torch.bool)
    inside[tuple(slice(f, f + side) for f in first)] = True
    return inside


def defined(said: list[float], cost: list[float], beta: str) -> tuple[float, float]:
    """Both columns, from the paper's formulas."""
    said, cost = np.array(said), np.array(cost)
    best = np.mean(said * cost) / np.mean(said**2)
    best = max(best, 0.0) if beta == "positive" else best
    return np.mean((best * said - cost) ** 2), np.mean((said - cost) ** 2)


# ---- other programs --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["square", "noise"])
def test_equals_captum(kind):
    """On the same perturbations, of a trained net; captum wants a number for every channel."""
    (x, labels), map = small_cnn_images(), torch.tensor(np.random.RandomState(0).randn(3, 32, 32)) * 0.1
    metric, n = Infidelity(kind, samples=12, beta="any"), 12
    batch, net = Batch(tuple("abc"), x[:3].double(), labels[:3]), small_cnn().double()
    found = score(metric, batch, map, Classifier(net, dtype=torch.float64))
    if kind == "square":
        of = [torch.stack([mask((32, 32), *s) for s in drawn(metric, uid, (32, 32))]) for uid in batch.uids]
        change = torch.cat(of)[:, None].double().expand(-1, 3, -1, -1)  # binary
        perturbed = batch.x.repeat_interleave(n, 0) * (1 - change)
    else:
        low, high = (edge.view(-1, 1, 1, 1, 1) for edge in batch.x.flatten(1).aminmax(dim=1))
        stream = Noise(batch.uids)
        draws = torch.stack([stream.normal(32, 32) for _ in range(n)], 1)[:, :, None].double()
        perturbed = (0.2 * (high - low) * draws).maximum(low).minimum(high).expand(-1, -1, 3, -1, -1).flatten(0, 1)
        change = batch.x.repeat_interleave(n, 0) - perturbed
    for name, normalize in (("infidelity", True), ("infidelity_unscaled", False)):
        theirs = captum_infidelity(
            net,
            lambda _: (change, perturbed),
            batch.x,
            map[:, None].expand(-1, 3, -1, -1) / 3,
            target=batch.target,
            n_perturb_samples=n,
            normalize=normalize,
        )
        torch.testing.assert_close(found[name], theirs, rtol=1e-9, atol=0)


def test_all_squares_as_in_the_released_program():
    """Its loop over sides and corners, for sides 2 and 3; enough samples mean every square once."""
    batch, map = samples(2)
    net, metric = small_net().double(), Infidelity(samples=10_000, sides=(2, 3), beta="any")
    found = score(metric, batch, map)
    for i, x in enumerate(batch.x):
        said, cost = [], []
        for side in (2, 3):
            for row in range(H - side + 1):
                for column in range(W - side + 1):
                    gone = mask((H, W), (row, column), side)
                    said.append(map[i][gone].sum().item())
                    change = net(x[None]) - net(x.masked_fill(gone, 0.0)[None])
                    cost.append(change[0, batch.target[i]].item())
        expected = defined(said, cost, "any")
        assert found["infidelity"][i].item() == pytest.approx(expected[0], rel=1e-9)
        assert found["infidelity_unscaled"][i].item() == pytest.approx(expected[1], rel=1e-9)


# ---- the definition --------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", ["positive", "any"])
@pytest.mark.parametrize(("baseline", "output"), [("zero", "logit"), ("mean", "probability")])
def test_equals_one_square_at_a_time(baseline, output, beta):
    batch, map = samples()
    metric, net = Infidelity(samples=30, baseline=baseline, output=output, beta=beta), small_net().double()
    found = score(metric, batch, map)
    for i, (uid, x) in enumerate(zip(batch.uids, batch.x, strict=True)):
        base = torch.zeros_like(x) if baseline == "zero" else x.mean((1, 2), keepdim=True).expand_as(x)

        def f(image: Tensor, i: int = i) -> float:
            logits = net(image[None])[0]
            return (logits if output == "logit" else logits.softmax(0))[batch.target[i]].item()

        said, cost = [], []
        for square in drawn(metric, uid, (H, W)):
            gone = mask((H, W), *square)
            said.append(map[i][gone].sum().item())
            cost.append(f(x) - f(torch.where(gone, base, x)))
        expected = defined(said, cost, beta)
        assert len(said) == 30
        assert found["infidelity"][i].item() == pytest.approx(expected[0], rel=1e-9)
        assert found["infidelity_unscaled"][i].item() == pytest.approx(expected[1], rel=1e-9)


def test_equals_one_noisy_baseline_at_a_time():
    batch, map = samples(3)
    found, net = score(Infidelity("noise", samples=9, sigma=0.5), batch, map), small_net().double()
    for i, (uid, x) in enumerate(zip(batch.uids, batch.x, strict=True)):
        stream, said, cost = Noise([uid]), [], []
        for _ in range(9):
            z = (0.5 * (x.max() - x.min()) * stream.normal(H, W).double()).clamp(x.min(), x.max()).expand(3, H, W)
            said.append(sum(((x - z)[c] * map[i] / 3).sum().item() for c in range(3)))
            cost.append((net(x[None]) - net(z[None]))[0, batch.target[i]].item())
        expected = defined(said, cost, "positive")
        assert found["infidelity"][i].item() == pytest.approx(expected[0], rel=1e-6)
        assert found["infidelity_unscaled"][i].item() == pytest.approx(expected[1], rel=1e-6)


@pytest.mark.parametrize("words", ["zero", "mask", "delete"])
def test_equals_one_run_of_words_at_a_time(words):
    metric, sentences = Infidelity(samples=6, sides=(1, 3), words=words), some_sentences(special=True)
    batch, net = texts(sentences), lstm()
    map = some_map(batch)
    found = score(metric, batch, map, text_classifier(net))
    for i, text in enumerate(sentences):
        value = Counter()
        for (_, word), v in zip(text, map[i].tolist(), strict=False):
            value[word] += v
        count = max(word for _, word in text) + 1
        said, cost = [], []
        for (first,), side in drawn(metric, batch.uids[i], (count,)):
            gone = list(range(first, first + side))
            said.append(sum(value[word] for word in gone))
            target = int(batch.target[i])
            cost.append(
                score_of(net, text, target, [], words, logit=True)
                - score_of(net, text, target, gone, words, logit=True)
            )
        expected = defined(said, cost, "positive")
        assert found["infidelity"][i].item() == pytest.approx(expected[0], rel=1e-9, abs=1e-15)
        assert found["infidelity_unscaled"][i].item() == pytest.approx(expected[1], rel=1e-9)


# ---- squares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "sides"), [((7, 5), (1, 3)), ((7, 5), (2, 9)), ((9,), (2, 4)), ((30, 28), None)])
def test_every_square_once_and_no_other(size, sides):
    squares = drawn(Infidelity(samples=10_000, sides=sides), "a", size)
    least, most = sides or (1, 10)
    wanted = [
        (first, side)
        for side in range(min(least, *size), min(most, *size) + 1)
        for first in np.ndindex(*(n - side + 1 for n in size))
    ]
    assert sorted(squares) == sorted(wanted)


def test_squares_are_equally_likely():
    """Of 20 + 12 + 6 squares, 4,000 draws of 30: chi squared of 37 degrees of freedom, not beyond 4 deviations."""
    metric, size = Infidelity(samples=30, sides=(1, 3)), torch.tensor([[5, 4]]).expand(4000, -1)
    found = metric._squares(size, Noise([str(i) for i in range(4000)]))
    assert found.weight.all()
    names = torch.cat((found.first, found.side[..., None]), 2).flatten(0, 1)
    count = names.unique(dim=0, return_counts=True)[1].double()
    assert len(count) == 38
    expected = 4000 * 30 / 38
    assert ((count - expected) ** 2 / expected).sum() < 37 + 4 * (2 * 37) ** 0.5


@pytest.mark.parametrize("size", [(11,), (6, 9), (3, 4, 5)])
def test_sums_of_squares(size):
    r = np.random.RandomState(0)
    map = torch.tensor(r.randn(2, *size))
    side = torch.tensor(r.randint(0, 3, (2, 15)))
    first = torch.tensor(np.stack([r.randint(0, n - 2, (2, 15)) for n in size], 2))
    found = sums(map, Squares(first, side, side > 0))
    for i in range(2):
        for k in range(15):
            expected = map[i][mask(size, tuple(first[i, k].tolist()), int(side[i, k]))].sum()
            torch.testing.assert_close(found[i, k], expected, rtol=0, atol=1e-12)


# ---- what must hold --------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"samples": 7}, {"perturbation": "noise", "samples": 5}, {"sides": (6, 6)}])
def test_contract(fields):
    batch, map = samples(5)
    map[1, 2, 3] = torch.nan
    map[3] = 0.0
    found = metric_contract(Infidelity(**fields), classifier, batch, map, atol=1e-9)
    for name, value in found.items():
        assert value[1].isnan(), name
        assert (value[[0, 2, 3, 4]] >= 0).all(), name
    assert found["infidelity"][3] == found["infidelity_unscaled"][3]


@pytest.mark.parametrize("words", ["zero", "delete"])
def test_contract_of_texts(words):
    batch = texts([*some_sentences(special=True)[:3], *some_sentences()[3:], sentence(special=True)])
    map = some_map(batch)
    map[2, 3] = torch.nan
    metric = Infidelity(samples=4, words=words)
    found = metric_contract(metric, lambda rows: text_classifier(lstm(), rows), batch, map)
    for name, value in found.items():
        assert value.isnan().nonzero().flatten().tolist() == [2, 5], name  # a broken map, a text without words


@pytest.mark.parametrize("kind", ["square", "noise"])
def test_contract_of_sounds(kind):
    batch = sounds(4)
    map = torch.tensor(np.random.RandomState(5).randn(4, batch.x.shape[-1]))
    metric_contract(Infidelity(kind, samples=6), audio_classifier(), batch, map)


@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_input_difference_times_gradient_is_faithful_to_a_linear_net(baseline):
    batch, _ = samples()
    weight = torch.tensor(np.random.RandomState(1).randn(3, H, W))
    batch = Batch(batch.uids, batch.x, torch.ones(4).long())
    map = ((batch.x - replaced(batch.x, baseline)) * weight).sum(1)
    found = score(Infidelity(baseline=baseline), batch, map, classifier(net=Sum(weight)))
    for name, value in found.items():
        assert (value < 1e-20).all(), name
    other = score(Infidelity(baseline=baseline), batch, map * 7, classifier(net=Sum(weight)))
    assert (other["infidelity"] < 1e-20).all()  # any scale will do
    assert (other["infidelity_unscaled"] > 1e-3).all()


def test_gradient_is_faithful_to_a_linear_net_under_noise():
    """Of one channel exactly, whatever the noise."""
    x = samples()[0].x[:, :1]
    batch, weight = Batch(tuple("abcd"), x, torch.ones(4).long()), torch.tensor(np.random.RandomState(1).randn(1, H, W))
    found = score(Infidelity("noise", samples=20), batch, weight.expand(4, -1, -1), classifier(net=Sum(weight)))
    assert all((value < 1e-20).all() for value in found.values())


def test_best_scale_is_the_best_and_a_map_that_says_nothing_the_worst():
    batch, map = samples()
    metric = Infidelity(samples=100)
    nothing = score(metric, batch, map * 0)["infidelity"]
    found = score(metric, batch, map)
    turned = score(metric, batch, -map)
    for factor in (0.1, 0.3, 1.0, 3.0):
        unscaled = score(metric, batch, map * factor)["infidelity_unscaled"]
        assert (found["infidelity"] <= unscaled + 1e-12).all()
    assert (found["infidelity"] <= nothing + 1e-12).all()
    torch.testing.assert_close(found["infidelity"].maximum(turned["infidelity"]), nothing)  # one of them says nothing
    free = Infidelity(samples=100, beta="any")
    either, way = (score(free, batch, m)["infidelity"] for m in (map, -map))
    torch.testing.assert_close(either, way)
    torch.testing.assert_close(either, found["infidelity"].minimum(turned["infidelity"]))


def test_true_contributions_beat_their_opposite():
    batch, other = samples(6)
    weight = torch.tensor(np.random.RandomState(1).randn(3, H, W)) * 0.3
    batch = Batch(batch.uids, batch.x, torch.ones(6).long())
    gain = (weight * batch.x).sum(1)
    oracle, random, worst = (
        score(Infidelity(), batch, map, classifier(net=Sum(weight)))["infidelity"] for map in (gain, other, -gain)
    )
    assert (oracle < random).all()
    assert (random <= worst + 1e-12).all()
    assert random.mean() < worst.mean()


def test_true_contributions_of_words():
    net = bag_of_words()
    batch = texts(some_sentences(special=True))
    token = (net.embedding.weight @ net.fc.weight.T).detach()
    map = token[batch.x].gather(2, batch.target[:, None, None].expand(-1, batch.x.shape[1], 1)).squeeze(2)
    found = score(Infidelity(), batch, map, text_classifier(net))
    assert all((value < 1e-20).all() for value in found.values())


def test_equal_squares_share_a_pass():
    Recorder.seen.clear()
    batch, map = samples(2)
    score(Infidelity(samples=10_000, sides=(5, 5)), batch, map, classifier(rows=50, net=Recorder()))
    assert sum(Recorder.seen) == 2 * ((H - 4) * (W - 4) + 1)
    assert set(Recorder.seen[:-2]) == {50}
    assert Recorder.seen[-1] == 2  # the inputs as they are


def test_errors():
    batch, map = samples()
    with pytest.raises(ValueError, match="does not fit"):
        score(Infidelity(), batch, map[:, 1:])
    text = texts(some_sentences())
    with pytest.raises(UserError, match="which texts do not have"):
        score(Infidelity("noise"), text, some_map(text), text_classifier(lstm()))
    for wrong in (
        {"perturbation": "tile"}, {"samples": 0}, {"sides": (3, 2)}, {"sides": (0, 2)}, {"sides": (2,)},
        {"sigma": -1.0}, {"beta": "best"}, {"words": "drop"}, {"baseline": "black"}, {"output": "loss"},
    ):  # fmt: skip
        with pytest.raises(UserError, match=next(iter(wrong))):
            Infidelity(**wrong)
