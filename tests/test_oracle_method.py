"""The method that is the answer: what its maps are, and what it refuses. Its contract is that of every method."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_method_contract import classifier, pictures

from attrib.methods.oracle import Oracle
from attrib.noise import Noise
from attrib.types import UserError


def test_it_is_the_region_with_noise_in_some_places():
    batch, model = pictures(3), classifier(())(8, torch.float64)
    noise = Noise(batch.uids, 4, dtype=torch.float64)

    def map_of(method):
        return method.attribute(model, batch, {}, Noise(batch.uids, 4, dtype=torch.float64))["map"]

    places = batch.roi.shape[1:]
    roi, uniform, chance = batch.roi.double(), noise.uniform(*places), noise.uniform(*places)
    assert torch.equal(map_of(Oracle()), roi)
    assert torch.equal(map_of(Oracle(opposite=True)), 1 - roi)
    assert torch.equal(map_of(Oracle(noise=1.0)), uniform)
    assert torch.equal(map_of(Oracle(noise=0.3)), torch.where(chance < 0.3, uniform, roi))


def test_more_noise_is_a_worse_map():
    batch, model = pictures(20), classifier(())(8, torch.float64)
    right = []
    for level in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        found = Oracle(noise=level).attribute(model, batch, {}, Noise(batch.uids, 0, dtype=torch.float64))["map"]
        inside, outside = found[batch.roi], found[~batch.roi]
        right.append(float((inside[:, None] > outside).double().mean()))  # what metrics read is the order
    assert right == sorted(right, reverse=True)
    assert right[0] == 1.0
    assert right[1] < 0.99
    assert right[-1] == pytest.approx(0.5, abs=0.02)


def test_data_without_regions_are_refused():
    batch = dataclasses.replace(pictures(2), roi=None)
    with pytest.raises(UserError, match="these data have none"):
        Oracle().attribute(classifier(())(8, torch.float64), batch, {}, Noise(batch.uids))
    with pytest.raises(UserError, match=r"Oracle\.noise is 1\.5, must be"):
        Oracle(noise=1.5)
