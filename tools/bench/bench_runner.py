"""What the runner costs: over the bare calls of a method, to start again on many stored samples, and in memory.

    python tools/bench/bench_runner.py
    python tools/bench/bench_runner.py --overhead --batch 1 8 --profile
    python tools/bench/bench_runner.py --stored 100000 --chunk 256
    python tools/bench/bench_runner.py --stored 100000 --chunk 1 --folder /somewhere/big
    python tools/bench/bench_runner.py --memory 5000

``--overhead`` runs a method that takes 10 ms a sample (matrix products, or sleep with ``--sleep``) on small images,
with maps of 224 x 224. "Bare" is the same calls on batches that are ready, without reading, storing or recording
anything. Bare and whole runs take turns, and the smallest of each counts, because other processes only make both
slower. On a machine with other work, look at the CPU seconds of the main thread: they miss only what is waited for.

``--stored`` fills a work directory by the store, then starts ``attrib run``, ``table`` and ``status`` on it as anybody
would. ``--chunk`` is how many samples a file of maps holds: 256 of a fast method, 1 or 2 of one that is slower than
``run.flush``. Wall and CPU seconds are of the whole process, imports included.

``--memory`` notes the resident memory during a run.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import os
import platform
import pstats
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from mmengine.hooks import Hook
from torch import Tensor, nn

from attrib.datasets import ArrayDataset, ImageFolder, ImageTransform
from attrib.experiment.cell import Experiment
from attrib.fit import State
from attrib.methods import Method
from attrib.models import Classifier, LeNet
from attrib.models.checkpoint import save_checkpoint
from attrib.noise import Noise
from attrib.process.memory import keep_freed_memory, resident
from attrib.running.options import Options
from attrib.running.run import run
from attrib.store.cell import Cell, cells
from attrib.types import Batch

ATTRIB = ["-m", "attrib.cli.main"]
SIDE = 224


@dataclass(frozen=True)
class Takes(Method):
    """``seconds`` of work per sample; the map is the image."""

    VERSION: ClassVar[int] = 1
    MAPS: ClassVar[Mapping[str, str]] = {"map": "the image"}
    seconds: float = 0.01
    sleep: bool = False

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        clock = time.perf_counter if self.sleep else time.thread_time
        end = clock() + self.seconds * len(batch)
        maps = batch.x.mean(1)
        if self.sleep:
            time.sleep(max(0.0, end - clock()))
        square = torch.ones(128, 128)
        while clock() < end:
            square @ square  # as a net does: without Python's lock
        return {"map": maps}


def small_images(count: int) -> ArrayDataset:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    rows = {f"s/{i:06d}": i for i in range(count)}
    transform = ImageTransform(size=SIDE, mean=(0.5,) * 3, std=(0.5,) * 3)
    return ArrayDataset(rows, pixels, np.arange(count) % 10, transform)


def made(count: int, method: Takes) -> Experiment:
    net = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10))
    names = {"dataset": "bench", "model": "net", "method": "takes"}
    return Experiment(names, small_images(count), Classifier(net), method)


# ---- overhead -----------------------------------------------------------------------------------------


def clocks() -> np.ndarray:
    """Wall seconds, and CPU seconds of this thread."""
    return np.array([time.perf_counter(), time.thread_time()])


def bare(experiment: Experiment, batch: int) -> np.ndarray:
    samples, uids = experiment.samples(experiment.dataset.uids, batch), experiment.dataset.uids
    ready = samples.batch(uids[:batch])
    start = clocks()
    for chunk in samples.chunks():
        experiment.method.attribute(experiment.model, ready[: len(chunk)], {}, Noise(chunk))
    return clocks() - start


def whole(experiment: Experiment, batch: int, profile: cProfile.Profile | None = None) -> np.ndarray:
    with tempfile.TemporaryDirectory() as root:
        start = clocks()
        if profile is not None:
            profile.enable()
        run(experiment, Options(root=root, batch=batch, device="cpu", progress=sys.stderr.isatty()))
        if profile is not None:
            profile.disable()
        return clocks() - start


def overhead(arguments: argparse.Namespace) -> None:
    experiment = made(arguments.samples, Takes(sleep=arguments.sleep))
    whole(made(8, Takes(seconds=0)), 8)  # warm: the versions of compilers and drivers are asked for once per process
    for batch in arguments.batch:
        pairs = [(bare(experiment, batch), whole(experiment, batch)) for _ in range(arguments.repeat)]
        calls, total = (np.min(times, 0) for times in zip(*pairs, strict=True))
        print(f"{arguments.samples} samples of 10 ms ({'sleep' if arguments.sleep else 'busy'}), batch {batch}:")
        for i, what in enumerate(("wall", "CPU of the main thread")):
            extra = total[i] - calls[i]
            share = f" = {10 * extra / arguments.samples / 0.001:.1f} % of 10 ms"
            print(
                f"  {what}: bare {calls[i]:.2f} s, runner {total[i]:.2f} s, more by "
                f"{1000 * extra / arguments.samples:.2f} ms a sample{share}",
                flush=True,
            )
        if arguments.profile:
            profile = cProfile.Profile()
            whole(experiment, batch, profile)
            pstats.Stats(profile).sort_stats("cumulative").print_stats(60)


# ---- many stored samples ------------------------------------------------------------------------------


def pgm_files(folder: Path, count: int) -> None:
    for i in range(10):
        (folder / f"class{i}").mkdir(parents=True)
    for i in range(count):
        head = b"P5\n2 2\n255\n" + (i % 2**32).to_bytes(4, "big")
        (folder / f"class{i % 10}" / f"{i:06d}.pgm").write_bytes(head)


@contextmanager
def without_fsync() -> Iterator[None]:
    """Filling a directory is not what is timed."""
    fsync, os.fsync = os.fsync, lambda _: None
    try:
        yield
    finally:
        os.fsync = fsync


def fill(cell: Cell, prints: Mapping[str, str], chunk: int, score_chunk: int) -> None:
    (metric,) = cell.metrics()
    present = {uid for uid, _ in cell.maps.index()}
    writer = Cell(cell.folder, "20260101-000000-1-0-fill")
    rows, curves = writer.scores(metric), writer.curves(metric)
    known = next(iter(cell.maps.index().values())).info
    names = [(m, c) for m, c in {(r["map"], r["column"]) for r in cell.scores(metric).table().to_pylist()}]
    rng = np.random.default_rng(0)
    todo = [uid for uid in prints if uid not in present]
    with without_fsync():
        for i, uid in enumerate(todo, 1):
            key = uid, prints[uid]
            writer.maps.add(*key, {"map": rng.random((8, 8), np.float32)}, **known)
            rows.add(*key, {name: float(rng.random()) for name in names})
            curves.add(*key, {"map/curve": rng.random(11, np.float32)}, seconds=0.5)
            if i % chunk == 0:
                writer.maps.flush()
            if i % score_chunk == 0:
                curves.flush()
                rows.flush()
        for store in (writer.maps, curves, rows):
            store.flush()


def timed(what: str, command: list[str]) -> str:
    """Wall and CPU seconds and the peak memory of a process, printed; its output."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = 0
    out, err = "", ""
    while True:
        try:
            out, err = process.communicate(timeout=0.05)
            break
        except subprocess.TimeoutExpired:
            peak = max(peak, _peak(process.pid))
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{out}{err}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{what}: {seconds:.1f} s, {cpu:.1f} CPU s, peak {peak / 2**20:.0f} MiB", flush=True)
    return out


LOOK = """
import sys, time
import attrib

def lap(what, made):
    start, cpu = time.perf_counter(), time.process_time()
    found = made()
    print(f"    {what}: {time.perf_counter() - start:.2f} s, {time.process_time() - cpu:.2f} CPU s")
    return found

results = attrib.results(sys.argv[1])
rows = lap("scores()", results.scores)
lap("scores(uid=...)", lambda: results.scores(uid=rows["uid"].iloc[-1]))
lap("table()", results.table)
maps = lap("maps(uid=...)", lambda: results.maps(uid=rows["uid"].iloc[-1]))
lap("one map", lambda: maps.array)
maps = lap("maps()", results.maps)
places = list(maps)
lap(f"1,000 of {len(places)} maps in order", lambda: [maps[place] for place in places[:1000]])
lap("1,000 maps, scattered", lambda: [maps[place] for place in places[::max(1, len(places) // 1000)]])
"""


def _peak(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def stored(arguments: argparse.Namespace) -> None:
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=arguments.folder))
    try:
        count, root = arguments.stored, folder / "workdirs"
        pgm_files(folder / "images", count)
        checkpoint = (
            folder / "lenet.safetensors"
        )  # without one the weights are random, and every process has a key of its own
        save_checkpoint(checkpoint, LeNet(), {})
        setting = [f"dataset.root={folder / 'images'}", "dataset=image_folder", "model=lenet", "method=random"]
        setting += [f"model.checkpoint={checkpoint}"]
        command = [*ATTRIB, "run", *setting, "metric=[insertion_deletion]", f"run.root={root}", "run.device=cpu"]
        command += ["metric.insertion_deletion.steps=4", "run.progress=false"]
        subprocess.run([sys.executable, *command, "run.limit=1"], check=True, stdout=subprocess.DEVNULL)
        (cell,) = cells(root)
        dataset = ImageFolder(str(folder / "images"), ImageTransform(size=32, mean=(0.0,), std=(1.0,)))
        fill(cell, {uid: dataset.fingerprint(uid) for uid in dataset.uids}, arguments.chunk, arguments.score_chunk)
        files = {kind: sum(1 for _ in cell.folder.rglob(f"*.{kind}")) for kind in ("safetensors", "parquet")}
        print(
            f"{count} samples, {arguments.chunk} maps and {arguments.score_chunk} scores per file: {files}", flush=True
        )
        for turn in ("first", "second", "third")[: arguments.turns]:
            print(f"{turn} time:")
            print(timed("  dry run (plan)", [*command, "run.dry=true"]).splitlines()[0])
            print(timed("  run with nothing to do", command).strip())
            timed("  table", [*ATTRIB, "table", str(root)])
            timed("  status", [*ATTRIB, "status", str(root)])
            timed("  help", [*ATTRIB, "--help"])
        print(timed("attrib.results", ["-c", LOOK, str(root)]), end="", flush=True)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)


# ---- memory -------------------------------------------------------------------------------------------


class Resident(Hook):
    def __init__(self) -> None:
        self.seen: dict[int, int] = {}

    def after_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.seen.setdefault(round(100 * outputs.done / outputs.total), resident())


def memory(arguments: argparse.Namespace) -> None:
    experiment, hook = made(arguments.memory, Takes(seconds=0)), Resident()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root, without_fsync():
        run(experiment, Options(root=root, device="cpu", hooks=(hook,)))
    shown = ", ".join(f"{hook.seen[p] / 2**20:.0f} MiB at {p} %" for p in (10, 25, 50, 75, 100) if p in hook.seen)
    print(f"memory over {arguments.memory} samples with maps of {SIDE} x {SIDE}: {shown}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--sleep", action="store_true")
    parser.add_argument("--profile", action="store_true", help="also where the time of the main thread goes")
    parser.add_argument("--stored", type=int, default=0, metavar="N", help="samples that are there already")
    parser.add_argument("--chunk", type=int, default=256, help="samples per file of maps")
    parser.add_argument("--score-chunk", type=int, default=256, help="samples per file of scores and curves")
    parser.add_argument("--turns", type=int, default=2, help="times that each command is run")
    parser.add_argument("--memory", type=int, default=0, metavar="N", help="samples of the run whose memory is noted")
    parser.add_argument("--folder", type=Path, help="where the work directories are made")
    parser.add_argument("--keep", action="store_true", help="leave the work directory of --stored")
    arguments = parser.parse_args()
    keep_freed_memory()
    gc.freeze()  # as the command line does after its imports
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads")
    everything = not (arguments.overhead or arguments.stored or arguments.memory)
    if arguments.memory or everything:  # first: the others leave memory behind
        arguments.memory = arguments.memory or 5000
        memory(arguments)
    if arguments.overhead or everything:
        overhead(arguments)
    if arguments.stored or everything:
        arguments.stored = arguments.stored or 100_000
        stored(arguments)


if __name__ == "__main__":
    main()
