"""Metrics on sounds: the numbers of images of one row, windows, and an honest order of good and bad maps."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from audio_nets import K, L, RowNet, as_rows, audio_classifier, sounds
from contracts import metric_contract
from torch import Tensor, nn

from attrib import keys
from attrib.metrics import EHR, InsertionDeletion
from attrib.metrics.perturb import baseline, tiles, untiled
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError

ZERO = {"insertion_baseline": "zero", "deletion_baseline": "zero"}
MEAN = {"insertion_baseline": "mean", "deletion_baseline": "mean"}
METRICS = [
    EHR(), EHR(weight_by_heat=False), InsertionDeletion(steps=7), InsertionDeletion(steps=4, window=5, **ZERO),
    InsertionDeletion(steps=None, step=2, window=3, fraction=0.5, **MEAN), InsertionDeletion(as_released=True, **ZERO),
]  # fmt: skip


def maps(batch: Batch, seed: int = 5) -> Tensor:
    return torch.tensor(np.random.RandomState(seed).randn(len(batch), batch.x.shape[-1]))


@pytest.mark.parametrize("metric", METRICS, ids=repr)
def test_contract(metric):
    batch = sounds(4)
    found = maps(batch)
    found[1, 3:9] = found[1, 3]  # ties
    metric_contract(metric, audio_classifier(), batch, found)


@pytest.mark.parametrize("metric", [*METRICS[:2], METRICS[-1], InsertionDeletion(steps=7, **MEAN)], ids=repr)
def test_the_same_as_on_images_of_one_row(metric):
    batch = sounds(4)
    found = metric.score(audio_classifier()(), batch, maps(batch), Noise(batch.uids, 3))
    rows = metric.score(audio_classifier(net=RowNet)(), as_rows(batch), maps(batch).unsqueeze(1), Noise(batch.uids, 3))
    for name in found:
        torch.testing.assert_close(found[name], rows[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [(24,), (8, 6)])
def test_windows_by_hand(size):
    """Units in the order of their mean, all of a unit at once; the far edge has smaller ones."""
    side, batch = 5, sounds(3)
    x = batch.x if len(size) == 1 else batch.x.reshape(3, 1, *size)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, K)).double()
    for i, p in enumerate(net.parameters()):
        p.data = torch.arange(p.numel()).add(3.0 * i).sin().view_as(p).double()
    model, batch = Classifier(net, dtype=torch.float64), dataclasses.replace(batch, x=x, roi=None)
    map = torch.tensor(np.random.RandomState(1).randn(3, *size))
    metric = InsertionDeletion(steps=None, step=1, window=side, output="logit", **ZERO)
    found = metric.score(model, batch, map, Noise(batch.uids))
    units = [tuple(slice(a, a + side) for a in at) for at in np.ndindex(*size) if all(a % side == 0 for a in at)]
    for i in range(3):
        order = sorted(units, key=lambda unit: -map[i][unit].mean().item())
        gone, curve = x[i].clone(), [model.logits(x[i : i + 1])[0, batch.target[i]]]
        for unit in order:
            gone[(slice(None), *unit)] = 0
            curve.append(model.logits(gone[None])[0, batch.target[i]])
        torch.testing.assert_close(found["deletion_curve"][i], torch.stack(curve))
        torch.testing.assert_close(found["insertion_curve"][i, [0, -1]], torch.stack([curve[-1], curve[0]]))


@pytest.mark.parametrize(("size", "side"), [((24,), 1), ((24,), 5), ((24,), 40), ((7, 9), 4), ((7, 9), 20)])
def test_tiles_and_back(size, side):
    values = torch.tensor(np.random.RandomState(0).randn(2, *size))
    means = tiles(values, side)
    assert means.shape == (2, *(-(-n // side) for n in size))
    back = untiled(means, side, size)
    assert back.shape == values.shape
    torch.testing.assert_close(tiles(back, side), means)
    torch.testing.assert_close(back.flatten(1).mean(1), values.flatten(1).mean(1))  # every place counts once


@pytest.mark.parametrize(("size", "side"), [((400,), 7), ((13, 19), 4)])
def test_no_tile_of_a_constant_map_is_first(size, side):
    """Tiles at the far edges have fewer places, and the mean of some 0.1 in float32 depends on their number.

    So all orders are equally good, and an order that does not depend on the value 0.1 is a random one.
    """
    x = torch.arange(3.0 * math.prod(size)).sin().view(3, 1, *size)
    batch = dataclasses.replace(sounds(3), x=x, roi=None)
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(size), K))
    metric = InsertionDeletion(steps=None, step=1, window=side, output="logit", **ZERO)
    curves = [
        metric.score(Classifier(net), batch, torch.full((3, *size), value), Noise(batch.uids))["deletion_curve"]
        for value in (0.0, 0.1, 1 / 3)
    ]
    assert curves[0].equal(curves[1])
    assert curves[0].equal(curves[2])
    assert (keys.spec(metric)["VERSION"], keys.spec(InsertionDeletion())["VERSION"]) == (2, 1)


def test_removed_samples():
    x = sounds(2).x
    assert baseline(x, "zero").abs().max() == 0
    torch.testing.assert_close(baseline(x, "mean")[:, :, 0], x.mean(2))
    t = torch.arange(400) / 8000
    low, high = (torch.sin(2 * torch.pi * f * t)[None, None] for f in (50, 1500))
    assert baseline(low, "blur").std() > 0.95 * low.std()  # a low-pass
    assert baseline(high, "blur").std() < 0.15 * high.std()
    widest = torch.cat([x] * 9, 2).view(2, 2, 9, L)  # nine equal rows: blurring across them changes nothing
    torch.testing.assert_close(baseline(x, "blur"), baseline(widest, "blur")[:, :, 4])


def test_the_region_beats_its_opposite():
    """A net that hears nothing but the region's samples."""

    class Hears(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            energy = x[:, 0, 4:10].square().sum(1)
            return torch.stack((energy, torch.ones_like(energy)), 1)

    roi = torch.zeros(2, L, dtype=torch.bool)
    roi[:, 4:10] = True
    batch = Batch(("a", "b"), sounds(2).x, torch.zeros(2, dtype=torch.long), roi)
    model = Classifier(Hears(), dtype=torch.float64)
    for metric, column in ((EHR(), "ehr"), (InsertionDeletion(**ZERO), "insertion_deletion")):
        good, bad = (metric.score(model, batch, m.double(), Noise(batch.uids))[column] for m in (roi, ~roi))
        assert (good > bad + 0.2).all()


def test_errors():
    batch = sounds(2)
    with pytest.raises(ValueError, match=r"expected \(B, H, W\) for \(B, C, H, W\), \(B, L\) for \(B, C, L\)"):
        InsertionDeletion().score(audio_classifier()(), batch, torch.zeros(2, 2, L), Noise(batch.uids))
    with pytest.raises(UserError, match="window is 0, must be at least 1"):
        InsertionDeletion(window=0)
