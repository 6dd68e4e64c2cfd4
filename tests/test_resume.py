"""Killed at any moment, a run loses nothing and counts nothing twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tiny import ROOT, command, pictures

from attrib.results import tables
from attrib.store.cell import cells

SAMPLES = 24
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}


def given(images: Path, root: Path, *arguments: str) -> list[str]:
    return [
        "dataset=tiny", "model=small_cnn", "method=iba", "method.steps=3", "metric.insertion_deletion.steps=8",
        f"dataset.root={images}", f"run.root={root}", "run.batch=2", "run.flush=0", *arguments,
    ]  # fmt: skip


def start(*those: Any) -> subprocess.Popen:
    words = [sys.executable, str(ROOT / "tools" / "run.py"), "--config-dir", str(ROOT / "tests" / "configs")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*words, *given(*those)], env=ENVIRONMENT, text=True, **pipes)


def finish(process: subprocess.Popen) -> dict[str, int]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return counts(out)


def counts(out: str) -> dict[str, int]:
    return {k: int(v) for k, v in (w.split("=") for w in out.strip().splitlines()[-1].split(": ")[1].split())}


def numbers(root: Path) -> pd.Series:
    frame = tables.rows(root)
    return frame.set_index(["metric", "map", "column", "uid"])["value"].sort_index()


def stored(root: Path) -> int:
    """Samples with a map or a score, counted in files as a reader sees them."""
    return sum(len(c.maps.index()) + sum(len(c.scores(m).present()) for m in c.metrics()) for c in cells(root))


def killed_and_resumed(tmp_path: Path, kills: int, seed: int, here: Callable[..., Any]) -> None:
    """``here``: the command in this process, for runs that nobody kills."""
    images = pictures(tmp_path, SAMPLES)
    whole = counts(here(*given(images, tmp_path / "whole")).out)
    assert whole["maps_computed"] == SAMPLES

    root, moments = tmp_path / "killed", random.Random(seed)
    for _ in range(kills):
        process = start(images, root)
        before = stored(root)
        deadline = time.monotonic() + 120
        while stored(root) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)  # a kill during the imports would prove nothing
        time.sleep(moments.uniform(0, 0.15))
        kept = stored(root)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert stored(root) >= kept > 0, "a kill lost something that was stored"
    last = counts(here(*given(images, root)).out)
    assert last["maps_computed"] + last["maps_present"] == SAMPLES
    assert last["scores_computed"] + last["scores_present"] == 2 * SAMPLES
    assert last["failed"] == 0

    expected, got = numbers(tmp_path / "whole"), numbers(root)
    assert expected.index.equals(got.index)  # nothing lost, nothing twice
    np.testing.assert_allclose(got, expected, atol=1e-5)
    again = counts(here(*given(images, root)).out)
    assert (again["maps_computed"], again["scores_computed"]) == (0, 0)
    spoiled = [p for p in root.rglob("*.safetensors") if p.name.startswith(".")]
    assert all(".tmp" in p.suffix for p in spoiled)


def test_killed(tmp_path, capfd):
    killed_and_resumed(tmp_path, kills=1, seed=0, here=command(capfd, "run"))


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path, capfd):
    killed_and_resumed(tmp_path, kills=10, seed=1, here=command(capfd, "run"))


def test_two_processes_share_a_cell(tmp_path):
    images = pictures(tmp_path, SAMPLES)
    both = [start(images, tmp_path / "both") for _ in range(2)]
    found = [finish(p) for p in both]
    assert all(c["failed"] == 0 for c in found)
    assert sum(c["maps_computed"] for c in found) >= SAMPLES
    frame = tables.rows(tmp_path / "both")
    assert not frame.duplicated(["metric", "map", "column", "uid"]).any()
    assert set(tables.summary(frame)["n"]) == {SAMPLES}


@pytest.mark.slow  # test_interrupt_run.py has quick tests of it
def test_a_polite_kill_flushes_and_leaves_a_summary(tmp_path):
    images = pictures(tmp_path, SAMPLES)
    process = start(images, tmp_path / "polite", "run.flush=1000", "method.steps=20", "run.batch=1")
    deadline = time.monotonic() + 120
    at_work = False
    while not at_work and time.monotonic() < deadline:
        at_work = any('"maps"' in p.read_text() for p in (tmp_path / "polite").glob("*/runs/*/progress.json"))
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    (cell,) = cells(tmp_path / "polite")
    if process.returncode == 0:
        pytest.fail("it finished before the signal: make the work longer")
    assert process.returncode == 75
    summary = json.loads(next(cell.folder.glob("runs/*/summary.json")).read_text())
    assert summary["finished"] is False
    assert summary["stopped"] == "SIGTERM"
    assert summary["left"] == 3 * SAMPLES - summary["maps_computed"]
    assert len(cell.maps.index()) == summary["maps_computed"] > 0
