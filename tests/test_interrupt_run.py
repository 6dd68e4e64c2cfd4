"""Told to stop, a run ends between two batches, loses nothing, says 75, and the next one goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_methods
import torch
from mmengine.hooks import Hook
from tiny import ROOT, command, only_cell, pictures, quickly, tool

import attrib.running.run
from attrib.experiment import reading
from attrib.experiment.reading import Reader
from attrib.experiment.samples import Samples
from attrib.fit import Fit
from attrib.methods.parts.statistics import FeatureStatistics
from attrib.process import signals
from attrib.process.signals import LEFT, SIGNALS, Interrupted, watching
from attrib.results import tables
from attrib.running import states
from attrib.running.states import load_state
from attrib.store.cell import cells

COMMON = ("dataset=tiny", "model=small_cnn", "run.progress=false", "run.batch=2", "run.flush=1000")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(signals, "TWICE", 0.02)
    monkeypatch.setattr(reading, "PATIENCE", 0.1)
    before = [signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)]
    yield
    assert [signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)] == before


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """tools/run.py on six small pictures."""
    whole, quick, images = command(capfd), quickly(capfd), pictures(tmp_path)

    def here(*arguments: str, root: str = "work"):
        if not any(a.startswith("method=") for a in arguments):
            arguments = (*arguments, "method=eventful")
        flags, rest = [a for a in arguments if a == "-m"], [a for a in arguments if a != "-m"]
        roots = (f"dataset.root={images}", f"run.root={tmp_path / root}")
        return (whole if flags else quick)(*flags, *COMMON, *roots, "metric=[ehr]", *rest)

    here.root = tmp_path / "work"
    return here


@pytest.fixture
def during(monkeypatch):
    """What happens in the batch that holds a sample."""

    def set_up(uid: str, what: Callable[[], object]) -> None:
        monkeypatch.setattr(tiny_methods, "during", lambda batch: what() if uid in batch.uids else None)

    return set_up


def tell(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def counts(line: str) -> dict[str, int]:
    return {k: int(v) for k, v in (w.split("=") for w in line.split(": ")[1].split())}


def record(root: Path) -> dict:
    """The latest run's summary.json."""
    return json.loads(max(only_cell(root).folder.glob("runs/*/summary.json"), key=os.path.getmtime).read_text())


def numbers(root: Path) -> pd.Series:
    frame = tables.rows(root)
    return frame.set_index(["metric", "map", "column", "uid"])["value"].sort_index()


@pytest.fixture(scope="module")
def undisturbed() -> list[pd.Series]:
    """The numbers of a run that was never stopped, once there was one."""
    return []


@pytest.fixture
def goes_on(run, undisturbed):
    """The same command computes what is left, and the table is that of a run that was never stopped."""

    def check(computed: int) -> None:
        tiny_methods.during = len
        last = run()
        assert last.status == 0, last.err
        found = counts(last.out.strip().splitlines()[-1])
        assert (found["maps_computed"], found["maps_present"]) == (computed, 6 - computed)
        if not undisturbed:
            assert run(root="whole").status == 0
            undisturbed.append(numbers(run.root.parent / "whole"))
        pd.testing.assert_series_equal(numbers(run.root), undisturbed[0])

    return check


@pytest.mark.parametrize("number", SIGNALS)
def test_the_batch_in_work_is_finished_and_kept(run, goes_on, during, number):
    during("p002", lambda: tell(number))
    result = run()
    assert result.status == LEFT == 75
    *_, line, ending = result.out.strip().splitlines()
    assert counts(line) == dict(
        maps_computed=4, maps_present=0, scores_computed=0, scores_present=0, failed=0, left=2 + 6
    )
    assert ending == f"stopped by {number.name}, 8 maps and scores are left; the same command goes on"
    assert len(only_cell(run.root).maps.index()) == 4
    found = record(run.root)
    assert (found["left"], found["stopped"], found["finished"]) == (8, number.name, False)
    goes_on(2)
    found = record(run.root)
    assert (found["left"], found["stopped"], found["finished"]) == (0, None, True)


def test_between_scores(run, goes_on):
    result = run("run.hooks=[{_target_: test_interrupt_run.Tell, stage: ehr}]")
    assert result.status == 75
    assert counts(result.out.strip().splitlines()[-2])["scores_computed"] == 2
    assert counts(result.out.strip().splitlines()[-2])["left"] == 4
    goes_on(0)


class Tell(Hook):
    """The signal comes after the first batch of a stage, or the last."""

    def __init__(self, stage: str, last: bool = False, sleep: float = 0) -> None:
        self.stage, self.last, self.sleep = stage, last, sleep

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if outputs.stage == self.stage and (not self.last or outputs.done == outputs.total):
            tell()
            time.sleep(self.sleep)


def test_a_batch_that_takes_longer_than_the_grace_is_dropped(run, goes_on, during):
    during("p002", lambda: [tell(), time.sleep(30)])
    start = time.monotonic()
    result = run("run.grace=0.1")
    assert result.status == 75
    assert time.monotonic() - start < 10
    assert record(run.root)["left"] == 4 + 6
    *_, line, ending = result.out.strip().splitlines()
    assert counts(line)["maps_computed"] == 2
    assert ending == "stopped by SIGTERM, 10 maps and scores are left; the same command goes on"
    goes_on(4)


def test_a_second_signal_drops_the_batch(run, goes_on, during):
    during("p002", lambda: [tell(), time.sleep(0.05), tell(signal.SIGINT), time.sleep(30)])
    start = time.monotonic()
    result = run("run.grace=100")
    assert result.status == 75
    assert "a second signal drops the batch" in result.err
    assert time.monotonic() - start < 10
    goes_on(4)


def test_told_when_everything_is_done(run):
    result = run("run.hooks=[{_target_: test_interrupt_run.Tell, stage: ehr, last: true}]")
    assert result.status == 0
    assert "left" not in result.out
    assert record(run.root)["finished"] is True


def test_a_hook_that_hangs(run, goes_on):
    assert run("run.hooks=[{_target_: test_interrupt_run.Tell, stage: maps, sleep: 30}]", "run.grace=0.1").status == 75
    goes_on(4)


def test_a_read_that_hangs(run, goes_on, monkeypatch):
    """As on a file server that is gone: the thread cannot be ended, but the run can."""
    back, read, seen = threading.Event(), Reader.read, []

    def hanging(self, uids):
        seen.extend(uids)
        if "p004" in uids and seen.count("p004") == 2:  # the first time for the report's pictures
            threading.Timer(0.2, tell).start()
            back.wait(30)
        return read(self, uids)

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read", hanging)
        start = time.monotonic()
        assert run("run.grace=0.1").status == 75
        assert time.monotonic() - start < 10
    back.set()
    goes_on(2)


@pytest.mark.parametrize("method", ["during", "at the end"])
def test_a_grid_stops_as_a_whole(run, during, method):
    if method == "during":
        during("p002", tell)
    hook = "run.hooks=[{_target_: test_interrupt_run.Tell, stage: ehr, last: true}]" if method == "at the end" else ""
    result = run("-m", "method=eventful,random", *([hook] if hook else []))
    assert result.status == 75
    assert "the same command goes on" in result.out.strip().splitlines()[-1]
    assert [cell.folder.name.split(".")[2] for cell in cells(run.root)] == ["eventful"]
    tiny_methods.during = len
    assert run("-m", "method=eventful,random").status == 0
    assert [len(cell.maps.index()) for cell in cells(run.root)] == [6, 6]


@pytest.mark.parametrize("told", [True, False])
def test_a_bug_in_a_cell_of_a_grid_is_told_and_the_others_come(run, monkeypatch, told):
    """Hydra alone would say it at the grid's end, so never if that is told to stop before.

    The last lines name the cells that did not end well.
    """
    planning, calls = attrib.running.run.make_plan, []

    def planned(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("a bug")
        if told:
            tell()
        return planning(*arguments)

    monkeypatch.setattr(attrib.running.run, "make_plan", planned)
    result = run("-m", "method=eventful,random")
    assert result.status == (75 if told else 1)
    assert result.err.count("\nRuntimeError: a bug\n") == 1  # behind its traceback
    assert result.err.endswith("did not end well:\n  method=eventful: RuntimeError: a bug\n")
    assert len(cells(run.root)) == (0 if told else 1)


def test_planning_stops_at_once(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(attrib.running.run, "check_metrics", lambda _: [tell(), time.sleep(30)])
        start = time.monotonic()
        result = run()
    assert result.status == 75, result.err
    assert time.monotonic() - start < 10
    assert result.out.strip().splitlines()[-1] == "stopped by SIGTERM; the same command goes on"
    assert not cells(run.root)


def test_selection_keeps_what_the_model_has_said(run, monkeypatch):
    ask, asked = Samples.confidence, []

    def confidence(self, uids):
        asked.append(tuple(uids))
        if len(asked) == 2:
            tell()
        return ask(self, uids)

    monkeypatch.setattr(states, "PORTION", 2)
    monkeypatch.setattr(Samples, "confidence", confidence)
    how = ("dataset.target=predicted", "dataset.select.min_confidence=0.0", "method=random")
    assert run(*how).status == 75
    assert [len(uids) for uids in asked] == [2, 2]
    assert run(*how).status == 0
    assert [len(uids) for uids in asked] == [2, 2, 2]
    assert len({uid for uids in asked for uid in uids}) == 6


def test_a_fit_stops(run, monkeypatch):
    fit = FeatureStatistics.run

    def told(self, model, data, partial, report):
        tell()
        return fit(self, model, data, partial, report)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureStatistics, "run", told)
        result = run("method=iba", "method.steps=1")
    assert result.status == 75
    assert "12 maps and scores are left" in result.out
    assert not list((run.root / "state").glob("*.safetensors"))
    assert record(run.root)["stopped"] == "SIGTERM"
    assert run("method=iba", "method.steps=1").status == 0


class Steps(Fit):
    """A fit of four steps that saves only when it is asked to."""

    VERSION = 1

    def __init__(self, told: int) -> None:
        self.told, self.done = told, 0

    def run(self, model, data, partial, report):
        state = partial.load() or {"step": torch.tensor(0)}
        for step in range(int(state["step"]), 4):
            self.done += 1
            if step == self.told:
                tell()
            if partial.wanted():
                partial.save({"step": torch.tensor(step + 1)})
                report(f"step {step + 1}")
        return {"step": torch.tensor(4)}


class Nobody:
    uids, skipped = ("a",), {}


def test_a_fit_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(states.keys, "spec", lambda _: {})

    def fit(told: int) -> Steps:
        steps = Steps(told)
        with watching() as stop:
            load_state(tmp_path, "0123456789", steps, None, Nobody(), stop)
        return steps

    with pytest.raises(Interrupted):
        fit(told=1)
    assert fit(told=-1).done == 2


def test_submitits_handler_is_called_when_everything_is_flushed(run, goes_on, during):
    heard: list[int] = []

    def requeue(number, frame) -> None:
        heard.append(len(only_cell(run.root).maps.index()))
        sys.exit(-1)

    during("p002", lambda: tell(signal.SIGUSR2))
    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        assert run().status == -1
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard == [4]
    goes_on(2)


def test_a_sanity_check_stops_as_a_whole(run, during, monkeypatch, capfd):
    during("p002", tell)
    config = ["--config-dir", str(ROOT / "tests" / "configs")]
    data = ["dataset=tiny", f"dataset.root={run.root.parent / 'images'}", f"run.root={run.root}", "run.progress=false"]
    how = ["model=small_cnn", "method=eventful", "sanity.layers=[1,all]"]
    assert tool("sanity").main([*config, *data, *how]) == 75
    assert "the same command goes on" in capfd.readouterr().out.strip().splitlines()[-1]
    assert len(cells(run.root)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_process(tmp_path, number):
    """The same from outside, at a moment that nobody chose."""
    images = pictures(tmp_path, 12)
    arguments = [
        sys.executable, str(ROOT / "tools" / "run.py"), "--config-dir", str(ROOT / "tests" / "configs"), *COMMON,
        "method=iba", "method.steps=20", "metric=[ehr]", f"dataset.root={images}",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}

    def start(root: str, *more: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*arguments, f"run.root={tmp_path / root}", *more],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's & ignores it
        )

    process = start("work", "run.flush=0")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "work").glob("*/maps/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert out.strip().splitlines()[-1].startswith(f"stopped by {number.name}, ")
    kept = len(only_cell(tmp_path / "work").maps.index())
    assert kept == counts(out.strip().splitlines()[-2])["maps_computed"] > 0
    for root in ("work", "whole"):
        process = start(root)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert counts(out.strip().splitlines()[-1])["maps_present"] == (kept if root == "work" else 0)
    mine, whole = numbers(tmp_path / "work"), numbers(tmp_path / "whole")
    assert mine.index.equals(whole.index)
    np.testing.assert_allclose(mine, whole, atol=1e-5)
