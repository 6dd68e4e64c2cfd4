"""Arrays on a real Slurm that are preempted, timed out, killed and cancelled: nothing lost, nothing twice.

`make test-slurm` runs this (tests/slurm/run.sh); pytest does not find it by itself.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from attrib.results import tables
from attrib.store.cell import Cell, cells

ROOT = Path(__file__).parent.parent.parent
SAMPLES, TASKS = 400, 4
PYTHON, TOOL = sys.executable, str(Path(os.environ.get("X_TOOL", ROOT / "tools" / "run.py")))
PATHS = [*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT / "tests")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS)}
RESOURCES = [
    *("hydra.launcher.partition=low", "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1"),
    *("hydra.launcher.mem_gb=2", "hydra.launcher.timeout_min=30", "hydra.launcher.signal_delay_s=10"),
]

sys.path.insert(0, str(ROOT / "tests"))
from tiny import pictures  # noqa: E402


def slurm(*command: str) -> str:
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A working directory as a user's: images, a method of their own beside it, and its preset."""
    folder = tmp_path_factory.mktemp("user")
    pictures(folder, SAMPLES)
    shutil.copytree(ROOT / "tests" / "configs", folder / "presets")
    (folder / "presets" / "method" / "slow.yaml").write_text("name: slow\n_target_: slow_method.Slow\n")
    shutil.copy(Path(__file__).parent / "slow_method.py", folder)
    return folder


def command(here: Path, root: str, *more: str) -> list[str]:
    flags, overrides = [a for a in more if a == "-m"], [a for a in more if a != "-m"]
    return [
        *(PYTHON, TOOL, *flags, "--config-dir", "presets", "dataset=tiny", f"dataset.root={here / 'images'}"),
        *("model=small_cnn", "method=slow", "metric=[insertion_deletion]", "metric.insertion_deletion.steps=4"),
        *(f"run.root={root}", "run.batch=2", "run.flush=0", *overrides),
    ]


def pace(here: Path, seconds: float) -> None:
    """How long slow_method.Slow takes for a batch, from now on."""
    (here / "new").write_text(str(seconds))
    (here / "new").rename(here / "pace")


def start(here: Path, arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        arguments, cwd=here, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(process: subprocess.Popen, status: int = 0) -> str:
    out, _ = process.communicate(timeout=240)
    print(out)
    assert process.returncode == status, out
    return out


def until(true: Callable[[], object], what: str, seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what}: not within {seconds} s\n{slurm('scontrol', 'show', 'job', '-o')}"
        time.sleep(0.2)


def jobs(array: str) -> dict[int, dict[str, str]]:
    """What Slurm says of each task of an array."""
    found = {}
    for line in slurm("scontrol", "show", "job", "--oneliner", array).splitlines():
        said = dict(re.findall(r"(\w+)=(\S*)", line))
        if said.get("ArrayTaskId", "").isdecimal():
            found[int(said["ArrayTaskId"])] = said
    return found


def arrays(name: str = "attrib") -> set[str]:
    return set(slurm("squeue", "--noheader", "--format=%F", f"--name={name}").split())


def only(root: Path) -> Cell:
    (cell,) = cells(root)
    return cell


def of_shard(root: Path) -> Counter[int]:
    """Maps per shard, from the names of their files (``<time>-<pid>-<shard>-<random>-<n>``)."""
    return Counter(int(path.name.split("-")[3]) for path in root.glob("*/maps/*.safetensors"))


def process_of(shard: int, root: Path) -> int:
    newest = max(root.glob(f"*/runs/*-*-*-{shard}-*"), key=lambda path: path.stat().st_mtime)
    return int(newest.name.split("-")[2])


def numbers(root: Path):
    frame = tables.rows(root)
    return frame.set_index(["metric", "map", "column", "uid"])["value"].sort_index()


def same(whole: Path, parts: Path, samples: int) -> None:
    """The cell of an array is that of one process: all maps, none twice, the same table."""
    a, b = only(whole), only(parts)
    assert a.folder.name == b.folder.name
    expected, got = a.maps.index(), b.maps.index()
    assert len(got) == samples
    assert set(got) <= set(expected)
    for key in got:
        np.testing.assert_array_equal(b.maps.read(key)["map"], a.maps.read(key)["map"])
    table = numbers(parts).dropna()  # a table also has the samples beyond run.limit, without values
    assert table.index.is_unique
    assert len(table) == 3 * samples  # insertion, deletion, their difference
    np.testing.assert_array_equal(table, numbers(whole).loc[table.index])


@pytest.fixture(scope="module")
def whole(here) -> Path:
    """One process, not interrupted."""
    pace(here, 0)
    finished(start(here, command(here, "whole")))
    return here / "whole"


def test_an_array_that_is_preempted_timed_out_and_killed(here, whole):
    root = here / "array"
    line = command(here, "array", "-m", "run=slurm", f"run.shard=range({TASKS})", *RESOURCES)
    before = arrays()
    pace(here, 2)
    submitted = start(here, line)
    until(lambda: arrays() - before, "the array is submitted")
    (array,) = arrays() - before
    until(lambda: len(of_shard(root)) == TASKS, "every task has stored a map")

    slurm("sbatch", "--partition=high", "--mem=100", "--output=/dev/null", "--wrap", "sleep 1")
    until(lambda: any(j["Restarts"] == "1" for j in jobs(array).values()), "a task is preempted and requeued")
    (preempted,) = (task for task, j in jobs(array).items() if j["Restarts"] == "1")
    victim, late, _ = (task for task in range(TASKS) if task != preempted)
    process = process_of(victim, root)
    assert f"SLURM_ARRAY_TASK_ID={victim}\0" in Path(f"/proc/{process}/environ").read_text()
    kept = len(only(root).maps.index())
    os.kill(process, signal.SIGKILL)
    slurm("scontrol", "update", f"JobId={array}_{late}", "EndTime=now+40seconds")
    until(lambda: jobs(array)[late]["Restarts"] == "1", "a task is out of time and requeued")
    slurm("scontrol", "update", f"JobId={array}_{late}", "TimeLimit=30")
    pace(here, 0)

    out = finished(submitted, 1)
    assert "3 done" in out
    assert "1 killed, cancelled or unable to start" in out
    assert f"{array}_{victim}: killed" in out
    found = jobs(array)
    assert [found[task]["JobState"] for task in (preempted, late, victim)] == ["COMPLETED", "COMPLETED", "FAILED"]
    assert found[victim]["Restarts"] == "0"
    logs = {task: (root / ".submitit" / array / f"{array}_{task}_0_log.out").read_text() for task in found}
    assert "stopped by SIGTERM" in logs[preempted]
    assert "stopped by SIGUSR2" in logs[late]
    assert kept < len(only(root).maps.index()) < SAMPLES
    assert {path.name for path in here.iterdir()} <= {
        *("images", "labels.csv", "boxes.csv", "presets", "slow_method.py", "__pycache__", "pace", "whole", "array"),
    }  # nothing is left in the working directory

    out = finished(start(here, line))
    assert f"{SAMPLES} maps, {SAMPLES} scores, 0 left, 0 failed" in out
    same(whole, root, SAMPLES)


def test_the_printed_script(here, whole):
    """A task is told to stop, as by its time limit, and goes on; one is preempted, and goes on; one is cancelled."""
    root, limit = here / "plain", 90
    line = command(here, "plain", "-m", "run=slurm", "run.shard=range(3)", f"run.limit={limit}", *RESOURCES)
    pace(here, 2)
    printed = subprocess.run([*line, "run.dry=true"], cwd=here, env=ENVIRONMENT, check=True, stdout=subprocess.PIPE)
    (here / "script.sh").write_bytes(printed.stdout)
    text = subprocess.run(["sbatch", "script.sh"], cwd=here, env=ENVIRONMENT, check=True, stdout=subprocess.PIPE)
    array = text.stdout.decode().split()[-1]
    until(lambda: len(of_shard(root)) == 3, "every task has stored a map")
    slurm("scancel", "--signal=USR1", f"{array}_0")
    slurm("scancel", f"{array}_1")
    until(lambda: jobs(array)[0]["Restarts"] == "1", "a task was told to stop, and is requeued")
    slurm(
        "sbatch",
        "--partition=high",
        "--mem=100",
        "--nodes=2",
        "--ntasks-per-node=2",
        "--output=/dev/null",
        "--wrap",
        "sleep 1",
    )
    until(lambda: jobs(array)[2]["Restarts"] == "1", "a task is preempted, and is requeued")
    pace(here, 0)
    until(lambda: not slurm("squeue", "--noheader", f"--jobs={array}").strip(), "the array ends")
    found = jobs(array)
    assert [found[task]["JobState"] for task in (0, 1, 2)] == ["COMPLETED", "CANCELLED", "COMPLETED"]
    assert found[1]["Restarts"] == "0"
    logs = {task: (root / ".slurm" / f"{array}_{task}.log").read_text() for task in found}
    assert "stopped by SIGUSR1" in logs[0]
    assert "stopped by SIGTERM" in logs[2]
    finished(start(here, command(here, "plain", f"run.limit={limit}")))
    same(whole, root, limit)
