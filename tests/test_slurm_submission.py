"""Submitting, waiting and reading how the tasks ended: with stand-ins for sbatch and squeue."""

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
from pathlib import Path

import pytest
from tiny import command, tool

from attrib.cluster import submission
from attrib.cluster.submission import Task
from attrib.process.signals import LEFT, watching
from attrib.running.loop import Summary
from attrib.types import UserError

pytest.importorskip("submitit")


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
    assert submission.queued(["7", "9"]) == Counter(RUNNING=2, PENDING=1)
    assert "--jobs=7,9" in (tmp_path / "asked").read_text()
    stand_in("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert submission.queued(["7"]) == Counter()
    stand_in("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert submission.queued(["7"]) is None


def test_waiting_ends_when_slurm_has_no_task_any_more(stand_in, tmp_path, capfd):
    answers = ["echo PENDING", "echo RUNNING", "exit 1", "echo RUNNING", "true"]
    stand_in("squeue", 'n=$(ls | grep -c turn); touch turn$n; case $n in\n' + "".join(
        f"{i}) {answer};;\n" for i, answer in enumerate(answers)) + "esac")  # fmt: skip
    submission.wait(["7"], shortest=0.01)
    lines = [line.split(" ", 1)[1] for line in capfd.readouterr().out.splitlines()]
    assert lines == ["1 pending", "1 running", "Slurm does not answer", "1 running"]
    assert len(list(tmp_path.glob("turn*"))) == 5


# ---- how it ended ----


def test_a_file_that_comes_late_is_waited_for(tmp_path):
    first, second, _ = made = tasks(tmp_path, None, 0, None)
    threading.Timer(0.3, lambda: first.file.write_text('{"status": 3}')).start()
    found = submission.ended(made, 1.0)
    assert found[0] == {"status": 3}
    assert found[1]["status"] == 0
    assert found[2] is None
    second.file.unlink()
    first.file.unlink()
    start = time.monotonic()
    assert submission.ended(made * 20, 0.2) == [None] * 60
    assert time.monotonic() - start < 5  # all are waited for together


def outcome(folder: Path, *statuses: int | None) -> tuple[str, int]:
    made = tasks(folder, *statuses)
    found = submission.ended(made, 0.2)
    return submission.said(made, found), submission.worst(found)


def test_all_done(tmp_path):
    text, status = outcome(tmp_path, 0, 0, 0)
    assert text.splitlines() == ["36 maps, 0 scores, 0 left, 0 failed", "tasks: 3 done"]
    assert status == 0


def test_a_killed_task_is_named_with_its_log(tmp_path):
    text, status = outcome(tmp_path, 0, None, LEFT)
    assert "24 maps, 0 scores, 3 left, 0 failed, and a killed task's" in text
    assert "1 ended without a word" in text
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
    with pytest.raises(UserError, match=r"pip install 'attrib\[slurm\]'"):
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
        overrides = pickle.load(file).args[0]
    assert {"run.shard=1", "run.shards=3"} <= set(overrides)


def test_what_slurm_refuses_is_said(stand_in, tmp_path, monkeypatch, capfd):
    stand_in("srun", "true")
    stand_in("squeue", "true")
    stand_in("sbatch", "echo 'sbatch: error: invalid partition specified: nope' >&2; exit 1")
    result = command(capfd)(*LINE, f"run.root={tmp_path / 'work'}")
    assert (result.status, result.out) == (2, "")
    assert "error: run=slurm: nothing was submitted: sbatch: error: invalid partition" in result.err
    assert "Traceback" not in result.err


def test_ctrl_c_leaves_the_tasks_to_slurm(stand_in, monkeypatch, tmp_path, capfd):
    stand_in("squeue", "echo RUNNING")
    made = tasks(tmp_path, 0)

    def launch() -> None:
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        collected.extend(made)

    collected: list[Task] = []
    monkeypatch.setattr(submission, "collected", lambda: watched(collected))
    start = time.monotonic()
    with watching() as stop, stop.at_once():
        assert submission.submit(launch, "work", stop) == LEFT
    assert time.monotonic() - start < 10
    assert "the tasks go on in Slurm. To stop them: scancel 7" in capfd.readouterr().out


class watched:  # noqa: N801
    """``collected`` with tasks that are known."""

    def __init__(self, made: list[Task]) -> None:
        self.made = made

    def __enter__(self) -> list[Task]:
        return self.made

    def __exit__(self, *_: object) -> None:
        pass


# ---- in a task ----


@pytest.fixture
def task(monkeypatch, tmp_path) -> Path:
    about = {"SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": str(tmp_path / "%A"), "SLURM_JOB_ID": "12",
             "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}  # fmt: skip
    for name, value in about.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "7" / "7_3_status.json"


def test_a_task_says_how_it_ended(task):
    assert submission.in_task()
    submission.begin()
    submission.hand_in(0, Summary(maps_computed=4), "fine")
    found = json.loads(task.read_text())
    assert (found["status"], found["said"], found["summary"]["maps_computed"]) == (0, "fine", 4)
    with pytest.raises(SystemExit) as end:
        submission.hand_in(LEFT, None, "stopped")
    assert end.value.code == LEFT
    assert json.loads(task.read_text()) == {"status": LEFT, "summary": {}, "said": "stopped"}
    submission.begin()  # it starts again, and may be killed this time
    assert not task.exists()


def test_an_unexpected_error_is_told_as_well(task, monkeypatch, capfd):
    run = tool("run")

    def fails(config: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(run, "_cell", fails)
    monkeypatch.setattr(run.exit_status, "ready", lambda: None)
    monkeypatch.setattr(sys, "argv", ["run.py", "method=random"])
    with pytest.raises(SystemExit) as end:
        run.main()
    assert end.value.code == 1
    assert json.loads(task.read_text()) == {"status": 1, "summary": {}, "said": "RuntimeError: a bug"}
    assert "Traceback" in capfd.readouterr().err


def test_elsewhere_it_is_no_task(monkeypatch):
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    assert not submission.in_task()
