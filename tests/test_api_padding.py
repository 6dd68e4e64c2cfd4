"""Ids of texts that are handed over with padding: it is no word, whatever they came in, and changes no number."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import attrib
from attrib.models import BiLSTM, Classifier
from attrib.types import Batch

IDS = torch.tensor([[5, 3, 9, 2]])
PADDED = torch.tensor([[5, 3, 9, 2, 0, 0, 0]])
MAP = torch.tensor([[0.5, -0.2, 0.9, 0.1]])
TWO = [torch.tensor([5, 3, 9, 2]), torch.tensor([7, 4])]  # a list of texts of two lengths


class Mean(nn.Module):
    """The mean over what is not padding."""

    def __init__(self, pad_id: int | None = 0) -> None:
        super().__init__()
        self.mask_id = 1
        if pad_id is not None:
            self.pad_id = pad_id
        self.emb, self.hidden, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def real(self, x):
        return (x != 0)[..., None]

    def forward(self, x):
        real = self.real(x)
        return self.out((torch.tanh(self.hidden(self.emb(x))) * real).sum(1) / real.sum(1).clamp(min=1))


class Sees(Mean):
    """Its mean is over padding too."""

    def real(self, x):
        return torch.ones_like(x, dtype=torch.bool)[..., None]


def mean() -> nn.Module:
    torch.manual_seed(3)
    return Mean().eval()


def sees() -> nn.Module:
    torch.manual_seed(3)
    return Sees().eval()


def lstm() -> nn.Module:
    torch.manual_seed(3)
    return BiLSTM(20, 8, 6, num_classes=3, pad_id=0, mask_id=1).eval()


NETS = pytest.mark.parametrize("net", [mean, lstm, sees])


@NETS
@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("gradient", {}),
        ("lime", {"samples": 30}),
        ("kernel_shap", {"samples": 20}),
        ("occlusion", {}),
        ("smooth_grad", {"samples": 3}),
        ("random", {}),
        ("cd", {}),
    ],
)
def test_padding_has_no_share(net, method, fields):
    plain, padded = (attrib.explain(net(), x, 1, method, **fields) for x in (IDS, PADDED))
    assert padded.uids == plain.uids  # and so the same random numbers
    assert padded.map.shape == PADDED.shape
    assert not padded.map[:, 4:].any()
    torch.testing.assert_close(padded.map[:, :4], plain.map)


@NETS
@pytest.mark.parametrize("metric", ["eraser", "insertion_deletion", "sensitivity_n", "infidelity"])
def test_padding_changes_no_score(net, metric):
    def scores(x, maps):
        return attrib.evaluate(net(), x, maps, metric, target=1)

    padded = torch.cat((MAP, torch.full((1, 3), 7.0)), 1)  # with anything on padding
    for maps in (padded, MAP, [MAP[0]]):
        pd.testing.assert_frame_equal(scores(PADDED, maps), scores(IDS, MAP))


def test_whatever_they_come_in():
    net, expected = mean(), attrib.explain(mean(), TWO, 1, "lime", samples=30, uids=["0", "1"], run={"batch": 1}).map
    assert expected.shape == (2, 4)
    rows = torch.tensor([[5, 3, 9, 2, 0, 0], [7, 4, 0, 0, 0, 0]])
    labels = torch.tensor([0, 1])
    for x in (
        TWO,
        rows,
        list(rows),
        [rows[0], TWO[1]],
        Batch(("0", "1"), rows, labels),
        Batch(("0", "1"), rows, labels, lengths=torch.tensor([4, 2])),
        TensorDataset(rows, labels),
        DataLoader(TensorDataset(rows, labels), 2),
    ):
        for given in (net, Classifier(net), nn.DataParallel(net)):
            uids = None if isinstance(x, Batch) else ["0", "1"]
            found = attrib.explain(given, x, 1, "lime", samples=30, uids=uids)
            torch.testing.assert_close(found.map[:, :4], expected)
            assert not found.map[:, 4:].any()
            assert found.map.shape[1] == (4 if x is TWO else 6)
            assert (found.evaluate("eraser")["state"] == "ok").all()


def test_what_is_fitted_on_sees_no_padding():
    fits = torch.randint(2, 20, (6, 5), generator=torch.Generator().manual_seed(0))
    padded = torch.cat((fits, torch.zeros(6, 4, dtype=torch.long)), 1)
    given = dict(target=1, method="iba", layers={"bottleneck": "emb"}, steps=2, batch=2)
    one, other = (attrib.explain(mean(), IDS, fit=fit, **given).map for fit in (fits, padded))
    torch.testing.assert_close(one, other)


def test_an_explanation_is_of_the_text_and_not_of_its_padding():
    net = mean()
    found = attrib.explain(net, PADDED, 1, "gradient")
    pd.testing.assert_frame_equal(attrib.evaluate(net, IDS, found), attrib.evaluate(net, PADDED, found))
    with pytest.raises(attrib.UserError, match="x is not what was explained"):
        attrib.evaluate(net, torch.tensor([[5, 3, 9, 4, 0]]), found)


def test_an_id_of_padding_inside_of_a_text_is_a_word():
    x = torch.tensor([[5, 0, 9, 2, 0]])
    assert attrib.explain(lstm(), x, 1, "gradient").map[0].ne(0).tolist() == [True, True, True, True, False]
    nothing = torch.zeros(1, 3, dtype=torch.long)  # of which the first counts, as the nets have it
    assert not attrib.explain(lstm(), nothing, 1, "gradient").map[0, 1:].any()


def test_a_net_that_names_no_padding_has_none():
    net = Mean(pad_id=None).eval()
    x = torch.tensor([[5, 3, 9, 2, 4], [7, 4, 0, 0, 0]])
    assert attrib.explain(net, x, 1, "occlusion").map.shape == x.shape
    with pytest.raises(attrib.UserError, match="its attribute pad_id"):
        attrib.explain(net, TWO, 1, "occlusion")
