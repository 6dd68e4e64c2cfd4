"""Metrics that nobody named: those that need regions are left out where the data have none."""

from __future__ import annotations

import pytest
import torch

from attrib.config import objects
from attrib.config.compose import compose
from attrib.config.objects import metrics_of
from attrib.errors import SampleError, UserError
from attrib.experiment.regions import TRIED, fitting
from attrib.types import Batch

DEFAULT = ("ehr", "insertion_deletion")


@pytest.mark.parametrize(
    ("name", "overrides", "assumed"),
    [
        ("run", (), DEFAULT),
        ("run", ("metric.insertion_deletion.steps=4",), ("ehr",)),
        ("run", ("metric.ehr.steps=4",), ("insertion_deletion",)),
        ("run", ("~metric.ehr",), ("insertion_deletion",)),
        ("run", ("metric=[ehr,insertion_deletion]",), ()),
        ("run", ("metric=[ehr]",), ()),
        ("run", ("metric=[]",), ()),
        ("run", ("+metric.localisation={_target_: attrib.metrics.Localisation}",), ()),
        ("sanity", (), ()),
        ("train", ("train=lenet_digits",), ()),
    ],
)
def test_which_metrics_nobody_named(name, overrides, assumed):
    assert compose(name, overrides).assumed == assumed


class Data:
    """``roi`` None: without regions; ``broken`` samples at the beginning cannot be read."""

    def __init__(self, modality="image", roi=None, broken=0):
        self.modality, self.roi, self.broken = modality, roi, broken
        self.uids = tuple(f"{i:02d}" for i in range(12))

    def batch(self, uids):
        if int(uids[0]) < self.broken:
            raise SampleError(f"{uids[0]} cannot be read")
        return Batch(tuple(uids), torch.zeros(1, 3, 4, 4), torch.zeros(1, dtype=torch.long), self.roi)


class Images(Data):
    """Regions may be read without images."""

    def batch(self, uids):
        raise AssertionError("no image need be decoded")

    def regions(self, uids):
        return self.roi


ROI = torch.ones(1, 4, 4, dtype=torch.bool)
METRICS = compose("run", ["metric=[ehr,localisation,insertion_deletion]"]).values["metric"]


@pytest.mark.parametrize(
    ("data", "left"),
    [
        (Data(), ["insertion_deletion"]),
        (Data(broken=3), ["insertion_deletion"]),
        (Data(roi=ROI), list(METRICS)),
        (Data("audio"), ["insertion_deletion"]),
        (Data("text"), ["insertion_deletion"]),
        (Images(), ["insertion_deletion"]),
        (Images(roi=ROI), list(METRICS)),
        (Data(broken=12), list(METRICS)),  # the run says what is wrong with them
    ],
)
def test_regions_decide(data, left, caplog):
    caplog.set_level("INFO")
    metrics = metrics_of(METRICS)
    assert list(fitting(metrics, tuple(metrics), data, "mine")) == left
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (len(left) == 1)
    assert all("dataset mine has no regions of interest" in one and "ehr and localisation" in one for one in said)


@pytest.mark.parametrize("data", [Data(), Data("audio"), Images()])
def test_what_was_named_is_refused(data):
    metrics = metrics_of(METRICS)
    with pytest.raises(UserError, match=r"^ehr needs regions of interest, and dataset mine .*=\[insertion_deletion\]"):
        fitting(metrics, ("localisation", "insertion_deletion"), data, "mine")
    with pytest.raises(UserError, match=r"^ehr and localisation need regions"):
        fitting(metrics, (), data, "mine")


def test_no_more_than_a_few_samples_are_tried(monkeypatch):
    data, tried = Data(broken=12), []
    monkeypatch.setattr(data, "batch", lambda uids: tried.append(uids) or 1 / 0)
    metrics = metrics_of(METRICS)
    assert list(fitting(metrics, (), data, "mine")) == list(METRICS)
    assert len(tried) == TRIED


def test_a_metric_that_was_named_is_refused_before_a_net_is_loaded(monkeypatch):
    monkeypatch.setattr(objects, "classifier", lambda *a: pytest.fail("the net was loaded"))
    composition = compose("run", ["dataset=digits", "model=lenet", "method=random", "metric=[ehr]"])
    with pytest.raises(UserError, match="ehr needs regions of interest, and dataset digits has none"):
        objects.experiment(composition.values, composition.files, composition.assumed)


def test_a_cell_without_named_metrics_is_the_cell_with_those_that_fit():
    made = []
    for metric in ((), ("metric=[insertion_deletion]",)):
        composition = compose("run", ["dataset=digits", "model=lenet", "method=random", *metric])
        made.append(objects.experiment(composition.values, composition.files, composition.assumed))
    assert made[0].config == made[1].config
    assert list(made[0].metrics) == ["insertion_deletion"]
