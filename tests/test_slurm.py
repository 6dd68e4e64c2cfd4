"""A grid for Slurm: the command line, the script (run by bash, with stand-ins for srun and scontrol), the estimate."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import ROOT, command, pictures

from attrib.cluster import slurm
from attrib.config.compose import CommandLine
from attrib.types import UserError

CONFIGS = ("--config-dir", str(ROOT / "tests" / "configs"))
TINY = ("dataset=tiny", "dataset.root=x", "model=small_cnn", "run=slurm")


def line(*arguments: str) -> CommandLine:
    return CommandLine.of([a for a in arguments if a != "-m"], ROOT / "tests" / "configs", "-m" in arguments)


def grid(*arguments: str, environment: Mapping[str, str] | None = None) -> slurm.Grid:
    found = slurm.grid(line(*arguments), environment or {})
    assert found is not None
    return found


# ---- the command line ----


def test_a_range_of_shards_says_how_many_there_are():
    assert slurm.with_shards(line("-m", "method=iba", "run.shard=range(64)")).values("run.shards") == ["64"]
    assert slurm.with_shards(line("-m", "run.shard=range(0,8)")).values("run.shards") == ["8"]


@pytest.mark.parametrize(
    "given",
    [
        ["run.shard=3", "run.shards=4"],
        ["-m", "run.shard=range(2,4)", "run.shards=8"],
        ["-m", "run.shard=0,1", "run.shards=8"],
        ["-m", "method=iba,random"],
    ],
)
def test_other_command_lines_stay_as_they_are(given):
    made = line(*given)
    assert slurm.with_shards(made) is made


@pytest.mark.parametrize("sweep", ["run.shard=0,1,2", "run.shard=range(1,4)", "run.shard=range(0,8,2)"])
def test_some_shards_need_to_say_of_how_many(sweep):
    with pytest.raises(UserError, match="of how many"):
        slurm.with_shards(line("-m", sweep))


def test_the_number_of_shards_cannot_be_swept():
    with pytest.raises(UserError, match="one number"):
        slurm.with_shards(line("-m", "run.shard=range(4)", "run.shards=4,8"))


def test_a_grid_has_cells_and_shards():
    found = grid("-m", *TINY, "method=random,gradient", "run.shard=range(3)", "run.shards=3", "run.root=w")
    assert [cell[-2:] for cell in found.cells] == [("method=random", "run.root=w"), ("method=gradient", "run.root=w")]
    assert (found.shards, found.chosen, found.tasks) == (3, (0, 1, 2), [0, 1, 2, 3, 4, 5])
    assert found.root == "w"
    assert not found.dry
    assert found.launcher["signal_delay_s"] == 120
    assert found.launcher["max_num_timeout"] >= 100
    assert grid("-m", *TINY, "run.shard=1,3", "run.shards=4", "method=random,iba").tasks == [1, 3, 5, 7]


def test_without_slurm_there_is_no_grid():
    assert slurm.grid(line("-m", "dataset=tiny", "model=small_cnn", "method=random,iba"), {}) is None
    assert slurm.grid(line("dataset=tiny", "dataset.root=x", "model=small_cnn"), {}) is None
    with pytest.raises(UserError, match="there is no dataset 'no_such_one'"):
        slurm.grid(line("-m", "dataset=no_such_one", "run=slurm"), {})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["run.shards=4"], "add -m"),
        (["-m", "run.shards=4"], r"run.shard=range\(4\)"),
        (["-m", "run.shard=4,5", "run.shards=5"], "not 5 of 5"),
        (["-m", "run.shard=a,b", "run.shards=5"], "run.shard must be int"),
        (["-m", "run.shard=range(2)", "run.shards=2", "hydra.launcher.tasks_per_node=2"], "must be 1"),
    ],
)
def test_what_slurm_cannot_do(more, message):
    with pytest.raises(UserError, match=message):
        grid(*TINY, *more)


def test_a_task_of_the_script_computes_here():
    assert slurm.grid(line(*TINY, "run.shards=4", "run.shard=1"), {"SLURM_JOB_ID": "7"}) is None


def test_ranges():
    assert slurm.ranges([5, 0, 1, 2, 7, 8]) == "0-2,5,7-8"
    assert slurm.ranges(range(64)) == "0-63"
    assert slurm.ranges([3]) == "3"


# ---- the script ----

STAND_INS = {
    "srun": 'printf "%s\\n" "$@" >>srun.txt; exit "$(cat status)"',
    "scontrol": 'echo "$@" >>scontrol.txt; [ "$1" = show ] && echo "JobId=9 JobState=$(cat state) Reason=None"; exit 0',
}


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Runs a task of the script as Slurm would; returns its exit status, srun's arguments and what scontrol got."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(text: str, task: int = 0, status: int = 0, state: str = "RUNNING") -> tuple[int, list[str], list[str]]:
        (tmp_path / "script.sh").write_text(text)
        (tmp_path / "status").write_text(str(status))
        (tmp_path / "state").write_text(state)
        for name in ("srun.txt", "scontrol.txt"):
            (tmp_path / name).write_text("")
        told = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": str(task), "SLURM_CPUS_ON_NODE": "4"}
        subprocess.run(["bash", "-n", "script.sh"], cwd=tmp_path, check=True)
        ended = subprocess.run(["bash", "script.sh"], cwd=tmp_path, env={**os.environ, **told}, stderr=subprocess.PIPE)
        assert not ended.stderr
        return ended.returncode, *((tmp_path / n).read_text().splitlines() for n in ("srun.txt", "scontrol.txt"))

    return run


NOTE = "+run.note='it\\'s $HOME \"q\"'"


def script(*more: str) -> str:
    found = grid("-m", *TINY, "run.shard=range(3)", "run.shards=3", "run.root=a work dir", "run.dry=true", *more)
    return slurm.script(found, "/my env/python", Path("/where it is"), ["a line"])


def test_a_task_computes_its_shard_of_its_cell(sbatch, tmp_path):
    text = script("method=random,gradient", "metric=[ehr]", NOTE)
    status, arguments, asked = sbatch(text, task=4)
    assert status == 0
    assert arguments == [
        *("--unbuffered", "/my env/python", "-m", "attrib", "run", *CONFIGS, *TINY, "run.root=a work dir"),
        *("method=gradient", "metric=[ehr]", NOTE, "run.shards=3", "run.shard=1"),
    ]
    assert asked == []
    assert "task 70_4 ended with status 0" in (tmp_path / "a work dir" / ".slurm" / "70_4.log").read_text()


@pytest.mark.parametrize("status", [75, 138, 140, 143])
def test_a_task_that_was_told_to_stop_is_requeued(sbatch, status):
    ended, _, asked = sbatch(script(), task=2, status=status)
    assert ended == status
    assert asked == ["show job --oneliner 70_2", "requeue 70_2"]


@pytest.mark.parametrize(("status", "state"), [(75, "COMPLETING"), (143, "CANCELLED"), (75, "PENDING")])
def test_a_cancelled_task_stays_so(sbatch, status, state):
    ended, _, asked = sbatch(script(), status=status, state=state)
    assert ended == status
    assert asked == ["show job --oneliner 70_0"]


@pytest.mark.parametrize("status", [1, 2, 3, 137])
def test_a_failure_is_not_repeated(sbatch, status):
    assert sbatch(script(), status=status)[::2] == (status, [])


def test_what_the_job_asks_for():
    text = script("hydra.launcher.partition=a b", "hydra.launcher.mem_gb=1.5", "hydra.launcher.array_parallelism=2",
                  "+hydra.launcher.additional_parameters.mail-type=END",
                  "+hydra.launcher.additional_parameters.exclusive=true",
                  "hydra.launcher.setup=[a]")  # fmt: skip
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"--partition='a b'", "--mem=1536M", "--array=0-2%2", "--mail-type=END", "--exclusive"} <= set(options)
    assert {"--gpus-per-node=1", "--time=240", "--signal=USR1@120", "--chdir='/where it is'"} <= set(options)
    assert not any(o.startswith(("--account", "--setup", "--signal-delay")) for o in options)
    assert "\na\n" in text
    assert text.splitlines()[2] == "# a line"
    assert "--requeue" in script()


def test_a_null_leaves_an_option_to_the_cluster():
    text = script("hydra.launcher.gpus_per_node=null", "hydra.launcher.mem_gb=null", "hydra.launcher.timeout_min=null",
                  "hydra.launcher.array_parallelism=null", "hydra.launcher.setup=null")  # fmt: skip
    assert "--gpus" not in text
    assert "--mem" not in text
    assert "--time" not in text
    assert "--array=0-2\n" in text


# ---- how long ----


class Known(SimpleNamespace):
    def __str__(self) -> str:
        return "what there is"


def known(missing: int, seconds: float | None, due: int = 0, each: float | None = None) -> Known:
    uids = tuple(map(str, range(1000)))
    scored, score_seconds = {"m": set(uids[due:])}, {} if each is None else {"m": each}
    return Known(uids=uids, present=set(uids[missing:]), seconds=seconds, scored=scored, score_seconds=score_seconds)


def test_seconds_that_are_due():
    assert slurm.seconds_due(known(100, 2.0)) == 200
    assert slurm.seconds_due(known(100, 2.0, 1000, 0.5)) == 700
    assert slurm.seconds_due(known(0, None)) == 0
    assert slurm.seconds_due(known(1, None)) is None
    assert slurm.seconds_due(known(100, 2.0, 1000)) is None


def test_the_estimate_counts_gpu_hours():
    found = grid("-m", *TINY, "run.shard=range(10)", "run.shards=10", "hydra.launcher.array_parallelism=5")
    text = "\n".join(slurm.estimate(found, [known(1000, 36.0)]))
    assert "about 10.00 GPU hours: 10 tasks of about 1.0 hours, 5 at a time, 2.0 hours in all" in text
    assert "longer than" not in text
    some = grid("-m", *TINY, "run.shard=0,1", "run.shards=10", "hydra.launcher.gpus_per_node=null",
                "hydra.launcher.timeout_min=30")  # fmt: skip
    text = "\n".join(slurm.estimate(some, [known(1000, 36.0)]))
    assert "about 2.00 CPU hours: 2 tasks of about 1.0 hours, 2 at a time, 1.0 hours in all" in text
    assert "longer than its 30 minutes" in text


def test_nothing_is_guessed():
    found = grid("-m", *TINY, "run.shard=range(10)", "run.shards=10")
    assert "no time recorded yet" in slurm.estimate(found, [known(1000, 36.0), known(1, None)])[-1]


# ---- the command ----


def test_the_tool_prints_a_script(monkeypatch, capfd, tmp_path):
    run = command(capfd)
    where = (f"dataset.root={pictures(tmp_path)}", "dataset=tiny", "model=small_cnn", "method=random", "metric=[]")
    root = f"run.root={tmp_path / 'work'}"
    shards = ("-m", "run=slurm", "run.shard=range(2)", "run.dry=true")
    first = run(*where, root, *shards)
    assert first.status == 0, first.err
    assert "6 samples, 0 maps present, 6 to compute" in first.out
    assert "no time recorded yet" in first.out
    assert not (tmp_path / "work").exists()
    assert run(*where, root, "run.limit=3", "run.progress=false").status == 0
    second = run(*where, root, *shards)
    assert "GPU hours: 2 tasks" in second.out
    assert "run.shards=2 run.shard=$((SLURM_ARRAY_TASK_ID % 2))" in second.out


def test_the_tool_says_what_is_wrong(monkeypatch, capfd, tmp_path):
    run = command(capfd)
    result = run("dataset=tiny", "dataset.root=x", "model=small_cnn", "run=slurm")
    assert (result.status, result.err) == (
        2,
        "error: run=slurm submits an array: add -m and 'run.shard=range(N)', or run.dry=true to see a script\n",
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run("-m", "dataset=tiny", "dataset.root=x", "model=small_cnn", "run=slurm", "run.shard=range(2)")
    assert result.status == 2
    assert "this machine has no sbatch" in result.err
