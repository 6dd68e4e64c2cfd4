"""What goes wrong on a cluster, fault by fault: nothing computed is lost, and the same command goes on.

In this process, or in a fork of it that is killed: a new Python would spend seconds on its imports. What happens to
whole processes at random moments is in test_resume.py and test_interrupt_run.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import tiny_methods
import torch
from mmengine.hooks import Hook
from tiny import command, only_cell, pictures, quickly

from attrib.process import exit_status
from attrib.results import tables

COMMON = ("dataset=tiny", "model=small_cnn", "method=eventful", "metric=[ehr]", "run.progress=false", "run.batch=2")


def numbers(root: Path) -> pd.Series:
    frame = tables.rows(root)
    assert not frame.duplicated(["metric", "map", "column", "uid"]).any()
    return frame.set_index(["metric", "map", "column", "uid"])["value"].sort_index()


@pytest.fixture(scope="module")
def undisturbed() -> list[pd.Series]:
    """The table of a run to which nothing happened, once there was one."""
    return []


class Job:
    """tools/run.py on six small pictures, in the folder ``root``."""

    def __init__(self, capfd, folder: Path, undisturbed: list[pd.Series]) -> None:
        self._call, self._undisturbed = quickly(capfd), undisturbed
        self.folder, self.root, self.images = folder, folder / "work", pictures(folder)

    def __call__(self, *arguments: str, root: Path | None = None):
        roots = (f"dataset.root={self.images}", f"run.root={root or self.root}")
        return self._call(*COMMON, *roots, "run.flush=0", *arguments)

    @property
    def stored(self) -> int:
        return len(only_cell(self.root).maps.index())

    def finishes(self, computed: int, failed: int = 0) -> str:
        """The same command computes what is missing, and the table is that of a run to which nothing happened."""
        tiny_methods.during = len
        last = self()
        assert last.status == 0, last.err
        assert f"maps_computed={computed} maps_present={6 - computed} " in last.out
        assert f"failed={failed}" in last.out
        if not self._undisturbed:
            assert self(root=self.folder / "whole").status == 0
            self._undisturbed.append(numbers(self.folder / "whole"))
        pd.testing.assert_series_equal(numbers(self.root), self._undisturbed[0])
        assert "maps_computed=0 maps_present=6 scores_computed=0 scores_present=6 failed=0" in self().out
        return last.err


@pytest.fixture
def job(capfd, tmp_path, undisturbed) -> Job:
    return Job(capfd, tmp_path, undisturbed)


@pytest.fixture
def during(monkeypatch):
    """What happens in the batch that holds a sample."""

    def set_up(uid: str, what: Callable[[], object]) -> None:
        monkeypatch.setattr(tiny_methods, "during", lambda batch: what() if uid in batch.uids else None)

    return set_up


def forked(work: Callable[[], object], *, meanwhile: Callable[[int], object] = lambda _: None) -> int:
    """``work`` in a child of this process, whose number ``meanwhile`` gets; how it ended, as os.waitstatus says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of the threads of this process
        child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        torch.set_num_threads(1)  # the threads of this process are not there
        status = 1
        with contextlib.suppress(BaseException):
            status = work().status
        os._exit(status)
    meanwhile(child)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_self(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


WRITTEN = 0.3  # seconds after which the thread that writes the batch before has written it


def wait_for(seen: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not seen() and time.monotonic() < deadline:
        time.sleep(0.01)


# ---- processes that die -----------------------------------------------------------------------------


def test_sigkill(job, during):
    """It loses the batch in work, what was not flushed (run.flush) and the file being written, and nothing else."""
    during("p004", lambda: [time.sleep(WRITTEN), kill_self()])
    assert forked(job) == -signal.SIGKILL
    assert job.stored == 4
    job.finishes(2)


def test_killed_between_writing_and_renaming(job, during, monkeypatch):
    """A half-written file has a name of its own, which no reader takes for a chunk."""
    replace = os.replace

    def killed(source, target) -> None:
        if str(target).endswith("00002.safetensors") and "maps" in str(target):
            Path(source).write_bytes(Path(source).read_bytes()[:100])
            kill_self()
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    assert forked(job) == -signal.SIGKILL
    monkeypatch.undo()
    (left,) = only_cell(job.root).folder.glob("maps/.*.tmp")
    assert left.stat().st_size == 100
    assert job.stored == 2
    job.finishes(4)
    assert not left.exists()


def test_node_down(job, during):
    """The whole process group goes at once, readers and all."""
    during("p002", lambda: [(job.root / "here").touch(), time.sleep(30)])

    def power_cut(child: int) -> None:
        wait_for((job.root / "here").exists)
        time.sleep(WRITTEN)
        os.killpg(child, signal.SIGKILL)

    assert forked(job, meanwhile=power_cut) == -signal.SIGKILL
    (only_cell(job.root).folder / "maps" / ".x-00009.safetensors.1-0123abcd.tmp").write_bytes(b"half")
    (only_cell(job.root).folder / "failures").mkdir()
    (only_cell(job.root).folder / "failures" / "x.jsonl").write_text('{"uid": "p0')
    assert job.stored == 2
    job.finishes(4)


def test_out_of_memory_kill(job, during):
    """The kernel sends SIGKILL, so this is the test of that: to the process that dies there is no difference.

    An allocation that is *refused* costs no more than a smaller batch: test_memory_plan.py.
    """
    during("p000", kill_self)
    assert forked(lambda: job("run.batch=6")) == -signal.SIGKILL
    assert job.stored == 0
    job.finishes(6)


def test_preemption(job, during):
    """SIGTERM, and SIGKILL before the grace is over: what was finished before is there."""
    during("p004", lambda: [(job.root / "here").touch(), time.sleep(30)])

    def preempt(child: int) -> None:
        wait_for((job.root / "here").exists)
        os.kill(child, signal.SIGTERM)
        time.sleep(WRITTEN)
        os.kill(child, signal.SIGKILL)

    assert forked(lambda: job("run.grace=20"), meanwhile=preempt) == -signal.SIGKILL
    assert job.stored == 4
    job.finishes(2)


def test_timeout(job, during):
    """A signal some time before the end (sbatch --signal=USR1@90) leaves time to finish the batch: 75."""
    during("p004", lambda: [(job.root / "here").touch(), time.sleep(0.5)])

    def warn(child: int) -> None:
        wait_for((job.root / "here").exists)
        os.kill(child, signal.SIGUSR1)

    assert forked(lambda: job("run.flush=1000"), meanwhile=warn) == 75
    assert job.stored == 6
    job.finishes(0)


# ---- disks --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(folder: Path, *options: str):
    """Something mounted at ``folder``, where that is allowed (root, outside most containers)."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk(job):
    """A real one, of 400 kB: what did not fit is counted and named, and with room again the same command goes on."""
    with mounted(job.root, "-t", "tmpfs", "-o", "size=400k", "none"):
        ballast = job.root / "ballast"
        hook = f"run.hooks=[{{_target_: test_faults.Fill, path: {ballast}}}]"
        result = job(hook)
        assert result.status == 2
        assert "Traceback" not in result.err
        assert "No space left on device" in result.err
        assert str(only_cell(job.root).folder) in result.err
        lost = int(re.search(r"(\d+) maps and scores that were computed could not be written", result.err)[1])
        assert lost in (2, 4)
        assert job.stored in (0, 2)  # depends on how fast the thread is that writes the first
        assert not list(only_cell(job.root).folder.glob("maps/.*.tmp"))
        ballast.unlink()
        job.finishes(6 - job.stored)


class Fill(Hook):
    """Somebody else fills the disk after the first batch."""

    def __init__(self, path: str) -> None:
        self.path = path

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if batch_idx == 1:
            with contextlib.suppress(OSError), open(self.path, "wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 512)


def test_a_quota(job):
    """The same where nothing can be mounted: no file may be larger than 60 kB, and six maps of 96 x 96 are."""

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does when it starts
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        return job("run.batch=6", "run.flush=1000", "model.input.size=96")

    assert forked(limited) == 2
    assert job.stored == 0
    assert "maps_computed=6" in job("model.input.size=96").out


def test_read_only(job):
    """The message names the folder; nothing is computed in vain."""
    assert job("run.limit=2").status == 0
    calls = []
    with mounted(job.root, "--bind", str(job.root)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(job.root)], check=True)
        tiny_methods.during = lambda batch: calls.append(len(batch))
        result = job()
    assert result.status == 2
    assert "Read-only file system" in result.err
    assert str(job.root) in result.err
    assert "Traceback" not in result.err
    assert not calls
    job.finishes(4)


def test_no_folder_at_all(job):
    """As root, whom permissions do not stop, too."""
    job.root.write_text("a file is in the way")
    result = job()
    assert result.status == 2
    assert str(job.root) in result.err
    assert "Traceback" not in result.err
    job.root.unlink()
    job.finishes(6)


def test_a_picture_that_is_replaced_and_put_back_leaves_no_map_of_the_other(job, during):
    path = job.images / "p005.png"
    own, other = path.read_bytes(), (job.images / "p000.png").read_bytes()
    during("p000", lambda: path.write_bytes(other))
    first = job("run.batch=1")
    assert "maps_computed=5 " in first.out
    (entry,) = only_cell(job.root).ledger.entries()
    assert "p005.png: changed while this process was at work" in entry["reason"]
    path.write_bytes(own)
    job.finishes(1)


@pytest.mark.parametrize("what", ["root", "cell"])
@pytest.mark.parametrize("uid", ["p000", "p005"])
def test_a_folder_that_is_deleted_under_a_run_ends_it_and_is_not_half_written(job, during, what, uid):
    def delete() -> None:
        if uid == "p005":
            wait_for(lambda: job.stored == 4)  # a chunk that is written meanwhile would be what rmtree fails at
        shutil.rmtree(job.root if what == "root" else only_cell(job.root).folder)

    during(uid, delete)
    found = job("run.png=true")
    assert found.status == exit_status.GONE
    assert "was deleted" in found.err
    assert not list(job.root.glob("*/maps/*")), "maps without a description of what they are"
    assert not list(job.root.glob("tiny.*"))
    job.finishes(6)


def test_names_that_are_not_utf_8(job, capfd):
    """Of a sample, of the data's folder and of the work directory."""
    odd = job.folder / os.fsdecode(b"\xe9t\xe9")
    shutil.copytree(job.images.parent, odd, ignore=shutil.ignore_patterns("work", "whole", os.path.basename(odd)))
    os.rename(odd / "images" / "p002.png", odd / "images" / os.fsdecode(b"p\xff2.png"))
    for name in ("labels.csv", "boxes.csv"):
        table = odd / name
        table.write_bytes(table.read_bytes().replace(b"p002.png", b"p\xff2.png"))
    work = odd / "work"
    words = (*COMMON, "run.png=true", f"dataset.root='{odd / 'images'}'", f"run.root='{work}'")
    assert command(capfd)(*words).status == 0
    again = command(capfd)(*words)
    assert "maps_computed=0 maps_present=6 scores_computed=0 scores_present=6 failed=0" in again.out
    broken: list[str] = []
    assert len(tables.rows(work, broken)) == 6
    assert not broken
    assert "p\\xff2" in set(tables.rows(work)["uid"])


def test_two_identical_jobs_share_the_work(job, during, monkeypatch):
    """One that begins while another is at work walks in another order, and does not do what is done."""
    monkeypatch.setattr(tiny_methods, "during", lambda batch: time.sleep(0.4))
    statuses = []
    first = threading.Thread(target=lambda: statuses.append(forked(lambda: job("run.batch=1"))))
    first.start()
    statuses.append(forked(lambda: job("run.batch=1")))
    first.join()
    assert statuses == [0, 0]
    assert 6 <= len(list(only_cell(job.root).folder.glob("maps/*.safetensors"))) < 12  # alone each would do six
    job.finishes(0)
