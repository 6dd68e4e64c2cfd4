"""What torch loads data from: what the loader gives is what is explained, or it is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

import attrib

RAW, LABELS = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255, torch.tensor([0, 1, 2, 0, 1])
DATA = TensorDataset(RAW, LABELS)


class Made(Dataset):
    """Three samples, each what a function of its place says."""

    def __init__(self, of) -> None:
        self.of = of

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i):
        return self.of(i)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3))


def explain(x, target="label", method="input_x_gradient", **more):
    return attrib.explain(net(), x, target, method, **more)


# ---- what is made of a sample ---------------------------------------------------------------------------


def scaled(items):
    x, y = default_collate(items)
    return (x / 255 - 0.5) / 0.25, y


def test_what_the_loader_makes_of_a_sample_is_explained():
    loader = DataLoader(DATA, 2, collate_fn=scaled)
    expected = explain(torch.cat([x for x, _ in loader]), LABELS.tolist())
    found = explain(loader)
    torch.testing.assert_close(found.map, expected.map)
    assert found.target.tolist() == LABELS.tolist()
    for collate, target in (
        (lambda items: scaled(items)[0], 1),
        (lambda items: [scaled(items)[0], [label for _, label in items]], "label"),
        (lambda items: (scaled(items)[0], None), 1),
    ):
        wanted = expected.map if target == "label" else explain((RAW / 255 - 0.5) / 0.25, 1).map
        torch.testing.assert_close(explain(DataLoader(DATA, 2, collate_fn=collate), target).map, wanted)
    alone = DataLoader(DATA, batch_size=None, collate_fn=lambda item: ((item[0] / 255 - 0.5) / 0.25, item[1]))
    torch.testing.assert_close(explain(alone).map, expected.map)


def test_what_is_fitted_on_is_what_the_loader_makes():
    given = dict(method="iba", layers={"bottleneck": "0"}, steps=2, batch=2)
    ready = (RAW / 255 - 0.5) / 0.25
    one, other = (explain(ready, 1, fit=fit, **given).map for fit in (ready, DataLoader(DATA, collate_fn=scaled)))
    torch.testing.assert_close(one, other)
    with pytest.raises(attrib.UserError, match="fit: its DataLoader draws by WeightedRandomSampler"):
        explain(ready, 1, fit=DataLoader(DATA, sampler=WeightedRandomSampler([1.0] * 5, 5)), **given)


def broken(items):
    raise ValueError("wants two")


@pytest.mark.parametrize(
    ("collate", "words"),
    [
        (lambda items: {"x": items[0][0]}, "makes dict of sample 0"),
        (lambda items: default_collate(items * 2), r"makes Tensor \(2, 3, 8, 8\) of sample 0, not one row"),
        (lambda items: items[0][0].sum(), r"makes Tensor \(\) of sample 0, not one row"),
        (broken, r"collate_fn \(broken\) does not take sample 0 alone \(ValueError: wants two\)"),
        (lambda items: (*default_collate(items), torch.tensor([1])), "sample 0 has 3 parts"),
    ],
)
def test_what_makes_no_batch_of_one_is_refused(collate, words):
    with pytest.raises(attrib.UserError, match=f"x: .*{words}"):
        explain(DataLoader(DATA, 2, collate_fn=collate))


# ---- which samples ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loader", "places"),
    [
        (dict(batch_size=2), "01234"),
        (dict(batch_size=2, shuffle=True), "01234"),
        (dict(batch_size=2, drop_last=True), "0123"),
        (dict(batch_size=2, shuffle=True, drop_last=True), "01234"),
        (dict(batch_sampler=[[3], [1, 2]]), "312"),
        (dict(batch_sampler=BatchSampler(SequentialSampler(DATA), 2, True)), "0123"),
        (dict(batch_sampler=BatchSampler(SubsetRandomSampler([4, 0]), 2, True)), "40"),
        (dict(sampler=[4, 2]), "42"),
        (dict(sampler=SubsetRandomSampler(torch.tensor([3, 1]))), "31"),
        (dict(sampler=RandomSampler(DATA)), "01234"),
        (dict(batch_size=None), "01234"),
    ],
)
def test_the_loaders_samples_are_explained(loader, places):
    found = explain(DataLoader(DATA, **loader))
    assert found.uids == tuple(places)
    assert found.target.tolist() == LABELS[[int(place) for place in places]].tolist()


class Backwards(SequentialSampler):
    def __iter__(self):
        return iter(range(len(self.data_source))[::-1])


class Own(BatchSampler):
    pass


class OwnLoader(DataLoader):
    def __iter__(self):
        return ((x / 255, y) for x, y in super().__iter__())


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (lambda: DataLoader(DATA, sampler=Backwards(DATA)), "draws by Backwards"),
        (lambda: DataLoader(DATA, batch_sampler=Own(SequentialSampler(DATA), 2, False)), "draws batches by Own"),
        (lambda: DataLoader(DATA, batch_sampler=BatchSampler(Backwards(DATA), 2, False)), "draws by Backwards"),
        (lambda: DataLoader(DATA, sampler=RandomSampler(DATA, num_samples=3)), "draws 3 of 5 samples by chance"),
        (lambda: DataLoader(DATA, sampler=RandomSampler(DATA, True)), "draws with replacement by chance"),
        (lambda: DataLoader(DATA, sampler=["a"]), "draws str, and samples are asked for by whole numbers"),
        (lambda: DataLoader(DATA, batch_sampler=[3, 1]), "batch_sampler holds int"),
        (lambda: OwnLoader(DATA), "OwnLoader gives out batches in a way of its own"),
    ],
)
def test_what_draws_in_its_own_way_is_refused(loader, words):
    with pytest.raises(attrib.UserError, match=f"x: .*{words}"):
        explain(loader())


# ---- labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "target"),
    [
        (2, 2),
        (torch.tensor(2), 2),
        (torch.tensor(2.0), 2),
        (2.0, 2),
        (True, 1),
        (torch.tensor([2]), 2),
        ([2.0], 2),
        ([0, 1, 1], [0, 1, 1]),
        (torch.tensor([0.0, 1.0, 1.0]), [0, 1, 1]),
    ],
)
def test_labels_that_are_classes(label, target):
    assert explain(Made(lambda i: (RAW[i], label))).target.tolist() == [target] * 3


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        (1.9, "1.9"),
        (torch.tensor(1.9), r"tensor\(1.9"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        ([0.2, 0.7, 0.9], "0.2"),
        (torch.tensor([0.2, 0.7, 0.9]), r"Tensor \(3,\)"),
        ("cat", "'cat'"),
        (["cat"], "'cat'"),
        ({"boxes": 1}, "'boxes'"),
        (torch.zeros(8, 8), r"Tensor \(8, 8\)"),
        ([], r"\[\]"),
        (1j, "1j"),
    ],
)
def test_labels_that_are_none(label, shown):
    """They are refused where labels are asked for, and nowhere else: a regression's values do no harm."""
    data = Made(lambda i: (RAW[i], label))
    with pytest.raises(attrib.SampleError, match=f"0 has no label .*{shown}.*explain the model's own class"):
        explain(data)
    torch.testing.assert_close(explain(data, 1).map, explain(RAW[:3], 1).map)
    torch.testing.assert_close(explain(data, [0, 1, 2]).map, explain(RAW[:3], [0, 1, 2]).map)


def test_one_label_that_is_none_is_its_samples():
    found = explain(Made(lambda i: (RAW[i], 1.5 if i == 2 else i)))
    assert found.uids == ("0", "1")
    assert found.failures["2"].startswith("2 has no label (beside its input stands 1.5")


@pytest.mark.parametrize(
    "item",
    [lambda i: (RAW[i], i, 2), lambda i: [RAW[i], RAW[i], 1, "name"], lambda i: ()],
)
def test_a_sample_of_more_parts_is_refused(item):
    for target in ("label", 1, None):
        with pytest.raises(attrib.UserError, match=r"sample 0 has \d parts .*nothing says which is the label"):
            explain(Made(item), target)
