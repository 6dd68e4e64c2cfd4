"""Damaged files, files that come and go, jobs that do the same, clocks that jump: the sequel of test_faults.py."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import tiny_methods
import torch
from mmengine.hooks import Hook
from test_faults import Job, during, job, numbers, undisturbed
from tiny import only_cell, write_image

from attrib.metrics import EHR
from attrib.results import tables
from attrib.store.cell import Cell
from attrib.types import UserError
from attrib.upkeep.repair import checks

__all__ = ["during", "job", "undisturbed"]  # fixtures


def chunks(job: Job, kind: str = "maps/*.safetensors") -> list[Path]:
    return sorted(only_cell(job.root).folder.glob(kind))


def flip(path: Path, at: int) -> None:
    """One bit of a file, ``at`` bytes from its start, or from its end."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


# ---- damaged files ----------------------------------------------------------------------------------


def test_a_truncated_chunk(job):
    """Its samples count as missing; the next run says so and computes them."""
    assert job().status == 0
    path = chunks(job)[1]
    path.write_bytes(path.read_bytes()[:-10])
    assert job.stored == 4
    assert f"damaged, its samples are computed again: {path}" in log_of(job, job.finishes, 2)


def log_of(job: Job, what, *arguments) -> str:
    """What the runs log while ``what`` is done."""
    before = set(chunks(job, "runs/*/*.log"))
    what(*arguments)
    return "".join(path.read_text() for path in chunks(job, "runs/*/*.log") if path not in before)


@pytest.mark.parametrize("where", ["list", "body"])
def test_a_flipped_bit_in_a_chunk_whose_scores_are_missing(job, where):
    """In the list of its samples: noticed at once. In a map: when a metric reads it, and the same run puts it right."""
    assert job("metric=[]", "run.batch=3").status == 0
    path = chunks(job)[0]
    size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    at = path.read_bytes().index(b"p001") if where == "list" else 8 + size + 50
    flip(path, at)
    log = log_of(job, lambda: job.finishes(3) if where == "list" else repaired(job, path))
    assert str(path) in log


def repaired(job: Job, path: Path) -> None:
    """One map of the damaged chunk is computed again, the other two are taken out of it; it is kept aside."""
    found = job()
    assert found.status == 0, found.err
    assert "maps_computed=1 maps_present=5 scores_computed=6 scores_present=0 failed=0" in found.out
    assert not path.exists()
    (aside,) = (job.root / ".damaged").rglob("*.safetensors")
    assert aside.name == path.name
    assert not only_cell(job.root).ledger.entries()
    assert job.stored == 6
    job.finishes(0)


def test_scores_of_damaged_maps_judge_the_same_class(job):
    """A map that is made again is about the class that the first was about."""
    how = ("metric=[ehr]", "+metric.t._target_=tiny_methods.TargetOf", "dataset.target=predicted")
    assert job("metric=[]", "dataset.target=predicted").status == 0
    index = only_cell(job.root).maps.index()
    explained = {uid: record.info["target"] for (uid, _), record in index.items()}
    for path in chunks(job):
        flip(path, -20)
    result = job(*how)
    assert result.status == 0, result.err
    assert "maps_computed=3 maps_present=3" in result.out  # the last of each chunk of two
    assert {k[3]: v for k, v in numbers(job.root).items() if k[2] == "target"} == explained


def test_a_chunk_that_is_deleted_while_it_is_read(job):
    assert job("metric=[]").status == 0
    path = chunks(job)[0]
    hook = "run.hooks=[{_target_: test_faults_data.Delete, path: " + str(path) + "}]"
    result = job(hook)
    assert result.status == 0, result.err
    assert "scores_computed=6" in result.out
    assert "failed=0" in result.out
    job.finishes(0)


class Delete(Hook):
    """Somebody deletes a chunk before the first scores are computed."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def before_test_iter(self, runner, batch_idx, data_batch=None) -> None:
        self.path.unlink(missing_ok=True)


def test_a_damaged_map_that_cannot_be_made_again(job):
    """It is named; the other scores come. When the picture is back, so is the score."""
    assert job("metric=[]").status == 0
    flip(chunks(job)[0], -20)
    picture = (job.images / "p001.png").read_bytes()
    (job.images / "p001.png").write_bytes(b"gone")
    os.utime(job.images / "p001.png", (0, 0))
    result = job()
    assert result.status == 0
    assert "scores_computed=5" in result.out
    assert "failed=1" in result.out
    (job.images / "p001.png").write_bytes(picture)
    job.finishes(1)


def test_a_damaged_map_that_the_method_refuses_is_not_left(job, during):
    """It failed, like any other; nothing of this run is still to be done."""
    assert job("metric=[]").status == 0
    flip(chunks(job)[0], -20)
    during("p001", lambda: 1 / 0)
    result = job()
    assert result.status == 0
    assert result.out.strip().splitlines()[-1].endswith("failed=2")  # its map, and the score
    assert not json.loads(sorted(job.root.glob("*/runs/*/summary.json"))[-1].read_text())["left"]
    job.finishes(1)


def test_a_map_that_was_made_again_for_the_methods_own_score_is_kept(job):
    """No metric comes afterwards that would write it."""
    assert job("method=sized", "metric=[]").status == 0
    shutil.rmtree(next(job.root.glob("*/scores")))
    flip(chunks(job)[0], -2)  # the number of p001, which is stored last
    assert job("method=sized", "metric=[]").status == 0
    assert (job.root / ".damaged").exists()
    assert len(Cell(next(job.root.glob("*.sized.*"))).maps.index()) == 6


def test_a_failure_of_the_methods_own_score_counts(job, during):
    """It goes through the same door as all others: the summary knows of it, so does run.strict."""
    assert job("method=sized", "metric=[]").status == 0
    shutil.rmtree(next(job.root.glob("*/scores")))
    flip(chunks(job)[0], -2)  # the number of p001, which is stored last
    during("p001", lambda: 1 / 0)
    result = job("method=sized", "metric=[]", "run.strict=true")
    assert result.status == 3
    assert result.out.strip().splitlines()[-1].endswith("failed=2")  # its map, and the score


def test_a_metric_of_which_every_score_failed_is_no_success(job, monkeypatch):
    """As if no map could be computed; with one score that is there the run is a success."""
    monkeypatch.setattr(EHR, "score", lambda *_: 1 / 0)
    result = job()
    assert result.status == 3
    assert result.out.strip().splitlines()[-1].endswith("failed=6")
    monkeypatch.undo()
    assert job("run.limit=1").status == 0
    monkeypatch.setattr(EHR, "score", lambda *_: 1 / 0)
    assert job().status == 0


def test_a_root_that_cannot_be_written_promises_nothing(job):
    """Nothing was stored, so nothing is said to be safe."""
    result = job("run.root=/proc/attrib")
    assert result.status == 2
    assert "/proc/attrib/tiny.small_cnn.eventful" in result.err
    assert "take another run.root" in result.err
    assert "safe" not in result.err
    assert len(result.err.strip().splitlines()) == 1


@pytest.mark.parametrize("place", ["", "maps", "scores"])
@pytest.mark.parametrize("dry", ["true", "false"])
def test_a_file_in_the_place_of_a_folder_is_named(job, place, dry):
    assert job("run.limit=1").status == 0
    folder = only_cell(job.root).folder / place
    shutil.rmtree(folder)
    folder.write_text("")
    result = job(f"run.dry={dry}")
    assert result.status == 2
    assert str(folder) in result.err
    assert "move that away" in result.err
    assert folder.read_text() == ""


def test_another_cells_description_gives_no_numbers_its_name(job):
    """Two spec.json that changed places: the table had the scores of each method under the other's name."""
    assert job("metric=[ehr]").status == 0
    assert job("metric=[ehr]", "method=random").status == 0
    first, second = sorted(job.root.glob("*/spec.json"))
    there = first.read_text()
    first.write_text(second.read_text())
    second.write_text(there)
    with pytest.raises(UserError, match="describes the cell with the key"):
        tables.rows(job.root)
    assert {damage.path for path, check in checks(job.root) if (damage := check(path))} == {first, second}
    result = job("metric=[ehr]", "method=random")
    assert result.status == 2
    assert "attrib cache repair" in result.err


@pytest.mark.parametrize("seconds", [None, float("nan"), float("inf"), 1e300, -1.0])
def test_seconds_that_no_sample_took_are_no_estimate(job, seconds):
    assert job("run.limit=1").status == 0
    cell = only_cell(job.root)
    (path,) = cell.maps.folder.glob("*.safetensors")
    ((key, record),) = cell.maps.index().items()
    noted, arrays = record.info, cell.maps.read(key)
    path.unlink()
    again = Cell(cell.folder, "again").maps
    again.add(*key, arrays, **{**noted, "seconds": seconds})
    again.flush()
    result = job("run.dry=true")
    assert result.status == 0, result.err
    assert "5 to compute\n" in result.out
    assert "no time recorded yet for this method" in result.out


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_score_file(job, damage):
    """Its samples are scored again, from the maps."""
    assert job().status == 0
    path = chunks(job, "scores/*/*.parquet")[0]
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:-30], "empty": b"", "flipped": whole}[damage])
    if damage == "flipped":
        flip(path, 60)
    job.finishes(0)


def test_a_damaged_state_and_partial(job):
    """A fit that can be read no more is made again, with a warning; a left-over partial one does no harm."""
    how = ("method=iba", "method.steps=1")
    assert job(*how).status == 0
    before = {uid: only_cell(job.root).maps.read((uid, f))["map"] for uid, f in only_cell(job.root).maps.index()}
    (state,) = (job.root / "state").glob("*.safetensors")
    state.write_bytes(state.read_bytes()[:50])
    stale = state.with_suffix(".partial.safetensors")
    stale.write_bytes(b"half a fit")
    for path in chunks(job):
        path.unlink()
    assert job(*how).status == 0
    after = {uid: only_cell(job.root).maps.read((uid, f))["map"] for uid, f in only_cell(job.root).maps.index()}
    assert before.keys() == after.keys()
    for uid in before:
        np.testing.assert_allclose(after[uid], before[uid], atol=1e-6)
    assert set(safetensors.torch.load_file(state))
    assert not stale.exists()


# ---- data that comes and goes -------------------------------------------------------------------------


def test_a_picture_that_vanishes_during_the_run(job, during):
    """It is in the ledger, the others go on; when it is back, it is computed."""
    path = job.images / "p005.png"
    picture = path.read_bytes()
    during("p000", path.unlink)
    result = job("run.limit=6", "run.batch=1")
    assert result.status == 0
    assert "maps_computed=5 maps_present=0 scores_computed=5 scores_present=0 failed=1" in result.out
    (entry,) = only_cell(job.root).ledger.entries()
    assert (entry["uid"], entry["stage"]) == ("p005", "load")
    assert "p005.png" in entry["reason"]
    states = tables.rows(job.root).set_index("uid")["state"].astype(str).to_dict()
    assert states.pop("p005") == "failed"
    assert set(states.values()) == {"ok"}
    again = job()
    assert again.status == 0
    assert "maps_present=5 scores_computed=0 scores_present=5 failed=1" in again.out
    reasons = [entry["reason"] for entry in only_cell(job.root).ledger.entries()]
    assert "line 7: there is no image p005.png" in reasons[-1], "the list of labels names it"
    path.write_bytes(picture)
    job.finishes(1)


def test_a_picture_that_vanishes_between_map_and_score(job, during):
    path = job.images / "p005.png"
    picture = path.read_bytes()
    during("p005", path.unlink)
    result = job()
    assert "maps_computed=6 maps_present=0 scores_computed=5 scores_present=0 failed=1" in result.out
    path.write_bytes(picture)
    job.finishes(0)


# ---- several jobs -------------------------------------------------------------------------------------


def test_two_jobs_on_one_shard(job, during, capfd):
    """The second starts within the first batch of the first; the first sees what is done and does not do it again."""
    others = []

    def second() -> None:
        tiny_methods.during = len
        others.append(job())

    during("p000", second)
    first = job()
    assert first.status == 0
    assert "maps_computed=6" in others[0].out
    assert "maps_computed=2 maps_present=0" in first.out
    assert len(chunks(job)) == 4
    job.finishes(0)


# ---- clocks -------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """The clock that people set; that of the machine's uptime goes on."""
    real = time.time, time.time_ns, time.strftime

    def jump(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: real[0]() + seconds)
        monkeypatch.setattr(time, "time_ns", lambda: real[1]() + int(seconds * 1e9))
        monkeypatch.setattr(
            time, "strftime", lambda format, t=None: real[2](format, t or time.localtime(real[0]() + seconds))
        )

    yield jump
    jump(0)


@pytest.mark.parametrize("seconds", [-3e8, 3e8])
def test_a_clock_that_jumps_between_runs(job, clock, seconds):
    """Also if it goes back: what was computed later need not have the later name or time."""
    assert job("run.limit=3").status == 0
    clock(seconds)
    write_image(job.images / "p001.png", 99)
    result = job()
    assert "maps_computed=4 maps_present=2" in result.out
    changed = numbers(job.root)
    clock(0)
    assert "maps_computed=0 maps_present=6 scores_computed=0" in job().out
    pd.testing.assert_series_equal(numbers(job.root), changed)
    assert set(tables.rows(job.root)["state"]) == {"ok"}
    write_image(job.images / "p001.png", 1)  # as it was
    assert "maps_computed=0 maps_present=6 scores_computed=0" in job().out
    job.finishes(0)


@pytest.mark.parametrize("seconds", [-3e8, 3e8])
def test_a_clock_that_jumps_during_a_run(job, during, clock, seconds):
    """Flushes go on, and the record's seconds are those that passed."""
    during("p002", lambda: clock(seconds))
    assert job("run.flush=0.01").status == 0
    assert len(chunks(job)) >= 2
    record = pd.read_json(chunks(job, "runs/*/summary.json")[0], typ="series")
    assert 0 < record["seconds"] < 100
    job.finishes(0)


def test_a_failure_that_is_answered_before_it_happened(job, clock):
    """By the clock, that is: the picture was bad, the clock went back, the picture is good."""
    picture = (job.images / "p001.png").read_bytes()
    (job.images / "p001.png").write_bytes(b"bad")
    assert "failed=1" in job().out
    clock(-3e8)
    (job.images / "p001.png").write_bytes(picture)
    job.finishes(1)
    assert torch.isfinite(torch.tensor(numbers(job.root).to_numpy())).all()
