"""Texts without some of their words: the order of the words, three ways to take them out, blocks without waste."""

from __future__ import annotations

import pytest
import torch
from contracts import padded
from sentences import (
    CLS,
    MASK,
    PAD,
    SEP,
    BagOfWords,
    bag_of_words,
    classifier,
    lstm,
    score_of,
    sentence,
    some_map,
    some_sentences,
    texts,
    word_order,
)  # fmt: skip
from torch import Tensor, nn

from attrib.metrics.words import REMOVALS, order, score_without
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError


def noise(batch: Batch) -> Noise:
    return Noise(batch.uids, seed=1)


def in_order(rank: Tensor, text: list[tuple[int, int]]) -> list[int]:
    """The words of one text by their places; all tokens of a word must have the same."""
    places: dict[int, int] = {}
    for (_, word), place in zip(text, rank.tolist(), strict=False):
        if word < 0:
            assert place == -1
        else:
            assert places.setdefault(word, place) == place
    assert sorted(places.values()) == list(range(len(places)))
    return sorted(places, key=places.__getitem__)


@pytest.mark.parametrize("special", [False, True])
def test_words_are_ordered_by_the_sum_of_their_tokens(special):
    sentences = some_sentences(special)
    batch = texts(sentences)
    map = some_map(batch)
    found = order(batch, map, noise(batch))
    for i, text in enumerate(sentences):
        assert in_order(found.rank[i], text) == word_order(text, map[i])
        assert (found.rank[i, len(text) :] == -1).all()
    assert found.count.tolist() == [9, 1, 14, 5, 2]
    assert found.defined.all()


def test_ties_are_ordered_at_random_and_alike_alone_and_padded():
    sentences = [sentence(*range(4, 4 + n)) for n in (7, 3, 12)] * 100
    batch = texts(sentences)
    map = torch.zeros(batch.x.shape)
    found = order(batch, map, noise(batch))
    for i in (0, 1, 2, 150, 299):
        alone = texts(sentences[i : i + 1])
        alone = Batch((batch.uids[i],), alone.x, alone.target, lengths=alone.lengths, words=alone.words)
        single = order(alone, map[i : i + 1, : alone.x.shape[1]], noise(alone))
        assert torch.equal(single.rank[0], found.rank[i, : alone.x.shape[1]])
    more = order(*padded(batch, map, PAD), noise(batch))
    assert torch.equal(more.rank[:, : batch.x.shape[1]], found.rank)
    # The mean of 100 uniform ranks 0 .. 6 is 3 with a standard error of 0.2.
    assert (found.rank[::3, :7].double().mean(0) - 3).abs().max() < 5 * 0.2


def test_what_is_not_defined():
    batch = texts([sentence(5, 6), sentence(5, 6), sentence(special=True), sentence(5, special=True), sentence(5, 6)])
    map = torch.zeros(batch.x.shape)
    map[0, 1], map[1, 0], map[2, 0] = torch.nan, torch.inf, 0.0
    map[4, 2] = torch.nan  # padding
    found = order(batch, map, noise(batch))
    assert found.defined.tolist() == [False, False, False, True, True]
    assert found.count.tolist() == [2, 2, 0, 1, 2]
    map[3, 0] = torch.nan  # a special token: the map is broken all the same
    assert order(batch, map, noise(batch)).defined.tolist() == [False, False, False, False, True]


def test_errors():
    batch = texts([sentence(5, 6), sentence(7)])
    with pytest.raises(ValueError, match=r"\(2, 3\) does not fit texts of shape \(2, 2\)"):
        order(batch, torch.zeros(2, 3), noise(batch))
    with pytest.raises(ValueError, match="needs a batch of texts"):
        order(Batch(("a",), torch.zeros(1, 3, 4, 4), torch.zeros(1).long()), torch.zeros(1, 4, 4), Noise("a"))

    def score(removal: str, model: Classifier) -> Tensor:
        ordered = order(batch, some_map(batch), noise(batch))
        return score_without(model, batch, ordered, torch.tensor([[0], [0]]), torch.tensor([[1], [1]]), removal)

    class Nameless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = bag_of_words()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    with pytest.raises(UserError, match="Nameless has no mask_id"):
        score("mask", Classifier(Nameless()))
    with pytest.raises(UserError, match="Nameless has no pad_id"):
        score("delete", Classifier(Nameless()))
    two = bag_of_words()
    two.other = nn.Embedding(2, 2)  # which of the two is meant?
    with pytest.raises(UserError, match=r"set model\.layers\.embedding"):
        score("zero", Classifier(two))
    with pytest.raises(UserError, match=r"layers\.embedding: fc gives \(2, 2\).*one vector per token"):
        score("zero", classifier(bag_of_words(), embedding="fc"))


@pytest.mark.parametrize("removal", REMOVALS)
@pytest.mark.parametrize("make", [bag_of_words, lstm])
@pytest.mark.parametrize("special", [False, True])
def test_every_stretch_of_places_equals_the_sentence_written_out(removal, make, special):
    sentences, net = some_sentences(special), make()
    batch = texts(sentences)
    map = some_map(batch)
    ordered = order(batch, map, noise(batch))
    pairs = [(a, b) for a in (0, 1, 3, 14) for b in (0, 1, 2, 7, 14)]
    first, last = (torch.tensor(side).expand(len(batch), -1) for side in zip(*pairs, strict=True))
    last = last.minimum(ordered.count[:, None])
    found = score_without(classifier(net, rows=6), batch, ordered, first, last, removal)
    outputs = set()
    for i, text in enumerate(sentences):
        words = word_order(text, map[i])
        for j, (a, b) in enumerate(pairs):
            expected = score_of(net, text, int(batch.target[i]), words[a:b], removal)
            assert abs(found[i, j].item() - expected) < 1e-12, (i, a, b)
            outputs.add(round(expected, 9))
    assert len(outputs) > 20  # the nets do see the difference


class Recorder(BagOfWords):
    """Notes the rows that come in (on the class: a Classifier copies its module)."""

    seen: list[list[list[int]]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.tolist())
        return super().forward(x)


def recorded(removal: str, rows: int = 64) -> list[list[list[int]]]:
    """What goes through the net for a deletion and an insertion curve over two texts."""
    batch = texts([sentence(5, [6, 7], 8, special=True), sentence(*range(10, 18))])
    map = batch.words.double().neg().masked_fill(batch.words < 0, 0.0)  # the first word is the best
    map[0, 3] = 0.0  # word 1 stays second: -1 + 0
    ordered = order(batch, map, noise(batch))
    counts = torch.tensor([[0, 1, 2, 3, 3, 3, 3, 3, 3], list(range(9))])
    zeros, whole = torch.zeros_like(counts), ordered.count[:, None].expand_as(counts)
    Recorder.seen.clear()
    first, last = torch.cat((zeros, counts), 1), torch.cat((counts, whole), 1)
    found = score_without(Classifier(Recorder(), rows=rows), batch, ordered, first, last, removal)
    assert found.isfinite().all()
    return list(Recorder.seen)


@pytest.mark.parametrize("removal", ["mask", "delete"])
def test_no_text_is_scored_twice(removal):
    rows = [tuple(row) for block in recorded(removal) for row in block]
    # Text, nothing left, and twice all numbers of words between.
    assert len(rows) == (2 + 2 * 2) + (2 + 2 * 7)
    assert len(set(rows)) == len(rows)


def test_what_the_net_reads():
    seen = {tuple(t for t in row if t != PAD) for block in recorded("delete") for row in block}
    assert {(CLS, 5, 6, 7, 8, SEP), (CLS, 6, 7, 8, SEP), (CLS, 8, SEP), (CLS, SEP), (CLS, 5, 6, 7, SEP)} <= seen
    assert () in seen  # of a text without special tokens nothing is left
    seen = {tuple(t for t in row if t != PAD) for block in recorded("mask") for row in block}
    assert {(CLS, 5, 6, 7, 8, SEP), (CLS, 5, MASK, MASK, MASK, SEP), (CLS, *[MASK] * 4, SEP)} <= seen
    assert (MASK,) * 8 in seen


@pytest.mark.parametrize("removal", ["mask", "delete"])
def test_full_blocks_of_at_most_rows_without_needless_padding(removal):
    blocks = recorded(removal, rows=5)
    assert [len(block) for block in blocks] == [5, 5, 5, 5, 2]
    for block in blocks:
        assert any(row[-1] != PAD for row in block) or block == [[PAD]], block
    assert len(blocks[0][0]) == 8
    if removal == "delete":  # long texts first
        assert [len(block[0]) for block in blocks] == sorted((len(block[0]) for block in blocks), reverse=True)
        assert len(blocks[-1][0]) == 1


class Embedded(BagOfWords):
    """Notes how often the front runs, and on how many rows the rear."""

    seen: list[int] = []

    def __init__(self) -> None:
        super().__init__()
        self.counter = Counter()

    def forward(self, x: Tensor) -> Tensor:
        real = (x != self.pad_id)[:, :, None]
        return self.fc(self.counter(self.embedding(x) * real).sum(1))


class Counter(nn.Linear):
    def __init__(self) -> None:
        super().__init__(1, 1)

    def forward(self, z: Tensor) -> Tensor:
        Embedded.seen.append(len(z))
        return z


def test_zero_vectors_need_only_the_rear_of_the_net():
    batch = texts([sentence(*range(5, 11)), sentence(7, 8)])
    ordered = order(batch, some_map(batch), noise(batch))
    model = classifier(Embedded(), rows=4)
    counts = torch.arange(7).expand(2, -1).minimum(ordered.count[:, None])
    score_without(model, batch, ordered, torch.zeros_like(counts), counts, "zero")  # cuts the net
    Embedded.seen.clear()
    passed = model.passed
    score_without(model, batch, ordered, torch.zeros_like(counts), counts, "zero")
    assert Embedded.seen == [4, 4, 2]  # 7 + 3 texts
    assert model.passed - passed == 2 + 10


def test_samples_that_are_not_defined_cost_nothing():
    batch = texts([sentence(5, 6), sentence(special=True)])
    Recorder.seen.clear()
    ordered = order(batch, torch.full(batch.x.shape, torch.nan), noise(batch))
    first, last = torch.zeros(2, 3).long(), torch.ones(2, 3).long()
    assert score_without(Classifier(Recorder()), batch, ordered, first, last, "delete").isnan().all()
    assert not Recorder.seen
