"""The first inputs of a cell, kept for the report by a thread of their own."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from torch import nn

from attrib.datasets import ArrayDataset, ImageTransform
from attrib.experiment.cell import Experiment
from attrib.methods.baselines import Random
from attrib.models import Classifier
from attrib.process.signals import Stop
from attrib.running import kept_inputs
from attrib.running.kept_inputs import KeptInputs
from attrib.running.options import Options
from attrib.running.plan import Plan, make_plan
from attrib.store.arrays import Arrays

UIDS = [f"s/{i}" for i in range(5)]


@pytest.fixture
def plan(tmp_path) -> Plan:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    transform = ImageTransform(size=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    data = ArrayDataset({uid: i for i, uid in enumerate(UIDS)}, pixels, np.arange(5) % 2, transform)
    net = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)))
    names = {"dataset": "d", "model": "net", "method": "random"}
    return make_plan(Experiment(names, data, net, Random()), Options(root=str(tmp_path), device="cpu"), "writer")


def keeper(plan: Plan, stop: Stop | None = None) -> KeptInputs:
    samples = plan.experiment.samples(plan.uids, 2)
    return KeptInputs(plan, samples, plan.cell.folder.parent, stop or Stop())


def stored(plan: Plan) -> Arrays:
    (folder,) = (plan.cell.folder.parent / "state").glob("pictures.*")
    return Arrays(folder)


def test_another_thread_gets_the_images_and_only_this_one_asks_the_net(plan, monkeypatch):
    threads: dict[str, set[str]] = {}

    def noted(name):
        function = getattr(kept_inputs, name)

        def call(*args):
            threads.setdefault(name, set()).add(threading.current_thread().name)
            return function(*args)

        monkeypatch.setattr(kept_inputs, name, call)

    noted("said")
    noted("shown_input")
    inputs = keeper(plan)
    inputs.begin()
    inputs.finish()
    assert threads["said"] == {threading.current_thread().name}
    assert threads["shown_input"] == {"attrib-inputs_0"}
    found = stored(plan)
    for i, uid in enumerate(UIDS):
        info = found.index()[plan.key(uid)].info
        assert info["target"] == i % 2
        assert info["right"] == (info["predicted"] == i % 2)
        assert (found.read(plan.key(uid))["image"] == plan.experiment.dataset.picture(uid)).all()
    again = keeper(plan)
    again.begin()
    assert again._writing is None  # all are there


def test_no_more_waits_in_memory_than_of_maps(plan, monkeypatch):
    """A hundred sounds of a minute would be a gigabyte."""
    waiting = []
    monkeypatch.setattr(Arrays, "MOST", 2 * 8 * 8 * 3)
    add = Arrays.add
    monkeypatch.setattr(Arrays, "add", lambda self, *a, **k: add(self, *a, **k) or waiting.append(self.unwritten))
    inputs = keeper(plan)
    inputs.begin()
    inputs.finish()
    assert max(waiting) == 2
    assert len(stored(plan).index()) == 5


def test_an_image_that_cannot_be_had_costs_no_other(plan, monkeypatch):
    picture = type(plan.experiment.dataset).picture
    bad = ValueError("cut off")

    def broken(self, uid):
        if uid == UIDS[2]:
            raise bad
        return picture(self, uid)

    monkeypatch.setattr(type(plan.experiment.dataset), "picture", broken)
    inputs = keeper(plan)
    inputs.begin()
    inputs.finish()
    assert {uid for uid, _ in stored(plan).index()} == {*UIDS} - {UIDS[2]}


def test_a_disk_that_refuses_them_is_heard_of_once(plan, monkeypatch):
    def full(self, samples):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Arrays, "_write", full)
    inputs = keeper(plan)
    inputs.begin()
    with pytest.raises(OSError, match="No space left"):
        inputs.finish()
    inputs.check()
    inputs.finish()


def test_whoever_is_told_to_stop_does_not_wait_for_an_image_that_never_comes(plan, monkeypatch):
    begun, never = threading.Event(), threading.Event()
    picture = type(plan.experiment.dataset).picture

    def hangs(self, uid):
        begun.set()
        never.wait()
        return picture(self, uid)

    monkeypatch.setattr(type(plan.experiment.dataset), "picture", hangs)
    monkeypatch.setattr(kept_inputs, "PATIENCE", 0.05)
    stop = Stop()
    inputs = keeper(plan, stop)
    inputs.begin()
    assert begun.wait(10)
    stop.name = "SIGTERM"
    inputs.finish()
    assert inputs._writing is not None
    never.set()
    inputs._writing.result(10)
