"""Comprehensiveness and sufficiency: a slow re-derivation, the contract, every documented edge."""

from __future__ import annotations

import math

import pytest
import torch
from contracts import metric_contract
from sentences import (
    bag_of_words,
    classifier,
    lstm,
    score_of,
    sentence,
    some_map,
    some_sentences,
    texts,
    word_order,
)
from torch import Tensor

from attrib.metrics import Eraser
from attrib.metrics.words import REMOVALS
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError


def score(metric: Eraser, batch: Batch, map: Tensor, model: Classifier | None = None) -> dict[str, Tensor]:
    return metric.score(model or classifier(lstm()), batch, map, Noise(batch.uids))


@pytest.mark.parametrize("removal", REMOVALS)
@pytest.mark.parametrize("make", [bag_of_words, lstm])
@pytest.mark.parametrize("fields", [{}, {"bins": (0.3,), "output": "logit"}, {"bins": (1.0, 0.25)}])
def test_equals_the_definition_one_text_at_a_time(fields, make, removal):
    metric, net = Eraser(words=removal, **fields), make()
    sentences = some_sentences(special=True)
    batch = texts(sentences)
    map = some_map(batch)
    found = score(metric, batch, map, classifier(net))
    for i, text in enumerate(sentences):
        words, target, logit = word_order(text, map[i]), int(batch.target[i]), metric.output == "logit"
        whole = score_of(net, text, target, [], removal, logit)
        comprehensiveness = sufficiency = 0.0
        for share in metric.bins:
            best = max(1, math.ceil(round(share * len(words), 6)))
            comprehensiveness += whole - score_of(net, text, target, words[:best], removal, logit)
            sufficiency += whole - score_of(net, text, target, words[best:], removal, logit)
        assert abs(found["comprehensiveness"][i].item() - comprehensiveness / len(metric.bins)) < 1e-12
        assert abs(found["sufficiency"][i].item() - sufficiency / len(metric.bins)) < 1e-12


@pytest.mark.parametrize("removal", REMOVALS)
def test_contract(removal):
    sentences = [*some_sentences(special=True), *some_sentences(), sentence(special=True)]
    batch = texts(sentences)
    map = some_map(batch)
    map[0] = 0.0  # ties
    map[5, 2] = torch.nan
    found = metric_contract(Eraser(words=removal), lambda rows: classifier(lstm(), rows), batch, map)
    for name, value in found.items():
        assert value[[5, 10]].isnan().all(), name  # a broken map, a text without words
        assert value[[0, 1, 2, 3, 4, 6, 7, 8, 9]].isfinite().all(), name


def test_numbers_of_words():
    counts = Eraser().counts(torch.tensor([1, 2, 19, 20, 30, 100, 101]))
    assert counts.tolist() == [
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
        [1, 1, 2, 4, 10],
        [1, 1, 2, 4, 10],
        [1, 2, 3, 6, 15],
        [1, 5, 10, 20, 50],
        [2, 6, 11, 21, 51],
    ]
    assert Eraser(bins=(0.07, 1.0)).counts(torch.tensor([100])).tolist() == [[7, 100]]


def test_true_importance_is_optimal_on_a_bag_of_words():
    net = bag_of_words()
    batch = texts(some_sentences(special=True))
    token = (net.embedding.weight @ net.fc.weight.T).detach()
    contribution = token[batch.x].gather(2, batch.target[:, None, None].expand(-1, batch.x.shape[1], 1)).squeeze(2)
    contribution = contribution.masked_fill(~batch.mask, 0.0)
    metric = Eraser(output="logit")
    maps = (contribution, some_map(batch), -contribution)
    oracle, other, worst = (score(metric, batch, m, classifier(net)) for m in maps)
    for better, lesser in ((oracle, other), (other, worst)):
        assert (better["comprehensiveness"] >= lesser["comprehensiveness"] - 1e-12).all()
        assert (better["sufficiency"] <= lesser["sufficiency"] + 1e-12).all()
    several = [0, 2, 3]  # of one or two words there is little to order
    assert (oracle["comprehensiveness"] > worst["comprehensiveness"])[several].all()
    assert (oracle["sufficiency"] < worst["sufficiency"])[several].all()


def test_a_text_of_one_word():
    """All of it is taken, and all of it is kept."""
    net, text = bag_of_words(), sentence(7, special=True)
    found = score(Eraser(), texts([text]), torch.ones(1, 3), classifier(net))
    drop = score_of(net, text, 0, [], "delete") - score_of(net, text, 0, [0], "delete")
    assert found["comprehensiveness"].item() == pytest.approx(drop)
    assert found["sufficiency"].item() == 0.0


def test_bins_of_as_many_words_share_their_texts():
    model = classifier(bag_of_words())
    score(Eraser(), texts([sentence(*range(4, 9))]), torch.arange(5.0)[None], model)
    assert model.passed == 1 + 2 * 2  # of 5 words: 1, 1, 1, 1, 3


def test_several_labels():
    net = bag_of_words(classes=3)
    batch = texts(some_sentences()[:2], torch.tensor([[1, 0, 1], [0, 0, 0]]))
    found = score(Eraser(bins=(1.0,)), batch, some_map(batch), classifier(net))
    empty = net(torch.tensor([[1]]))[0]
    drop = (net(batch.x[:1])[0].sigmoid() - empty.sigmoid())[[0, 2]].mean().item()
    assert found["comprehensiveness"][0].item() == pytest.approx(drop)
    assert all(value[1].isnan() for value in found.values())  # no label


def test_errors():
    for wrong in ({"bins": ()}, {"bins": (0.0,)}, {"bins": (0.1, 1.5)}, {"words": "blur"}, {"output": "loss"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Eraser(**wrong)
    batch = texts(some_sentences())
    with pytest.raises(ValueError, match="does not fit texts"):
        score(Eraser(), batch, some_map(batch)[1:])
    images = Batch(("a",), torch.zeros(1, 3, 4, 4), torch.zeros(1).long())
    with pytest.raises(ValueError, match="needs a batch of texts"):
        score(Eraser(), images, torch.zeros(1, 4, 4))
    assert Eraser.MODALITIES == ("text",)
    assert Eraser().roles == ()
    assert Eraser(words="zero").roles == ("embedding",)
