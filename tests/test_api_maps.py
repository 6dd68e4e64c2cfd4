"""Maps of other programs, and an Explanation whose net is another by now: what is scored is what was handed over."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import attrib
from attrib.models import Classifier

METRIC = "insertion_deletion"
X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
ORDER = torch.arange(64).view(1, 8, 8).expand(2, 8, 8)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()


def values(maps, **more) -> list[float]:
    scored = attrib.evaluate(net(), X, maps, METRIC, target=1, **more)
    assert set(scored["state"]) == {"ok"}
    return scored["value"].tolist()


# Maps of one order, which float32 cannot tell apart, all or most of them.
LOST = pytest.mark.parametrize(
    "maps",
    [
        ORDER.double() * 1e-9 + 1,
        (ORDER.double() + 1) * 1e-50,
        ORDER.double() * 1e37 * 1e3,
        ORDER + 2**30,
        ORDER.int() + 2**30,
        (ORDER + 2**30).numpy().astype(np.uint32),
        ORDER.where(ORDER < 60, ORDER * 2.0**40).double() + 1e10,
    ],
    ids=["offset", "tiny", "huge", "int64", "int32", "uint32", "most"],
)


@LOST
def test_what_float32_cannot_tell_apart_is_refused(maps):
    for given in (maps, {"mine": maps}, list(maps)):
        with pytest.raises(attrib.UserError, match=r"^maps: (map|mine) of \w+ is .*lost in float32.*run=\{'dtype'"):
            values(given)


@LOST
def test_in_float64_it_is_scored(maps):
    assert values(maps, run={"dtype": "float64"}) == values(ORDER, run={"dtype": "float64"})


def test_whole_numbers_that_float64_cannot_tell_apart():
    with pytest.raises(attrib.UserError, match="lost in float64"):
        values(ORDER + 2**60, run={"dtype": "float64"})


@pytest.mark.parametrize(
    "maps",
    [
        torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(2)).double(),
        torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64),
        ORDER,
        ORDER > 30,
        ORDER.byte(),
        ORDER.half(),
        torch.zeros(2, 8, 8, dtype=torch.float64),
        (ORDER // 8).double() / 3 * (1 + 1e-16 * torch.randn(8, 8, dtype=torch.float64)),  # ties up to rounding
    ],
)
def test_what_float32_tells_apart_is_scored_as_it_is(maps):
    assert values(maps) == values(maps.float())


def test_many_random_numbers_may_have_equal_ones():
    big = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 3))
    maps = torch.rand(1, 512, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert len(maps.float().unique()) < maps.numel()
    scored = attrib.evaluate(big, torch.rand(1, 3, 512, 512), maps, "insertion_deletion", target=1)
    assert set(scored["state"]) == {"ok"}


# ---- a net that is another by now -----------------------------------------------------------------------


def scaled(model):
    with torch.no_grad():
        model[0].weight.mul_(-3)


def a_little(model):
    with torch.no_grad():
        model[4].bias[1] += 1e-6


def statistics(model):
    model[1].running_mean += 1


def loaded(model):
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})


def longer(model):
    model.append(nn.Linear(3, 3))


@pytest.mark.parametrize("change", [scaled, a_little, statistics, loaded, longer])
def test_a_net_that_was_changed_is_not_the_one_that_was_explained(change):
    model = net()
    found = attrib.explain(model, X, 1, "gradient")
    old = found.evaluate(METRIC)
    pd.testing.assert_frame_equal(attrib.evaluate(model, X, found, METRIC), old)
    change(model)
    with pytest.raises(attrib.UserError, match="net was changed since it was explained: its weights"):
        attrib.evaluate(model, X, found, METRIC)
    pd.testing.assert_frame_equal(attrib.evaluate(None, X, found, METRIC), old)
    assert not attrib.evaluate(model, X, found.map, METRIC, target=1)["value"].equals(old["value"])


def test_a_net_that_was_not_changed_is_the_one():
    for given in (net(), nn.DataParallel(net()), Classifier(net()), net().double()):
        found = attrib.explain(given, X, 1, "gradient")
        pd.testing.assert_frame_equal(attrib.evaluate(given, X, found, METRIC), found.evaluate(METRIC))
        if isinstance(given, nn.Module):
            given.train(), given.requires_grad_(False), given.eval()
            pd.testing.assert_frame_equal(attrib.evaluate(given, X, found, METRIC), found.evaluate(METRIC))


def test_maps_in_bfloat16_are_what_they_are():
    maps = torch.rand(2, 8, 8).bfloat16()
    assert values(maps) == values(maps.float()) == values([m.numpy() for m in maps.float()])
