"""Faults of a disk, injected: ``make torture``, or with few of them tests/test_torture.py.

At the n-th write, open for writing, fsync, rename, link or unlink below a work directory the process is killed, or the
call is refused as a disk refuses it; n runs over the whole of a run, a training, a repair and an export. Afterwards the
same command must complete with the maps, tables, weights and pictures of one to which nothing happened, with nothing
lost, nothing twice, and no temporary file left.

``tests/torture.c`` is the disk, compiled when it is needed. A process that has imported everything and computes nothing
forks a child for each command, as starting Python takes seconds. So the program starts itself anew with the library.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
WHOLE = "whole"  # folder of what was made without a fault
CODES = (0, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE)  # 0: killed
FOREVER = 2**40
FAIR = {0, 2, -signal.SIGKILL}  # how a command that meets a fault may end: no traceback
RUN = (
    "dataset=tiny", "model=small_cnn", "method=iba", "metric=[ehr,insertion_deletion]", "method.steps=1",
    "metric.insertion_deletion.steps=3", "dataset.select.min_confidence=0", "run.progress=false", "run.batch=1",
    "run.flush=0", "run.png=true", "run.device=cpu",
)  # fmt: skip
TRAINING = ("train=acd_cnn_digits", "train.limit=20", "train.epochs=3", "train.batch=10", "train.device=cpu")


class Fault(NamedTuple):
    """The fault number ``number``: at call ``call`` of what ``kind`` does, and, if ``stays``, at all later ones."""

    number: int
    kind: str
    call: int
    code: int
    stays: bool

    def __str__(self) -> str:
        how = "killed" if not self.code else errno.errorcode[self.code] + (" from then on" if self.stays else "")
        return f"{self.number}: {self.kind}, call {self.call}, {how}"


# ---- commands, each of which runs in a child --------------------------------------------------------------


class Commands:
    """What is tortured. Configurations are composed once."""

    def __init__(self, folder: Path) -> None:
        from tiny import ROOT, pictures

        from attrib.config.compose import compose

        self.images = pictures(folder, 3)
        configs = ROOT / "tests" / "configs"
        self._run = compose("run", [*RUN, f"dataset.root={self.images}", "run.root=."], configs)
        self._train = compose("train", [*TRAINING, "train.root=."], None)

    def run(self, root: Path) -> int:
        from attrib.cli import run

        self._run.values["run"]["root"] = str(root)
        return run.cell(self._run).status

    def train(self, root: Path) -> int:
        from attrib.cli import train

        self._train.values["train"]["root"] = str(root)
        return watched(lambda _: train._train(self._train))

    def repair(self, root: Path) -> int:
        from attrib.cli import cache

        return cache.main(["repair", str(root), "--yes"])

    def export(self, root: Path) -> int:
        from attrib.cli import cache

        return cache.main(["export", str(root), str(root / "exported"), "--force"])


def watched(work: Callable[[Any], int]) -> int:
    from attrib.cli.common import watched

    return watched(work)


class Child(NamedTuple):
    """How a child ended, as os.waitstatus says; what it printed; how many calls it made."""

    status: int
    said: str
    calls: int


def in_child(work: Callable[[], int], log: Path, root: Path, fault: Fault | None = None) -> Child:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        status = 1
        with open(log, "w") as file, contextlib.suppress(BaseException):
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            disk = ctypes.CDLL(None)
            call, code, stays = (fault.call, fault.code, fault.stays) if fault else (FOREVER, 0, False)
            disk.torture_arm(os.fsencode(root), ctypes.c_long(call), code, ctypes.c_long(FOREVER if stays else call))
            try:
                status = work()
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stdout.flush()
            disk.torture_count.restype = ctypes.c_long
            log.with_suffix(".calls").write_text(str(disk.torture_count()))
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    calls = log.with_suffix(".calls")
    return Child(status, log.read_text(), int(calls.read_text()) if calls.exists() else 0)


# ---- what must be equal -----------------------------------------------------------------------------------


def content(root: Path) -> dict[str, str]:
    """All that counts of a work directory by name, each as a digest."""
    return {name: hashlib.sha256(repr(value).encode()).hexdigest() for name, value in values(root).items()}


def values(root: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq
    from safetensors.numpy import load_file

    from attrib.results import tables
    from attrib.store.cell import cells

    found: dict[str, Any] = {}
    for cell in cells(root):
        stores = {"maps": cell.maps, **{name: cell.curves(name) for name in cell.metrics()}}
        for place, store in stores.items():
            for key in store.index():
                found |= {f"{place} {key} {n}": (v.shape, v.tobytes()) for n, v in store.read(key).items()}
        rows: Counter[tuple[str, ...]] = Counter()
        for path in sorted(cell.folder.glob("scores/*/*.parquet")):
            for row in pq.read_table(path).to_pylist():
                key = (path.parent.name, row["uid"], row["fingerprint"], row["map"], row["column"])
                rows[key] += 1
                found[f"row {key}"] = row["value"]
        found["twice"] = [key for key, count in rows.items() if count > 1]
        found["failed"] = [entry["reason"] for entry in cell.ledger.entries()]
        found |= {f"file {p.relative_to(root)}": p.read_bytes() for p in cell.folder.glob("masks/**/*.png")}
        found["samples"] = cell.samples()
    if found:
        summary = tables.summary(tables.rows(root))[["method", "column", "n", "failed", "mean", "lo", "hi"]]
        found["table"] = summary.to_csv()
    for path in [*root.glob("state/*.safetensors"), *root.glob("train/*/model.safetensors")]:
        found |= {f"{path.relative_to(root)} {n}": v.tobytes() for n, v in load_file(path).items()}
    found |= {f"file {p.relative_to(root)}": p.read_bytes() for p in root.glob("exported/**/*") if p.is_file()}
    return found


def differences(root: Path, there: Mapping[str, str]) -> list[str]:
    """What is wrong with ``root``, of which ``there`` is what it should hold, in a few lines."""
    here = content(root)
    found = [f"lost: {name}" for name in there.keys() - here.keys()]
    found += [f"too much: {name}" for name in here.keys() - there.keys()]
    found += [f"differs: {name}" for name in here.keys() & there.keys() if here[name] != there[name]]
    found += [f"left: {path.relative_to(root)}" for path in root.rglob(".*.tmp")]
    return sorted(found)


def damage(root: Path, seed: int) -> None:
    """Some chunks of maps, curves and rows, each with another byte, or cut off."""
    choice = random.Random(seed)
    paths = sorted(p for p in root.glob("*/*/**/*") if p.suffix in (".safetensors", ".parquet"))
    for path in choice.sample(paths, len(paths) // 2):
        data = bytearray(path.read_bytes())
        data[choice.randrange(len(data))] ^= 255
        path.write_bytes(data if choice.random() < 0.8 else data[: len(data) // 2])


# ---- one fault --------------------------------------------------------------------------------------------

KINDS = {"run": 5, "train": 2, "repair": 2, "export": 1}  # how many faults of ten each gets


class Torture:
    def __init__(self, folder: Path, count: int, seed: int) -> None:
        self.folder, self.count, self.seed = folder, count, seed
        self.commands = Commands(folder)
        self.whole = {kind: folder / WHOLE / kind for kind in KINDS}
        self.expected: dict[str, dict[str, str]] = {}

    def prepare(self, kind: str) -> Path:
        """A fresh work directory for this kind of command."""
        root = self.folder / "work"
        shutil.rmtree(root, ignore_errors=True)
        if kind in ("repair", "export"):
            shutil.copytree(self.whole["run"], root)
        return root

    def child(self, name: str, root: Path, fault: Fault | None = None) -> Child:
        return in_child(lambda: getattr(self.commands, name)(root), self.folder / "log", root, fault)

    def calls(self, kind: str) -> int:
        """Do what ``kind`` does without a fault; returns how many calls that took."""
        root = self.prepare(kind)
        if kind == "repair":
            damage(root, self.seed)
        made = self.child(kind, root)
        assert made.status == 0, made.said
        if kind == "repair":
            made_again = self.child("run", root)
            assert made_again.status == 0, made_again.said
        shutil.copytree(root, self.whole[kind])
        self.expected[kind] = self.told(lambda: content(self.whole[kind]))
        return made.calls

    def faults(self) -> list[Fault]:
        """Spread over the whole of each kind, a code each."""
        choice, found = random.Random(self.seed), []
        for kind, share in KINDS.items():
            total, count = self.calls(kind), max(1, round(self.count * share / sum(KINDS.values())))
            print(f"{kind}: {total} calls, {count} faults", flush=True)
            for i in range(count):
                call = 1 + int((i + choice.random()) * total / count)
                code = CODES[i % len(CODES)] if count >= len(CODES) else choice.choice(CODES)
                found.append(Fault(len(found) + 1, kind, call, code, bool(code) and choice.random() < 0.5))
        return found

    def wrong(self, fault: Fault) -> list[str]:
        """What a fault did that it must not."""
        root = self.prepare(fault.kind)
        if fault.kind == "repair":
            damage(root, self.seed)
        hit = self.child(fault.kind, root, fault)
        found = [] if hit.status in FAIR and "Traceback" not in hit.said else [f"ended with {hit.status}: {hit.said}"]
        for name in (fault.kind, "run") if fault.kind == "repair" else (fault.kind,):
            again = self.child(name, root)
            if again.status:
                return [*found, f"the same command ended with {again.status}: {again.said}\nbefore: {hit.said}"]
        try:
            return found + self.told(lambda: differences(root, self.expected[fault.kind]))
        except AssertionError as error:
            return [*found, f"cannot be compared: {error}"]

    def told(self, ask: Callable[[], Any]) -> Any:
        """What a child finds out."""
        report = self.folder / "report"
        done = in_child(
            lambda: 0 if report.write_text(json.dumps(ask())) else 1, self.folder / "asked", self.folder / "nowhere"
        )
        assert done.status == 0, done.said
        return json.loads(report.read_text())


def warm_up() -> None:
    """Import what the commands need; nothing is computed, so that no thread is there when children are forked."""
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch

    import attrib.cli.cache
    import attrib.cli.run
    import attrib.cli.table
    import attrib.cli.train
    import attrib.running.run  # noqa: F401
    from attrib.process.environment import environment

    torch.set_num_threads(1)
    environment()  # remembered: it reads the descriptions of all packages
    gc.collect()
    gc.freeze()  # else each child copies the pages of all that was imported, when it first collects


def compiled(folder: Path) -> Path:
    """The library. Raises CalledProcessError or FileNotFoundError where there is no gcc."""
    library = folder / "torture.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-o", str(library), str(HERE / "torture.c"), "-ldl"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the fault of this number alone")
    parser.add_argument("--start", type=int, default=1, help="the first fault to try, to go on where a run was cut off")
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if "torture.so" not in os.environ.get("LD_PRELOAD", ""):
        environment = {**os.environ, "LD_PRELOAD": str(compiled(folder)), "OMP_NUM_THREADS": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    os.environ.pop("LD_PRELOAD")  # not for git
    start = time.monotonic()
    warm_up()
    torture, bad = Torture(folder, arguments.count, arguments.seed), 0
    faults = torture.faults()
    chosen = [f for f in faults if f.number >= arguments.start and arguments.only in (None, f.number)]
    for done, fault in enumerate(chosen, 1):
        if wrong := torture.wrong(fault):
            bad += 1
            print(fault, *wrong[:20], sep="\n  ", flush=True)
        if done % 50 == 0:
            print(f"up to fault {fault.number}: {bad} did harm, {time.monotonic() - start:.0f} s", flush=True)
    print(f"{len(chosen)} faults, {bad} of them did harm, {time.monotonic() - start:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
