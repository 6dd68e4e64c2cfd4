"""What the net says of the inputs as they are is asked for once, and shared by the metrics of a cell."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from contracts import seeded
from test_method_contract import Net, pictures
from torch import Tensor, nn

import attrib
from attrib.experiment.originals import Originals
from attrib.metrics import Degradation, Infidelity, InsertionDeletion, SensitivityN
from attrib.metrics.perturb import whole
from attrib.models import Classifier
from attrib.noise import Noise

METRICS = {
    "insertion_deletion": InsertionDeletion(steps=4),
    "as_released": InsertionDeletion(steps=4, as_released=True),
    "half": InsertionDeletion(steps=4, fraction=0.5),
    "many": InsertionDeletion(steps=None, step=50, kernel=3),
    "sensitivity_n": SensitivityN(samples=3, points=2),
    "degradation": Degradation(tile=(4, 4)),
    "ends": Degradation(tile=(4, 4), normalize="ends"),
    "infidelity": Infidelity(samples=3, perturbation="noise"),
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
                Counting(batch.x), batch.x, batch.x.sum(1).sin(), [METRICS[name] for name in names],
                target=batch.target, run={"batch": 2},
            )  # fmt: skip
        (model,) = models
        return model.module.seen

    return count


def test_metrics_of_a_cell_ask_for_them_once(passed):
    nothing = passed(["infidelity"]) - 5
    for name in METRICS:
        assert passed([name]) - nothing == 5, name
    assert passed(["insertion_deletion", "sensitivity_n", "ends", "infidelity"]) - nothing == 5


@pytest.mark.parametrize("name", METRICS)
def test_scores_do_not_depend_on_who_asked(name):
    batch = pictures(4).to("cpu", torch.float64)
    model, metric, map = Classifier(seeded(Net()), dtype=torch.float64), METRICS[name], batch.x.sum(1).sin()
    known = dataclasses.replace(batch, logits=model.logits(batch.x))
    assert metric.NEEDS_LOGITS
    one, other = (metric.score(model, each, map, Noise(batch.uids, 3, dtype=torch.float64)) for each in (batch, known))
    for column, values in one.items():
        torch.testing.assert_close(other[column], values, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_the_input_is_a_point_of_both_curves():
    batch = pictures(4).to("cpu", torch.float64)
    model = Classifier(seeded(Net()), dtype=torch.float64)
    own = model.logits(batch.x).softmax(1).gather(1, batch.target[:, None])[:, 0]
    found = METRICS["insertion_deletion"].score(model, batch, batch.x.sum(1), Noise(batch.uids))
    torch.testing.assert_close(found["deletion_curve"][:, 0], own)
    torch.testing.assert_close(found["insertion_curve"][:, -1], own)


def test_without_room_they_are_asked_for_again():
    batch = pictures(4).to("cpu", torch.float64)
    model = Classifier(seeded(Net()), dtype=torch.float64)
    expected, row = model.logits(batch.x), 5 * 8
    kept = Originals(room=2 * row)
    for again in (0, 2, 2):
        before = model.passed
        torch.testing.assert_close(kept.of(model, batch), expected)
        assert model.passed - before == 4 - again
    torch.testing.assert_close(kept.of(model, batch[[3, 0]]), expected[[3, 0]])
    torch.testing.assert_close(whole(model, batch), expected)
