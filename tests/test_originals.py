"""What the net says of the inputs as they are is asked for once, and shared by the metrics of a cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from contracts import seeded
from test_method_contract import Net, pictures
from text_nets import text_net, texts
from torch import Tensor, nn

import attrib
from attrib.api.computing import Handed
from attrib.datasets.memory import Tensors
from attrib.experiment.cell import Experiment
from attrib.experiment.originals import Originals, contents_of
from attrib.metrics import IROF, Degradation, Eraser, Infidelity, InsertionDeletion, Metric, SensitivityN
from attrib.metrics.perturb import whole
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch

METRICS: dict[str, Metric] = {
    "insertion_deletion": InsertionDeletion(steps=4),
    "as_released": InsertionDeletion(steps=4, as_released=True),
    "half": InsertionDeletion(steps=4, fraction=0.5),
    "many": InsertionDeletion(steps=None, step=50, kernel=3),
    "sensitivity_n": SensitivityN(samples=3, points=2),
    "degradation": Degradation(tile=(4, 4)),
    "ends": Degradation(tile=(4, 4), normalize="ends"),
    "infidelity": Infidelity(samples=3, perturbation="noise"),
    "squares": Infidelity(samples=30),
    "irof": IROF(segments=9),
}
OF_TEXTS: dict[str, Metric] = {
    f"{name} {words}": made(words)
    for words in ("zero", "mask", "delete")
    for name, made in {
        "insertion_deletion": lambda words: InsertionDeletion(steps=4, words=words),
        "eraser": lambda words: Eraser(words=words),
        "all words": lambda words: Eraser(words=words, bins=(1.0,)),
        "sensitivity_n": lambda words: SensitivityN(samples=3, points=2, words=words),
        "infidelity": lambda words: Infidelity(samples=30, words=words),
    }.items()
}


class Counting(nn.Module):
    """How many rows were one of ``inputs``."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.net, self.inputs, self.seen = seeded(Net()), inputs, 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += sum(any(torch.equal(row, other) for other in self.inputs.to(x)) for row in x)
        return self.net(x)


@pytest.fixture
def passed(monkeypatch):
    """How many inputs went through the net as they are, while these metrics were computed."""
    batch = pictures(5)
    batch = dataclasses.replace(batch, x=batch.x.float())

    def count(names: list[str]) -> int:
        models: list[Classifier] = []
        begin = Classifier.__init__

        def made(self: Classifier, *args: object, **more: object) -> None:
            begin(self, *args, **more)
            models.append(self)

        with monkeypatch.context() as patch:
            patch.setattr(Classifier, "__init__", made)
            attrib.evaluate(
                Counting(batch.x), batch.x, batch.x.sum(1).sin(), {name: METRICS[name] for name in names},
                target=batch.target, run={"batch": 2},
            )  # fmt: skip
        (model,) = models
        return model.module.seen

    return count


def test_metrics_of_a_cell_ask_for_them_once(passed):
    nothing = passed(["infidelity"]) - 5
    for name in METRICS:
        assert passed([name]) - nothing == 5, name
    assert passed(["insertion_deletion", "sensitivity_n", "ends", "infidelity", "irof", "squares"]) - nothing == 5


def _scored(metric: Metric, model: Classifier, batch: Batch, map: Tensor) -> dict[str, Tensor]:
    known = dataclasses.replace(batch, logits=model.logits(batch.x))
    one, other = (metric.score(model, each, map, Noise(batch.uids, 3, dtype=torch.float64)) for each in (batch, known))
    for column, values in one.items():
        torch.testing.assert_close(other[column], values, rtol=1e-12, atol=1e-12, equal_nan=True)
    return dict(one)


@pytest.mark.parametrize("name", METRICS)
def test_scores_do_not_depend_on_who_asked(name):
    batch = pictures(4).to("cpu", torch.float64)
    assert METRICS[name].NEEDS_LOGITS
    _scored(METRICS[name], Classifier(seeded(Net()), dtype=torch.float64), batch, batch.x.sum(1).sin())


@pytest.mark.parametrize("name", OF_TEXTS)
def test_nor_do_those_of_texts(name):
    batch = texts(5)
    map = batch.x.double().sin()
    map[1] = torch.nan  # a text without a score
    model = Classifier(text_net("lstm"), {"embedding": "embedding"}, dtype=torch.float64)
    assert "text" in OF_TEXTS[name].NEEDS_LOGITS
    found = _scored(OF_TEXTS[name], model, batch, map)
    assert all(values[1].isnan().all() and values[[0, 2, 3]].isfinite().all() for values in found.values())


def test_a_text_with_all_of_its_words_is_not_asked_for_again():
    batch = texts(4)
    model = Classifier(text_net("mean"), {"embedding": "embedding"}, dtype=torch.float64)
    known = dataclasses.replace(batch, logits=model.logits(batch.x))
    for metric in (Eraser(bins=(1.0,)), InsertionDeletion(steps=4, words="delete")):
        rows = []
        for each in (batch, known):
            before = model.passed
            metric.score(model, each, batch.x.double().sin(), Noise(batch.uids, 3, dtype=torch.float64))
            rows.append(model.passed - before)
        assert rows[0] - rows[1] == len(batch), metric


def test_the_input_is_a_point_of_both_curves():
    batch = pictures(4).to("cpu", torch.float64)
    model = Classifier(seeded(Net()), dtype=torch.float64)
    own = model.logits(batch.x).softmax(1).gather(1, batch.target[:, None])[:, 0]
    found = METRICS["insertion_deletion"].score(model, batch, batch.x.sum(1), Noise(batch.uids))
    torch.testing.assert_close(found["deletion_curve"][:, 0], own)
    torch.testing.assert_close(found["insertion_curve"][:, -1], own)


# ---- what is kept ----------------------------------------------------------------------------------------


@pytest.fixture
def model() -> Classifier:
    return Classifier(seeded(Net()), dtype=torch.float64)


def rows_of(originals: Originals, model: Classifier, batch: Batch, names: Sequence[str]) -> list[int]:
    """How many rows went through the net while these metrics asked one after another."""
    expected, found = model.logits(batch.x), []
    for name in names:
        before = model.passed
        told = originals.told(name, model, batch).logits
        torch.testing.assert_close(told, expected)
        found.append(model.passed - before)
    return found


def test_without_room_they_are_asked_for_again(model):
    batch = pictures(4).to("cpu", torch.float64)
    kept = Originals(["a", "b", "c", "d"], 1, room=2 * 5 * 8)  # two rows of five classes
    assert rows_of(kept, model, batch, ["a", "b"]) == [4, 2]
    assert rows_of(kept, model, batch[[3, 0]], ["c"]) == [1]
    torch.testing.assert_close(whole(model, batch), model.logits(batch.x))


def test_nothing_is_kept_that_nobody_asks_for_again(model):
    batch = pictures(4).to("cpu", torch.float64)
    alone, of_three, of_two_maps = Originals(["a"], 1), Originals(["a", "b", "c"], 1), Originals(["a"], 2)
    assert alone.told("a", model, batch) is batch  # it asks itself
    assert of_three.told("other", model, batch) is batch
    assert rows_of(of_three, model, batch, ["a", "b"]) == [4, 0]
    assert len(of_three._rows) == 4
    room = of_three._left
    assert rows_of(of_three, model, batch, ["c"]) == [0]
    assert of_three._left > room
    assert rows_of(of_two_maps, model, batch, ["a", "a"]) == [4, 0]
    # Scores of the first two are there already: the last one finds nothing, and leaves nothing.
    assert rows_of(of_three, model, batch, ["c"]) == [4]
    assert not of_three._rows
    assert not of_two_maps._rows


def test_another_content_has_logits_of_its_own(model):
    batch = pictures(4).to("cpu", torch.float64)
    kept = Originals(["a", "b", "c"], 1)
    assert rows_of(kept, model, batch, ["a"]) == [4]
    changed = batch.x.clone()
    changed[2] = changed[2].flip(-1)  # the same numbers elsewhere
    other = dataclasses.replace(batch, x=changed)
    assert rows_of(kept, model, other, ["b"]) == [1]
    assert rows_of(kept, model, other, ["c"]) == [0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_contents_differ_in_each_bit(dtype):
    x = torch.arange(24, dtype=torch.float64).view(2, 3, 4).to(dtype)
    mine, yours = contents_of(_batch(x))
    assert [mine, yours] == contents_of(_batch(x.transpose(1, 2).contiguous().transpose(1, 2)))
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    for place in range(12):
        for bit in range(8 * x.element_size()):
            other = x.clone()
            other.view(width)[0].view(-1)[place] ^= -(2**bit) if bit == 8 * x.element_size() - 1 else 2**bit
            first, second = contents_of(_batch(other))
            assert first != mine
            assert second == yours


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_contents_differ_in_signs_and_order(dtype):
    x = 1 + torch.arange(24, dtype=torch.float64).view(1, 2, 3, 4).to(dtype)
    others = [
        x,
        -x,
        x.flip(-1),
        -x.flip(-1),
        x.flip(-2),
        2 * x,
        x + 1,
        x / 2,
        x.roll(1, -1),
        x.flip(1),
        x[..., [1, 0, 2, 3]],
    ]
    pair = x.clone()
    pair[0, 0, 0, :2] *= -1
    assert len({contents_of(_batch(other))[0] for other in [*others, pair]}) == len(others) + 1


def _batch(x: Tensor) -> Batch:
    return Batch(tuple("ab"[: len(x)]), x, torch.zeros(len(x)))


def test_padding_is_no_content():
    batch = texts(4)
    assert contents_of(batch) == contents_of(batch.cut(int(batch.lengths.max())))
    longer = dataclasses.replace(batch, lengths=batch.lengths + 1)  # by one token, whose id may be 0
    assert not set(contents_of(longer)) & set(contents_of(batch))


def test_a_file_that_changes_between_two_metrics(model):
    """The second metric says of what it reads then what it says alone."""
    batch = pictures(4).to("cpu", torch.float64)
    maps, changed = batch.x.sum(1).sin(), dataclasses.replace(batch, x=batch.x.flip(-1))
    dataset = Tensors(batch.uids, lambda uid: batch[[batch.uids.index(uid)]], "image")

    def cell(*names: str) -> Experiment:
        metrics = {name: METRICS[name] for name in names}
        return Experiment({"dataset": "d", "method": "m"}, dataset, model, Handed(("map",)), metrics)

    both = cell("degradation", "insertion_deletion")
    both.score("degradation", batch, maps)
    alone = cell("insertion_deletion").score("insertion_deletion", changed, maps)
    for column, values in both.score("insertion_deletion", changed, maps).items():
        torch.testing.assert_close(values, alone[column], rtol=1e-12, atol=1e-12)
