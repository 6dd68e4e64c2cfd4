"""Sensitivity-n: parity with the released code on its subsets, one subset at a time, the contract, a linear net."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contracts import metric_contract
from nets import golden, small_cnn, small_cnn_images
from sentences import classifier as text_classifier
from sentences import lstm, sentence, some_map, some_sentences, texts
from test_irof import H, Sum, W, classifier, samples, small_net
from test_text_insertion_deletion import golden_net
from torch import Tensor

from attrib.metrics import SensitivityN
from attrib.metrics.sensitivity_n import correlation
from attrib.metrics.words import score_subsets
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError
from attrib.units import Units


def score(metric: SensitivityN, batch: Batch, map: Tensor, model: Classifier | None = None) -> dict[str, Tensor]:
    return metric.score(model or classifier(), batch, map, Noise(batch.uids))


@pytest.mark.parametrize("n", [1, 50, 400])
def test_equals_the_released_code(monkeypatch, n):
    """On its own random subsets."""
    data, (x, labels) = golden("metric_sensitivity_n"), small_cnn_images()
    gone = torch.tensor(np.unpackbits(data[f"n{n}_masks"], axis=1)).bool()
    monkeypatch.setattr(SensitivityN, "_subsets", lambda *_: iter([gone.expand(2, -1, -1)]))
    batch, map = Batch(("a", "b"), x[:2], labels[:2]), torch.tensor(data["heatmaps"][:2])
    found = score(SensitivityN(sizes=(n,), samples=40), batch, map, Classifier(small_cnn()))["sensitivity_n"]
    for i in range(2):
        assert abs(found[i].item() - data[f"n{n}_im{i}_corr"]) < 1e-4


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("i", [0, 1])
def test_equals_the_released_code_of_texts(monkeypatch, i, n):
    data = golden("metric_nlp")
    gone = torch.tensor(data[f"s{i}_n{n}_masks"]).bool()
    monkeypatch.setattr(SensitivityN, "_subsets", lambda *_: iter([gone[None]]))
    batch = texts([sentence(*data[f"s{i}_tokens"].tolist())], torch.tensor([1]))
    map = torch.tensor(data[f"s{i}_heatmap"])[None]
    model = Classifier(golden_net(), {"embedding": "embedding"})
    found = score(SensitivityN(sizes=(n,), samples=30), batch, map, model)["sensitivity_n"]
    assert abs(found.item() - data[f"s{i}_n{n}_corr"]) < 1e-4


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_equals_one_subset_at_a_time(baseline, output):
    batch, map = samples(3)
    metric = SensitivityN(points=4, samples=7, baseline=baseline, output=output)
    found, net = score(metric, batch, map)["sensitivity_n_curve"], small_net().double()
    sizes = [round((0.8 * H * W // 1) ** (k / 3)) for k in range(4)]
    for i, (uid, x) in enumerate(zip(batch.uids, batch.x, strict=True)):
        stream, target = Noise([uid]), int(batch.target[i])

        def says(x: Tensor, target: int = target) -> float:
            logits = net(x[None])[0]
            return (logits if output == "logit" else logits.softmax(0))[target].item()

        for k, size in enumerate(sizes):
            change, total = [], []
            for _ in range(7):
                order = stream.ragged_bits((H * W,), 0)[0].argsort()[:size].tolist()
                other = x.clone()
                for p in order:
                    y, column = divmod(p, W)
                    other[:, y, column] = 0 if baseline == "zero" else x.mean((1, 2))
                change.append(says(x) - says(other))
                total.append(sum(map[i].flatten()[p].item() for p in order))
            assert abs(found[i, k].item() - np.corrcoef(change, total)[0, 1]) < 1e-9


def test_true_relevance_of_a_linear_net_correlates_fully():
    batch, other = samples(6)
    batch = Batch(batch.uids, batch.x, torch.ones(6).long())
    weight = torch.tensor(np.random.RandomState(1).randn(3, H, W))
    gain, model = (weight * batch.x).sum(1), classifier(net=Sum(weight))
    metric = SensitivityN(points=5, samples=30)
    curves = [score(metric, batch, map, model)["sensitivity_n_curve"] for map in (gain, other, -gain)]
    torch.testing.assert_close(curves[0], torch.ones(6, 5).double())
    torch.testing.assert_close(curves[2], -torch.ones(6, 5).double())
    assert curves[1].abs().max() < 0.9
    scaled = score(metric, batch, other * 1e-3 + 7, model)["sensitivity_n_curve"]
    torch.testing.assert_close(scaled, curves[1])  # of subsets of one size a shift is a constant


def test_contract():
    batch, map = samples(5)
    map[1, 2, 3] = torch.nan
    map[3] = 0.4
    found = metric_contract(SensitivityN(points=2, samples=3), classifier, batch, map, atol=1e-9)
    for value in found.values():
        assert value[1].isnan().all()
        assert value[[0, 2, 3, 4]].isfinite().all()
    assert found["sensitivity_n"][3] == 0


@pytest.mark.parametrize("words", ["zero", "mask", "delete"])
def test_contract_of_texts(words):
    batch = texts(some_sentences()[:5])
    map = some_map(batch)
    metric = SensitivityN(points=2, samples=3, words=words)
    found = metric_contract(metric, lambda rows: text_classifier(lstm(), rows=rows), batch, map, atol=1e-9)
    enough = batch.words.amax(1) + 1 > 1
    assert (found["sensitivity_n"].isfinite() == enough).all()
    assert enough.sum() > 2


def test_sizes():
    units = torch.tensor([1000, 10, 2, 1])
    found = SensitivityN(points=4).counts(units)
    assert found.tolist() == [[1, 9, 86, 800], [1, 2, 4, 8], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert SensitivityN(sizes=(3, 50)).counts(units).tolist() == [[3, 50], [3, 9], [1, 1], [1, 1]]


def test_correlation():
    r = np.random.RandomState(0)
    a, b = torch.tensor(r.randn(2, 5, 30))
    np.testing.assert_allclose(correlation(a, b), [np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)])
    assert correlation(torch.full((1, 9), 0.1).double().cumsum(0), b[:1, :9]).item() == 0
    assert correlation(a[:1].index_fill(1, torch.tensor([2]), torch.nan), b[:1]).isnan().all()


def test_no_positive_label_is_not_defined():
    """Then there is no score that anything could go with."""
    batch, map = samples(2)
    batch = Batch(batch.uids, batch.x, torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]))
    found = score(SensitivityN(points=2, samples=4), batch, map)
    assert found["sensitivity_n"].isnan().tolist() == [False, True]
    assert found["sensitivity_n_curve"].isnan().all(1).tolist() == [False, True]


def test_errors():
    batch, map = samples()
    with pytest.raises(ValueError, match="does not fit"):
        score(SensitivityN(), batch, map[:, 1:])
    for wrong in (
        {"points": 0}, {"samples": 1}, {"fraction": 1.0}, {"sizes": ()}, {"sizes": (0,)}, {"words": "drop"},
        {"baseline": "black"}, {"output": "loss"},
    ):  # fmt: skip
        with pytest.raises(UserError, match=next(iter(wrong))):
            SensitivityN(**wrong)


class Levelled(torch.nn.Module):
    """Its logits depend on the image only in how sums of it are rounded, and, with ``share``, in its mean."""

    def __init__(self, share: float = 0.0) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1, keepdim=True)
        moved = (x.flatten(1) - mean).mean(1, keepdim=True) + self.share * mean
        return torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0], dtype=x.dtype) + 3 * moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("output", ["logit", "probability"])
def test_what_the_net_rounds_is_no_difference(dtype, output):
    batch, map = samples()
    net = Levelled() if output == "logit" else torch.nn.Sequential(Levelled(), torch.nn.Linear(5, 5))
    found = score(SensitivityN(points=3, samples=9, output=output), batch, map, Classifier(net, dtype=dtype))
    assert found["sensitivity_n_curve"].abs().max() == 0


def test_small_differences_and_sure_decisions_count():
    """A change of the logit by a 1,000th, and one of a probability that is 1 but for 1e-9."""
    batch, _ = samples()
    batch = Batch(batch.uids, batch.x, torch.full((4,), 4))
    model = Classifier(Levelled(0.01), dtype=torch.float32)
    found = score(SensitivityN(points=3, samples=9), batch, batch.x.sum(1), model)
    assert found["sensitivity_n_curve"].min() > 0.99
    weight = torch.tensor(np.random.RandomState(1).randn(3, H, W)) / 1000
    model = Classifier(torch.nn.Sequential(Sum(weight), Shifted()), dtype=torch.float32)
    batch = Batch(batch.uids, batch.x, torch.ones(4).long())
    gain = (weight * batch.x).sum(1)
    found = score(SensitivityN(points=3, samples=9, output="probability"), batch, gain, model)
    assert found["sensitivity_n"].min() > 0.9


class Shifted(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tensor([0.0, 20.0], dtype=x.dtype)


@pytest.mark.parametrize("words", ["zero", "mask", "delete"])
def test_equal_sets_of_words_go_through_the_net_once(words):
    """Of three words there are three sets of one and three of two; fifty of each size are drawn."""
    batch = texts([sentence(4, [5, 6], 7), sentence(8, 9, [10, 11, 12])])
    map, metric = some_map(batch), SensitivityN(sizes=(1, 2), samples=50, words=words)
    model = text_classifier(lstm())
    whole = model.logits(batch.x)
    before = model.passed
    found = metric.score(model, batch, map, Noise(batch.uids))["sensitivity_n_curve"]
    assert model.passed - before == 2 * (1 + 3 + 3 + (words == "zero"))  # for that, the part in front of the vectors
    # Each draw by itself, as a text of its own.
    sums, costs = torch.zeros(2, 2, 50, dtype=torch.float64), torch.zeros(2, 2, 50, dtype=torch.float64)
    gone = next(
        SensitivityN._subsets(Units.words(batch), torch.tensor(2 * [[1] * 50 + [2] * 50]), Noise(batch.uids), 100)
    )
    for i in range(2):
        for k, removed in enumerate(gone[i].tolist()):
            tokens = torch.tensor([w >= 0 and removed[w] for w in batch.words[i].tolist()])
            said = score_subsets(model, batch, torch.tensor([i]), lambda _, t=tokens: t[None], words, "logit")
            sums[i].view(-1)[k] = map[i][tokens].sum()
            costs[i].view(-1)[k] = whole[i, batch.target[i]] - said[0]
    expected = [[np.corrcoef(a, b)[0, 1] for a, b in zip(*pair)] for pair in zip(sums, costs)]
    np.testing.assert_allclose(found, expected, atol=1e-9)
