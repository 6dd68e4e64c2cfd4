"""The table of nets: a few of its cells, and that it tells what works from what does not."""

from __future__ import annotations

import dataclasses
import re

import net_checks
import pytest
import torch
from net_checks import METHODS, Case, cheap, verdict
from net_table import document, footnotes, groups
from net_zoo import ZOO, Entry
from torch import Tensor, nn

from attrib.methods.baselines import Gradient
from attrib.methods.lrp import LRP
from attrib.types import SampleError, UserError

CELLS = {
    "vit with registers": {"grad_cam": "works", "iba": "works", "gradient": "works"},
    "ConvNeXt V2": {"grad_cam": "works", "iba": "works", "rise": "works"},
    "one logit": {"grad_cam": "works", "iba_readout": "works", "iba": "works", "deep_lift_shap": "works"},
    "LSTM": {"iba": "works", "gradient": "works", "grad_cam": "other"},
    "FNet": {"gradient": "refused", "iba": "works"},
    "Llama": {"smooth_grad": "works", "iba": "works"},
    "ToneCNN": {"iba": "works", "grad_cam": "other", "acd_text": "other"},
}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.quick(but=["vit with registers", "LSTM", "Llama"])
def test_a_few_cells(name):
    case = Case(next(entry for entry in ZOO if entry.name == name))
    found = {method: verdict(case, method) for method in CELLS[name]}
    assert {method: cell["outcome"] for method, cell in found.items()} == CELLS[name], found


def test_the_nets_are_different_ones():
    assert len(ZOO) >= 40
    assert len({(entry.library, entry.name) for entry in ZOO}) == len(ZOO)


class OfTheBatch(Gradient):
    def attribute(self, model, batch, state, noise):
        found = super().attribute(model, batch, state, noise)["map"]
        return {"map": found / found.abs().max()}


class Flat(Gradient):
    def attribute(self, model, batch, state, noise):
        return {"map": torch.zeros_like(batch.x[:, 0])}


class Small(Gradient):
    def attribute(self, model, batch, state, noise):
        return {"map": super().attribute(model, batch, state, noise)["map"][:, ::2]}


class Refuses(Gradient):
    def attribute(self, model, batch, state, noise):
        raise UserError("the layer conv1 of 3 | is odd. Take another")


class Broken(Gradient):
    def attribute(self, model, batch, state, noise):
        raise ValueError("no luck")


class Lost(LRP):
    def attribute(self, model, batch, state, noise):
        raise SampleError("a: LRP did not conserve the relevance")


class Incomplete(LRP):
    def attribute(self, model, batch, state, noise):
        found = super().attribute(model, batch, state, noise)
        return {**found, "map": found["map"] / 2}


OUTCOMES = {
    Gradient: ("works", ""),
    OfTheBatch: ("wrong", "AssertionError: map of sample . alone differs"),
    Flat: ("zero", ""),
    Small: ("wrong", "map is \\(2, 32, 64\\)"),
    Refuses: ("refused", "the layer conv1"),
    Broken: ("wrong", "ValueError: no luck"),
    Lost: ("wrong", "relevance is lost"),
    Incomplete: ("wrong", "bias_relevance is"),
}


@pytest.mark.parametrize("kind", OUTCOMES, ids=lambda kind: kind.__name__)
def test_what_is_wrong_is_seen(kind, monkeypatch):
    case = Case(next(entry for entry in ZOO if entry.name == "one logit"))
    monkeypatch.setattr(net_checks, "build", lambda node, where: kind())
    found = verdict(case, "gradient")
    outcome, text = OUTCOMES[kind]
    assert found["outcome"] == outcome
    assert re.search(text, found["text"])


def test_methods_are_made_cheap_and_keep_their_other_values():
    node = {"steps": 100, "draws": 1, "lr": 1.0, "correct": True, "feature": {"steps": None, "batch": 10}}
    assert cheap(node) == {"steps": 2, "draws": 1, "lr": 1.0, "correct": False, "feature": {"steps": None, "batch": 2}}
    assert cheap({"search": {"z": 1.65, "layers": None}}) == {"search": {"z": 1.65, "layers": 12, "candidates": 1}}


def entry(name: str, **fields) -> Entry:
    return dataclasses.replace(ZOO[0], name=name, **fields)


def test_the_document():
    good, other = {"outcome": "works", "text": ""}, {"outcome": "other", "text": ""}
    bad = [{"outcome": "refused", "text": f"layer conv{i} of Net is | odd. Take another"} for i in (1, 22)]
    rows = {
        entry("a", about="small"): {"x": good, "y": good, "z": bad[0]},
        entry("b"): {"x": bad[1], "y": bad[1], "z": {"outcome": "wrong", "text": "ValueError: no"}},
        entry("c", shape=(7,)): {"x": good, "y": other, "z": other},
    }
    assert footnotes(rows) == {"layer # of Net is | odd": "1", "ValueError: no": "2"}
    text = document(rows, ["x", "y", "z"])
    assert "3 pairs work, 0 give nothing, 3 are refused, 1 are wrong" in text
    assert "| A | x, y |\n| B | z |" in text
    assert "| a (small) | ✓ | – 1 |\n| b (small head) | – 1 | **wrong** 2 |" in text
    assert "## Texts\n\n| column | methods |\n|---|---|\n| A | x |" in text
    assert "1. layer # of Net is \\| odd\n2. ValueError: no" in text
    shown = {"p": {"x": "a", "y": "b", "z": "a"}}
    assert groups(shown, ["x", "y", "z"]) == [["x", "z"], ["y"]]


def test_every_preset_has_a_column():
    assert {"iba", "grad_cam", "gradient"} <= set(METHODS)


def test_zero_heads_and_statistics_are_filled():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)
            nn.init.zeros_(self.head.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.conv(x)).mean((2, 3)))

    net = entry("zero", build=Net).net()
    assert net.head.weight.any()
    assert not net.training
    assert not net.norm.training
    x = torch.randn(64, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            net.norm(net.conv(x)).std((0, 2, 3)), torch.ones(4, dtype=torch.float64), rtol=0.1, atol=0
        )
