"""Where a work directory stands: counts, workers alive and dead, and what happens beside half-written files."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from half_done import METRIC, NAME, UIDS, cell, run_folder
from tiny import command, only_cell, pictures, tool

from attrib.running import hooks
from attrib.running.hooks import Heartbeat
from attrib.running.options import Options
from attrib.store.cell import Cell
from attrib.store.temporary import identity
from attrib.store.workers import (
    DEAD,
    FAILED,
    FINISHED,
    RUNNING,
    STOPPED,
    Worker,
    clock,
    current,
    tail,
    workers,
)
from attrib.types import UserError
from attrib.upkeep.status import DONE, LEFT, WORKED_ON, Observer, Status, matches
from attrib.upkeep.status_table import duration, speed


def look(root: Path, *filters: str) -> Status:
    return Observer(root, filters).look()


def one_worker(made: Cell) -> Worker:
    (worker,) = workers(made.folder, time.time())
    return worker


# Counts ------------------------------------------------------------------------------------------


def test_done_to_do_failed(tmp_path):
    made = cell(tmp_path)
    made.ledger.add("p5", "f", "maps", "no luck")
    made.ledger.add("p6", "old", "maps", "of content that is gone")
    made.ledger.add("p7", "", "load", "cannot be read")
    made.ledger.add("p0", "f", "maps", "answered by a map")
    made.ledger.add("p3", "f", METRIC, "no region")
    made.ledger.add("p0", "f", METRIC, "answered by a score")
    made.ledger.add("stranger", "f", "maps", "not in the cell")
    (found,) = look(tmp_path).cells
    assert found.samples == 10
    maps, scores = found.stages
    assert (maps.done, maps.todo, maps.failed, maps.seconds) == (4, 4, 2, 2.0)
    # Two samples have no map to be scored, one failed, two are scored.
    assert (scores.done, scores.todo, scores.failed) == (2, 5, 1)
    assert {(f.uid, f.stage) for f in found.failures} == {("p5", "maps"), ("p7", "load"), ("p3", METRIC)}


def test_only_what_counts_is_done(tmp_path):
    made = cell(tmp_path)
    made.write_samples(("p0", "p1", "p9", "new"), {"p0": "f", "p1": "changed", "p9": "f"})
    (found,) = look(tmp_path).cells
    maps = found.stages[0]
    assert (found.samples, maps.done, maps.todo, maps.unseen) == (4, 1, 3, 1)


def test_samples_beyond_the_limit_are_not_waited_for(tmp_path):
    made = cell(tmp_path, maps=4, scores=4)
    made.write_samples([f"p{i}" for i in range(10)], {}, ("p0", "p1", "p2", "p3"))
    assert look(tmp_path).exit == LEFT  # an earlier run was asked for all ten
    (made.folder / "samples.json").unlink()
    made.write_samples([f"p{i}" for i in range(10)], {}, ("p0", "p1", "p2", "p3"))
    (found,) = look(tmp_path).cells
    assert (found.samples, *((s.done, s.todo, s.unseen) for s in found.stages)) == (4, (4, 0, 0), (4, 0, 0))
    assert look(tmp_path).exit == DONE


def test_a_cell_that_does_not_say_its_samples(tmp_path):
    cell(tmp_path, samples=None)
    status = look(tmp_path)
    assert (status.cells[0].samples, status.cells[0].stages[0].done, status.cells[0].stages[0].todo) == (None, 4, 0)


def test_scores_of_an_earlier_configuration_are_not_waited_for(tmp_path):
    made = cell(tmp_path, maps=10, scores=3)
    assert look(tmp_path).exit == LEFT
    run_folder(made, metrics=["other.bbbbbbbb"], summary={"finished": True, "left": 0, "stopped": None})
    status = look(tmp_path)
    assert {s.name: (s.todo, s.asked) for s in status.cells[0].stages[1:]} == {
        METRIC: (7, False),
        "other.bbbbbbbb": (10, True),  # asked for, though it has no folder yet
    }
    for uid in UIDS:
        rows = made.scores("other.bbbbbbbb")
        rows.add(uid, "f", {("map", "o"): 1.0})
        rows.flush()
    assert look(tmp_path).exit == DONE


def test_new_chunks_are_seen_by_the_same_observer(tmp_path):
    made = cell(tmp_path)
    observer = Observer(tmp_path)
    assert observer.look().cells[0].stages[0].done == 4
    made.maps.add("p4", "f", {"map": np.ones((2, 2))})
    made.maps.flush()
    assert observer.look().cells[0].stages[0].done == 5


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ((), True),
        (("iba",), True),
        (("input_iba",), False),
        (("ib?",), True),
        (("net.*.0*",), False),
        (("*iba*",), True),
        (("photos", "0123"), True),
        (("photos", "grad"), False),
    ],
)
def test_filters(filters, expected):
    assert matches(NAME, filters) is expected


def test_nothing_to_look_at(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        look(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no cells"):
        look(tmp_path)
    cell(tmp_path / "below")
    with pytest.raises(UserError, match="work directories: below"):
        look(tmp_path)
    with pytest.raises(UserError, match="matches grad_cam"):
        look(tmp_path / "below", "grad_cam")


# Workers -----------------------------------------------------------------------------------------


def test_alive_here(tmp_path):
    made = cell(tmp_path)
    run_folder(made, host=platform.node(), pid=os.getpid(), process=identity(), age=1e4)
    worker = one_worker(made)
    assert worker.state == RUNNING  # whatever its age: its process is there
    assert "silent" in worker.why
    assert look(tmp_path).exit == WORKED_ON


def test_dead_here(tmp_path):
    made = cell(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    run_folder(made, host=platform.node(), pid=process.pid, process=identity(process.pid))
    assert one_worker(made).state == RUNNING
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie: its number is still taken
    assert one_worker(made).state == DEAD
    process.communicate()
    assert (one_worker(made).state, one_worker(made).why) == (DEAD, "its process is gone")
    assert look(tmp_path).exit == LEFT


def test_a_process_number_that_came_again(tmp_path):
    made = cell(tmp_path)
    boot, space, pid, start = identity().split()
    run_folder(made, host=platform.node(), pid=os.getpid(), process=f"{boot} {space} {pid} {int(start) - 1}")
    assert one_worker(made).state == DEAD


@pytest.mark.parametrize(("age", "state"), [(5, RUNNING), (100, RUNNING), (500, DEAD)])
def test_on_another_machine(tmp_path, age, state):
    """Its process number says nothing here, also where it happens to be ours; neither does its host's name."""
    made = cell(tmp_path)
    run_folder(made, pid=os.getpid(), process="another-boot pid:[1] 7 8", host=platform.node(), age=age)
    worker = one_worker(made)
    assert worker.state == state
    assert worker.age == pytest.approx(age, abs=5)


@pytest.mark.parametrize(
    ("summary", "state"),
    [
        ({"finished": True, "left": 0, "stopped": None}, FINISHED),
        ({"finished": True}, FINISHED),  # of an earlier version
        ({"finished": False, "left": 3, "stopped": "SIGTERM"}, STOPPED),
        ({"finished": False, "left": 3, "stopped": None}, FAILED),
        ({"finished": False}, STOPPED),
    ],
)
def test_ended(tmp_path, summary, state):
    made = cell(tmp_path)
    run_folder(made, summary=summary)
    worker = one_worker(made)
    assert worker.state == state
    assert worker.left == summary.get("left")


def test_the_file_server_says_what_time_it_is(tmp_path, monkeypatch):
    """Its clock and ours may differ by hours."""
    monkeypatch.setattr(time, "time", lambda: 5.0)
    assert clock(tmp_path) > 1e9
    assert list(tmp_path.iterdir()) == []
    assert clock(tmp_path / "nowhere") == 5.0


def test_a_sign_of_life_from_the_future(tmp_path):
    made = cell(tmp_path)
    run_folder(made, age=-3600)
    assert (one_worker(made).state, one_worker(made).age) == (RUNNING, 0)


def test_a_run_takes_the_place_of_earlier_ones_of_its_shard():
    def worker(name: str, shard: int, shards: int, state: str) -> Worker:
        return Worker("c", name, Path(name), state, shard=shard, shards=shards)

    runs = [
        worker("1", 0, 2, DEAD),
        worker("2", 1, 2, STOPPED),
        worker("3", 0, 4, DEAD),
        worker("4", 1, 4, FAILED),
        worker("5", 0, 4, FINISHED),
        worker("6", 1, 2, RUNNING),
        worker("7", 2, 4, RUNNING),
    ]
    assert [w.name for w in current(runs)] == ["6", "5", "4", "7"]


def test_rate_and_time_left(tmp_path):
    made = cell(tmp_path, maps=4, scores=0)
    run_folder(made, rate=0.5, shards=2, metrics=[METRIC])
    run_folder(made, "20260101-000001-4243-1-bbbb", rate=1.0, shard=1, shards=2, metrics=[METRIC])
    curves = made.curves(METRIC)
    curves.add("p0", "f", {"map/c": np.ones(3)}, seconds=3.0)
    curves.flush()
    (found,) = look(tmp_path).cells
    assert found.stages[0].rate == 1.5
    assert found.stages[0].seconds == pytest.approx(2 / 1.5)  # of one worker
    # 6 maps and 10 scores of 3 s, shared by two.
    assert found.eta == pytest.approx((6 * 2 / 1.5 + 10 * 3) / 2)


def test_a_fit_in_progress(tmp_path):
    cell(tmp_path)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "fedcba98.partial.safetensors").write_bytes(b"12345")
    (fit,) = look(tmp_path).fits
    assert (fit.name, fit.cells, fit.size) == ("fedcba98", (NAME,), 5)
    assert fit.age < 60


# Half written, damaged, foreign ---------------------------------------------------------------------


def test_whatever_lies_there_it_does_not_crash(tmp_path):
    made = cell(tmp_path)
    runs = made.folder / "runs"
    for name, text in {
        "20260101-000000-1-0-aaaa/progress.json": '{"stage": "ma',
        "20260101-000000-2-0-aaaa/progress.json": '{"stage": 3, "done": "x", "total": null, "rate": -1, "shards": []}',
        "20260101-000000-3-0-aaaa/summary.json": "[]",
        "20260101-000000-4-0-aaaa/nothing": "",
        "foreign/notes.txt": "",
        ".hidden/progress.json": "{}",
    }.items():
        (runs / name).parent.mkdir(parents=True)
        (runs / name).write_text(text)
    (runs / "file").write_text("")
    (runs / "link").symlink_to("/")
    (made.folder / "failures").mkdir()
    (made.folder / "failures" / "x.jsonl").write_text('{"uid": 3, "time": 1, "stage": []}\n[1]\nnull\n{"torn')
    (made.folder / "maps" / "z-00001.safetensors").write_bytes(b"no chunk")
    (made.folder / "scores" / METRIC / "z-00001.parquet").write_bytes(b"no rows")
    (made.folder / "scores" / "odd name").mkdir()
    (tmp_path / "a.b.c.00000000").mkdir()
    (tmp_path / "a.b.c.00000000" / "spec.json").write_text("{")
    (tmp_path / "a.b.c.00000000" / "samples.json").write_text("3")
    (tmp_path / "state").write_text("no folder")
    status = look(tmp_path)
    lost, found = status.cells
    assert len(lost.broken) == 2
    assert any("z-00001.safetensors" in line for line in found.broken)
    assert any("z-00001.parquet" in line for line in found.broken)
    assert found.stages[0].done == 4
    assert {w.name.split("-")[2] for w in workers(made.folder, time.time())} == {"1", "2", "3", "4"}
    json.dumps(status.record())
    assert lost.left  # nobody knows what it is about
    assert tool("status").main([str(tmp_path)]) == LEFT


def test_logs_are_printed_without_what_moves_the_cursor(tmp_path, capsys):
    made = cell(tmp_path)
    run_folder(made, age=1e4)
    assert tool("status").main([str(tmp_path), "--lines", "2"]) == LEFT
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "second" in text
    assert "first" not in text
    assert "no sign of life" in text


def test_tail(tmp_path):
    path = tmp_path / "log"
    path.write_text("".join(f"line {i}\n\n" for i in range(20000)))
    assert tail(path)[-2:] == ["line 19998", "line 19999"]
    assert 1000 < len(tail(path)) < 20000  # of a large log only the end is read
    assert tail(tmp_path / "none") == []


def test_the_log_is_shown_without_the_list_of_hooks(tmp_path):
    made = cell(tmp_path)
    name = "20260101-000000-4242-0-aaaa"
    (run_folder(made, name) / f"{name}.log").write_text(
        "2026/11/22 10:44:00 - mmengine - INFO - Hooks will be executed so:\nbefore_run:\n (NORMAL) A\n"
        "2026/11/22 10:44:01 - attrib.running.loop - ERROR - maps of p1\nTraceback:\n  File\n"
        "2026/11/22 10:44:02 - mmengine - WARNING - odd\n"
    )
    lines = one_worker(made).log_lines(9)
    assert [line.split(" - ")[-1] for line in lines] == ["maps of p1", "Traceback:", "  File", "odd"]
    assert one_worker(made).log_lines(1) == ["2026/11/22 10:44:02 - mmengine - WARNING - odd"]
    assert one_worker(made).log_lines(0) == []


def test_json_and_exit_status(tmp_path, capsys):
    made = cell(tmp_path)
    run_folder(made, job="12_3")
    main = tool("status").main
    assert main([str(tmp_path), "--json"]) == WORKED_ON
    found = json.loads(capsys.readouterr().out)
    assert found["exit"] == WORKED_ON
    (worker,) = found["cells"][0]["workers"]
    assert (worker["state"], worker["job"], worker["log"][-1][-5:]) == (RUNNING, "12_3", "third")
    cell(tmp_path / "other", 10, 10)
    assert main([str(tmp_path / "other")]) == DONE
    assert main([str(tmp_path / "nowhere")]) == 2
    assert main([str(tmp_path), "--watch", "0"]) == 2


def test_watching_ends_when_all_is_done(tmp_path, monkeypatch, capsys):
    made = cell(tmp_path, 10, 1)
    module, looks = tool("status"), []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        rows = made.scores(METRIC)
        for uid in UIDS[5 * len(looks) - 5 :][:5]:
            rows.add(uid, "f", {("map", "ehr"): 0.5})
        rows.flush()

    monkeypatch.setattr(module.time, "sleep", sleep)
    assert module.main([str(tmp_path), "--watch", "7", "--json"]) == DONE
    assert looks == [7, 7]
    seen = [json.loads(line)["cells"][0]["stages"][1]["done"] for line in capsys.readouterr().out.splitlines()]
    assert seen == [1, 5, 10]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (99, "99 s"),
        (100, "2 min"),
        (5900, "98 min"),
        (6000, "1.7 h"),
        (3600 * 30, "30 h"),
        (4e5, "4.6 d"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(None, ""), (0.0, ""), (120.0, "120/s"), (0.25, "15/min"), (0.002, "7.2/h"), (1e-4, "8.64/d")]
)
def test_speeds(rate, text):
    assert speed(rate) == text


# Signs of life -------------------------------------------------------------------------------------


def heartbeat(root: Path, seconds: float = 3600.0) -> tuple[Heartbeat, SimpleNamespace]:
    experiment = SimpleNamespace(metrics={"ehr": None}, metric_key=lambda _: "a" * 64)
    work = SimpleNamespace(cell=Cell(root / NAME, "w"), experiment=experiment, state_key=None, explains=True)
    loop = SimpleNamespace(stage="maps", total=6, summary=SimpleNamespace(failed=1))
    return Heartbeat(work, Options(shard=1, shards=3), seconds=seconds), SimpleNamespace(attribution=loop)


def progress(beat: Heartbeat) -> dict:
    return json.loads(beat.path.read_text())


def test_a_heartbeat_says_what_is_done(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    now = [0.0]
    monkeypatch.setattr(hooks.time, "monotonic", lambda: now[0])
    beat, runner = heartbeat(tmp_path)
    beat.start()
    first = progress(beat)
    assert (first["stage"], first["job"], first["restarts"], first["shard"], first["shards"]) == (
        "start",
        "7_2",
        1,
        1,
        3,
    )
    assert (first["metrics"], first["pid"], first["rate"]) == ([METRIC], os.getpid(), None)
    beat.before_test_iter(runner, 0)
    assert progress(beat)["stage"] == "maps"  # at once: a stage began
    for i in range(1, 4):
        now[0] += 10
        beat.after_test_iter(runner, i, outputs=SimpleNamespace(stage="maps", done=2 * i, total=6))
        beat.before_test_iter(runner, i)
    assert progress(beat)["done"] == 0  # it is not written after each batch
    beat.stop()
    last = progress(beat)
    assert (last["done"], last["total"], last["failed"], last["rate"]) == (6, 6, 1, pytest.approx(0.2))
    assert not any(thread.name == "heartbeat" for thread in threading.enumerate())


def test_the_rate_is_of_the_recent_past(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(hooks.time, "monotonic", lambda: now[0])
    beat, runner = heartbeat(tmp_path)
    runner.attribution.total = 10**6
    beat.before_test_iter(runner, 0)
    for done, seconds in enumerate([1] * 300 + [10] * 60, 1):  # it becomes ten times as slow
        now[0] += seconds
        beat.after_test_iter(runner, 0, outputs=SimpleNamespace(stage="maps", done=done, total=10**6))
    beat._write()
    assert progress(beat)["rate"] == pytest.approx(0.1, rel=0.05)
    assert len(beat._marks) < 60


def test_a_batch_of_minutes_gives_signs_of_life(tmp_path):
    beat, _ = heartbeat(tmp_path, seconds=0.01)
    beat.start()
    first = progress(beat)["time"]
    for _ in range(500):
        time.sleep(0.01)
        if progress(beat)["time"] > first:
            break
    assert progress(beat)["time"] > first
    beat.stop()


def test_a_disk_that_refuses_is_a_warning_once(tmp_path, caplog, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hooks, "write_json", refuse)
    beat, runner = heartbeat(tmp_path, seconds=0.001)
    beat.start()
    beat.before_test_iter(runner, 0)
    time.sleep(0.02)
    beat.stop()
    assert [record.message.count("No space left") for record in caplog.records] == [1]


def test_a_heartbeat_costs_a_batch_nothing(tmp_path):
    """Less than 0.1 ms, of a batch that takes 10 ms or more."""
    beat, runner = heartbeat(tmp_path)
    beat.before_test_iter(runner, 0)
    step = SimpleNamespace(stage="maps", done=1, total=6)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for i in range(100):
            beat.before_test_iter(runner, i)
            beat.after_test_iter(runner, i, outputs=step)
        best = min(best, (time.perf_counter() - start) / 100)
    assert best < 1e-4


def test_of_a_real_run(monkeypatch, capfd, tmp_path):
    run = command(capfd)
    images, root = pictures(tmp_path), tmp_path / "work"
    result = run("dataset=tiny", "model=small_cnn", "method=flaky", "metric=[ehr]", "run.progress=false", "run.limit=5",
                 f"dataset.root={images}", f"run.root={root}")  # fmt: skip
    assert result.status == 0, result.err
    made = only_cell(root)
    worker = one_worker(made)
    assert (worker.state, worker.shard, worker.shards, worker.limit) == (FINISHED, 0, 1, 5)
    assert (worker.stage, worker.done, worker.total, worker.failed) == ("ehr", 3, 3, 2)
    (found,) = look(root).cells
    maps, scores = found.stages
    assert (maps.done, maps.todo, maps.failed, maps.unseen) == (3, 0, 2, 0)  # the sixth is beyond the limit
    assert (scores.done, scores.todo, scores.failed, scores.asked) == (3, 0, 0, True)
    assert {f.uid: f.reason.splitlines()[0] for f in found.failures} == {
        "p001": "RuntimeError: no luck",
        "p004": "the map has NaN or infinite values",
    }
