"""Submitting, waiting, how the tasks ended, and what runs in one: with stand-ins for sbatch, squeue and scontrol."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny import ROOT, command

from attrib.cli.run import compute_task
from attrib.cluster import slurm, submission
from attrib.cluster.submission import Task
from attrib.process.signals import LEFT, watching
from attrib.running.summary import Summary
from attrib.types import UserError

pytest.importorskip("submitit")

from attrib.cluster import task as in_task


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts a shell script into PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, text: str) -> None:
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\ncd {tmp_path}\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    return make


def tasks(folder: Path, *statuses: int | None) -> list[Task]:
    """Tasks that ended so; None: killed."""
    made = []
    for i, status in enumerate(statuses):
        made.append(Task(f"7_{i}", folder / f"7_{i}_status.json", folder / f"7_{i}.log"))
        if status is not None:
            summary = {
                "maps_computed": 10,
                "maps_present": 2,
                "left": 3 if status == LEFT else 0,
                "failed": status == 3,
            }
            made[-1].file.write_text(json.dumps({"status": status, "summary": summary, "said": f"status {status}"}))
    return made


# ---- waiting ----


def test_what_slurm_still_has(stand_in, tmp_path):
    stand_in("squeue", 'echo "$@" >asked; printf "RUNNING\\nPENDING\\nRUNNING\\n"')
    assert submission.count_states("7") == Counter(RUNNING=2, PENDING=1)
    assert "--jobs=7" in (tmp_path / "asked").read_text()
    stand_in("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert submission.count_states("7") == Counter()
    stand_in("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert submission.count_states("7") is None


def test_waiting_ends_when_slurm_has_no_task_any_more(stand_in, tmp_path, capfd):
    answers = ["echo PENDING", "echo RUNNING", "exit 1", "echo RUNNING", "true"]
    stand_in("squeue", 'n=$(ls | grep -c turn); touch turn$n; case $n in\n' + "".join(
        f"{i}) {answer};;\n" for i, answer in enumerate(answers)) + "esac")  # fmt: skip
    submission.wait("7", shortest=0.01)
    lines = [line.split(" ", 1)[1] for line in capfd.readouterr().out.splitlines()]
    assert lines == ["1 pending", "1 running", "Slurm does not answer", "1 running"]
    assert len(list(tmp_path.glob("turn*"))) == 5


# ---- how it ended ----


def test_a_file_that_comes_late_is_waited_for(tmp_path):
    first, second, _ = made = tasks(tmp_path, None, 0, None)
    late = {"status": 3, "summary": {}, "said": "it failed"}
    threading.Timer(0.3, lambda: first.file.write_text(json.dumps(late))).start()
    found = submission.read_outcomes(made, 1.0)
    assert found[0] == late
    assert found[1]["status"] == 0
    assert found[2] is None
    second.file.unlink()
    first.file.unlink()
    start = time.monotonic()
    assert submission.read_outcomes(made * 20, 0.2) == [None] * 60
    assert time.monotonic() - start < 5  # all are waited for together


def outcome(folder: Path, *statuses: int | None) -> tuple[str, int]:
    made = tasks(folder, *statuses)
    found = submission.read_outcomes(made, 0.2)
    return submission.describe(made, found), submission.worst_status(found)


def test_all_done(tmp_path):
    text, status = outcome(tmp_path, 0, 0, 0)
    assert text.splitlines() == ["36 maps, 0 scores, 0 left, 0 failed", "tasks: 3 done"]
    assert status == 0


def test_a_killed_task_is_named_with_its_log(tmp_path):
    text, status = outcome(tmp_path, 0, None, LEFT)
    assert "24 maps, 0 scores, 3 left, 0 failed (without what 1 killed task did)" in text
    assert "1 killed, cancelled or unable to start" in text
    assert f"7_1: killed; {tmp_path / '7_1.log'}" in text
    assert "7_2: status 75" in text
    assert text.endswith("the same command computes what is missing")
    assert status == 1


@pytest.mark.parametrize(
    ("statuses", "worst"),
    [((0, LEFT), LEFT), ((0, 3, LEFT), 3), ((3, None), 1), ((1, 3), 1), ((2, None, 0), 2), ((0, 99), 1)],
)
def test_the_worst_status_is_the_grids(tmp_path, statuses, worst):
    assert outcome(tmp_path, *statuses)[1] == worst


def test_many_failures_are_not_all_listed(tmp_path):
    text, _ = outcome(tmp_path, *[3] * 15)
    assert text.count(": status 3;") == 10
    assert "and 5 more" in text


# ---- submitting ----


def test_without_the_extra_or_slurm(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs submitit: pip install 'attrib\[slurm\]'"):
        submission.check()
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no sbatch"):
        submission.check()


LINE = ("-m", "dataset=tiny", "dataset.root=x", "model=small_cnn", "run=slurm", "run.shard=range(3)")


def test_the_tool_submits_one_array_and_reads_how_it_ended(stand_in, tmp_path, monkeypatch, capfd):
    stand_in("srun", "true")
    stand_in("sbatch", 'cp "$1" script; echo Submitted batch job 7')
    write = 'for i in 0 1 2; do echo "{\\"status\\": $((i == 2 ? 75 : 0)), \\"summary\\": {}, \\"said\\": \\"told\\"}"'
    stand_in("squeue", f"{write} >work/.submitit/7/7_${{i}}_status.json; done")
    result = command(capfd)(*LINE, f"run.root={tmp_path / 'work'}")
    assert result.status == LEFT, result.err
    assert "submitted 3 tasks, job 7; logs: " in result.out
    assert "scancel 7" in result.out
    assert "tasks: 2 done, 1 stopped with work left" in result.out
    script = (tmp_path / "script").read_text()
    assert "#SBATCH --array=0-2%3" in script
    assert "#SBATCH --requeue" in script
    assert "#SBATCH --signal=USR2@120" in script
    assert "export OMP_NUM_THREADS=$SLURM_CPUS_ON_NODE" in script
    assert re.search(r"requeue .\$task. ;;\nesac\nexit \$status", script)
    subprocess.run(["bash", "-n", "script"], cwd=tmp_path, check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "script", "work"}
    with (tmp_path / "work" / ".submitit" / "7" / "7_1_submitted.pkl").open("rb") as file:
        work = pickle.load(file)
    assert work.function == in_task.Computation(compute_task)
    assert (work.args[0][-2:], work.args[1]) == (["run.shards=3", "run.shard=1"], ROOT / "tests" / "configs")
    assert work._timeout_countdown == 1000


def test_what_slurm_refuses_is_said(stand_in, tmp_path, monkeypatch, capfd):
    stand_in("srun", "true")
    stand_in("squeue", "true")
    stand_in("sbatch", "echo 'sbatch: error: invalid partition specified: nope' >&2; exit 1")
    result = command(capfd)(*LINE, f"run.root={tmp_path / 'work'}")
    assert (result.status, result.out) == (2, "")
    assert "error: run=slurm: nothing was submitted: sbatch: error: invalid partition" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("given", ["timeout_min=null", "timeout_min=soon", "mem_gb=much", "+no_such=1"])
def test_what_submitit_cannot_use_is_said(stand_in, tmp_path, monkeypatch, capfd, given):
    for name in ("srun", "squeue", "sbatch"):
        stand_in(name, "touch called")
    override = f"+hydra.launcher.{given[1:]}" if given.startswith("+") else f"hydra.launcher.{given}"
    result = command(capfd)(*LINE, f"run.root={tmp_path / 'work'}", override)
    assert result.status == 2
    assert "error: " in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "called").exists()


def test_a_grid_is_one_array(stand_in, tmp_path):
    stand_in("srun", "true")
    stand_in("sbatch", 'grep array= "$1" >>arrays; echo Submitted batch job 7')
    launcher = {"submitit_folder": str(tmp_path / "logs" / "%A"), "timeout_min": 5, "max_num_timeout": 2,
                "array_parallelism": None}  # fmt: skip
    grid = slurm.Grid((("method=iba",), ("method=random",)), 8, (1, 3), False, None, launcher, "work")
    made = submission.submit_array(grid, compute)
    assert [task.id for task in made] == ["7_0", "7_1", "7_2", "7_3"]
    assert (tmp_path / "arrays").read_text() == "#SBATCH --array=0-3%4\n"
    given = [pickle.loads((tmp_path / "logs" / "7" / f"{task.id}_submitted.pkl").read_bytes()).args for task in made]
    assert given == [
        ([method, "run.shards=8", shard], None)
        for method in ("method=iba", "method=random")
        for shard in ("run.shard=1", "run.shard=3")
    ]


def test_ctrl_c_leaves_the_tasks_to_slurm(stand_in, monkeypatch, tmp_path, capfd):
    for name, text in {"squeue": "echo RUNNING", "sbatch": "true", "srun": "true"}.items():
        stand_in(name, text)

    def submit_array(*_: object) -> list[Task]:
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        return tasks(tmp_path, 0)

    monkeypatch.setattr(submission, "submit_array", submit_array)
    grid = slurm.Grid(((),), 1, (0,), False, None, {}, "work")
    start = time.monotonic()
    with watching() as stop, stop.immediately():
        assert submission.submit(grid, compute, stop) == LEFT
    assert time.monotonic() - start < 10
    assert "the tasks go on in Slurm. To stop them: scancel 7" in capfd.readouterr().out


# ---- in a task ----


def compute(overrides: Sequence[str], folder: Path | None) -> tuple[int, Summary | None, str]:
    """Stands in for a cell: does what the first of the overrides says."""
    match overrides[0]:
        case "done":
            return 0, Summary(maps_computed=4), "fine"
        case "error":
            raise UserError("no such file")
        case "bug":
            raise RuntimeError("a bug")
    with watching() as stop:  # works until it is told to stop
        print("working", flush=True)
        while not stop():
            time.sleep(0.01)
    return LEFT, None, f"stopped by {stop.name}"


ABOUT = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.mark.parametrize(
    ("what", "status", "said", "maps"),
    [("done", 0, "fine", 4), ("error", 2, "error: no such file", None), ("bug", 1, "RuntimeError: a bug", None)],
)
def test_a_task_leaves_how_it_ended(monkeypatch, tmp_path, capfd, what, status, said, maps):
    for name, value in (ABOUT | {"SUBMITIT_FOLDER": str(tmp_path / "%A")}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(in_task, "exit_process", sys.exit)  # which ignores signals from then on
    file = tmp_path / "7" / "7_3_status.json"
    file.parent.mkdir()
    file.write_text("of a run before")
    with pytest.raises(SystemExit) as end:
        in_task.Computation(compute)([what], None)
    assert end.value.code == status
    found = json.loads(file.read_text())
    assert (found["status"], found["said"], found["summary"].get("maps_computed")) == (status, said, maps)
    assert ("Traceback" in capfd.readouterr().err) == (what == "bug")


@pytest.mark.parametrize(
    ("number", "requeues", "status", "requeued", "said"),
    [
        (signal.SIGTERM, 3, LEFT, False, "stopped by SIGTERM"),  # the script's last lines requeue it
        (signal.SIGUSR2, 3, 255, True, None),  # submitit does
        (signal.SIGUSR2, 0, 1, False, "UncompletedJobError: Job not requeued because: timed-out too many times."),
    ],
)
@pytest.mark.quick(every=3)
def test_a_task_that_is_told_to_stop(stand_in, tmp_path, number, requeues, status, requeued, said):
    """A process as Slurm starts it."""
    from submitit.core.utils import DelayedSubmission

    stand_in("scontrol", 'echo "$@" >asked')
    folder = tmp_path / "7"
    folder.mkdir()
    work = DelayedSubmission(in_task.Computation(compute), ["wait"], None)
    work.set_timeout(5, requeues)  # of so short a limit submitit takes any signal as its end
    work.dump(folder / "7_3_submitted.pkl")
    paths = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "submitit.core._submit", str(tmp_path / "%A")],
        env={**os.environ, **ABOUT, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line == "working\n":
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, out + err
    assert (tmp_path / "asked").exists() == requeued
    if requeued:
        assert (tmp_path / "asked").read_text() == "requeue 7_3\n"
        assert DelayedSubmission.load(folder / "7_3_submitted.pkl")._timeout_countdown == requeues - 1
    file = folder / "7_3_status.json"
    assert (json.loads(file.read_text())["said"] if file.exists() else None) == said
