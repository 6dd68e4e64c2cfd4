"""mmengine hooks of every run: progress for people, signs of life, pictures, scalars for visualisation backends."""

from __future__ import annotations

import functools
import logging
import os
import platform
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from mmengine.hooks import Hook
from tqdm import tqdm

from attrib.datasets import holds_images, holds_sounds, holds_texts
from attrib.drawing.pictures import overlay, png, words_page
from attrib.drawing.spectrogram import draw
from attrib.errors import GoneError, printable
from attrib.fit import Progress
from attrib.running.options import Options
from attrib.running.plan import Plan, metric_folder
from attrib.store.files import picture_path, write_atomic, write_json
from attrib.store.temporary import identity
from attrib.store.workers import BEAT, PROGRESS, slurm_job
from attrib.types import Batch, SampleError

if TYPE_CHECKING:
    from attrib.running.runner import AttributionRunner

log = logging.getLogger(__name__)


class ProgressHook(Hook):
    """A bar in samples with an ETA; on a log file instead of a terminal, a line every 30 seconds."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._stage = ""

    def before_test_iter(self, runner: AttributionRunner, batch_idx: int, data_batch: Batch | None = None) -> None:
        loop = runner.attribution
        if self._bar is None or self._stage != loop.stage:
            self.close()
            self._stage = loop.stage
            self._bar = _bar(f"{loop.plan.experiment.names['method']}: {loop.stage}", loop.total, "samples")

    def after_test_iter(
        self, runner: AttributionRunner, batch_idx: int, data_batch: Batch | None = None, outputs: Any = None
    ) -> None:
        if self._bar is None:
            return  # nothing of this stage could be read
        if runner.attribution.summary.failed:
            self._bar.set_postfix(failed=runner.attribution.summary.failed, refresh=False)
        self._bar.update(outputs.done - self._bar.n)
        if outputs.done == outputs.total:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def after_test(self, runner: AttributionRunner) -> None:
        self.close()


class FitBar:
    """A bar for what a fit reports, with an ETA; for several, if it has several parts."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._about = ("", 0)

    def show(self, progress: Progress) -> None:
        about = progress.what, progress.total
        if self._bar is None or about != self._about or progress.done < self._bar.n:
            self.close()
            self._about = about
            self._bar = _bar(progress.what, progress.total, progress.unit, progress.done)
        self._bar.update(progress.done - self._bar.n)
        if progress.done == progress.total:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


def _bar(what: str, total: int, unit: str, initial: int = 0) -> tqdm:
    return tqdm(
        total=total,
        initial=initial,
        desc=printable(what),
        unit=f" {unit}",
        mininterval=0.2 if sys.stderr.isatty() else 30,
        dynamic_ncols=True,
        file=sys.stderr,
    )


class Heartbeat(Hook):
    """``progress.json`` in the run's folder: signs of life, read by ``attrib.store.workers``.

    A thread writes it every ``seconds``, so a batch, or a fit, of many minutes does not look like death. The loop pays
    for two clock readings a batch, and for a file when a stage begins. A disk that refuses it is a warning, once.
    """

    WINDOW = 300.0  # seconds over which the rate is taken, longer where a batch takes longer

    def __init__(self, plan: Plan, options: Options, *, seconds: float = BEAT) -> None:
        self._cell = plan.cell
        self.path = plan.cell.folder / "runs" / plan.cell.writer / PROGRESS
        self._seconds = seconds
        self._about = {
            "host": platform.node(),
            "pid": os.getpid(),
            "process": identity(),
            "started": time.time(),
            "shard": options.shard,
            "shards": options.shards,
            "limit": options.limit,
            "metrics": [metric_folder(plan.experiment, name) for name in plan.experiment.metrics],
            **slurm_job(os.environ),
        }
        fits = plan.state_key is not None and plan.explains
        self._stage, self._done, self._total, self._failed = "fit" if fits else "start", 0, 0, 0
        self._marks: deque[tuple[float, int]] = deque()  # monotonic time and samples done, of the stage
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name="heartbeat", daemon=True)
        self._warned = False

    def start(self) -> None:
        self._write()
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(timeout=5)
        if not self._thread.is_alive():  # else the disk hangs, and it would hang us
            self._write()

    def before_test_iter(self, runner: AttributionRunner, batch_idx: int, data_batch: Batch | None = None) -> None:
        if runner.attribution.stage != self._stage:
            self._enter(runner.attribution.stage, runner.attribution.total)

    def after_test_iter(
        self, runner: AttributionRunner, batch_idx: int, data_batch: Batch | None = None, outputs: Any = None
    ) -> None:
        if outputs.stage != self._stage:  # nothing of it could be read so far
            self._enter(outputs.stage, outputs.total)
        self._failed = runner.attribution.summary.failed
        self._mark(outputs.done, outputs.total)

    def fitting(self, progress: Progress) -> None:
        """The method's fit is so far."""
        if progress.total != self._total or progress.done < self._done:  # another part of it
            self._enter("fit", progress.total)
        self._mark(progress.done, progress.total)

    def _mark(self, done: int, total: int) -> None:
        now = time.monotonic()
        with self._lock:
            self._done, self._total = done, total
            if len(self._marks) > 1 and now - self._marks[-2][0] < 1:
                self._marks.pop()
            self._marks.append((now, done))
            while len(self._marks) > 2 and now - self._marks[1][0] > self.WINDOW:
                self._marks.popleft()

    def _enter(self, stage: str, total: int) -> None:
        with self._lock:
            self._stage, self._done, self._total = stage, 0, total
            self._marks = deque([(time.monotonic(), 0)])
        self._write()

    def _live(self) -> None:
        while not self._ended.wait(self._seconds):
            self._write()

    def _write(self) -> None:
        with self._lock:
            first, last = (self._marks[0], self._marks[-1]) if self._marks else ((0.0, 0), (0.0, 0))
            now = {"stage": self._stage, "done": self._done, "total": self._total, "failed": self._failed}
        rate = (last[1] - first[1]) / (last[0] - first[0]) if last[0] > first[0] else None
        try:
            self._cell.check()
            write_json(self.path, {**self._about, **now, "rate": rate, "time": time.time()})
        except GoneError:
            return  # the loop says so
        except OSError as error:
            if not self._warned:
                self._warned = True
                log.warning("%s cannot be written, tools/status.py may take this run for dead: %s", self.path, error)


class ScalarHook(Hook):
    """Seconds per sample and mean scores of each batch, for the visualisation backends."""

    def after_test_iter(
        self, runner: AttributionRunner, batch_idx: int, data_batch: Batch | None = None, outputs: Any = None
    ) -> None:
        if not outputs.uids:
            return
        scalars = {f"{outputs.stage}/seconds_per_sample": outputs.seconds / len(outputs.uids)}
        if outputs.stage != "maps":
            scalars |= {f"{outputs.stage}/{k}": float(v.mean()) for k, v in outputs.arrays.items() if v.ndim == 1}
        runner.visualizer.add_scalars(scalars, step=batch_idx)


class PictureHook(Hook):
    """``masks/<map>/<uid>.png``: each map over its image, or below its sound; ``.html``: the words of a text.

    With ``run.png=true``. Drawn after each batch; at the end also for maps that were there already and have no picture.
    """

    def after_test_iter(
        self, runner: AttributionRunner, batch_idx: int, data_batch: Batch | None = None, outputs: Any = None
    ) -> None:
        if outputs.stage == "maps":
            for uid in outputs.uids:
                self._draw(runner, uid, batch_idx, replace=True)

    def after_test_epoch(self, runner: AttributionRunner, metrics: dict | None = None) -> None:
        for uid in runner.attribution.plan.uids:
            self._draw(runner, uid, 0, replace=False)

    def _draw(self, runner: AttributionRunner, uid: str, step: int, *, replace: bool) -> None:
        plan = runner.attribution.plan
        names = plan.experiment.method.MAPS
        dataset = plan.experiment.dataset
        suffix = ".html" if holds_texts(dataset) else ".png"
        paths = {name: picture_path(plan.cell.folder / "masks" / name, uid, suffix) for name in names}
        if not replace and all(path.exists() for path in paths.values()):
            return
        try:
            arrays = plan.cell.maps.read(plan.key(uid), names)
            if holds_texts(dataset):
                tokens = dataset.tokens(uid)
                for name, path in paths.items():
                    write_atomic(path, words_page(uid, tokens, arrays[name]).encode())
                return
            if holds_sounds(dataset):
                paint = functools.partial(draw, dataset.wave(uid), dataset.rate)
            else:
                assert holds_images(dataset)
                paint = functools.partial(overlay, dataset.picture(uid))
            roi = dataset.batch([uid]).roi
        except (KeyError, OSError, SampleError):
            return  # no map, or not readable: the ledger says why
        for name, path in paths.items():
            image = paint(arrays[name], roi[0].numpy() if roi is not None else None)
            write_atomic(path, png(image))
            runner.visualizer.add_image(f"{name}/{path.stem}", image, step=step)


class DocumentHook(Hook):
    """``<document>/<uid>.json``: what the method wrote of each sample; at the end also of samples without a file."""

    def after_test_iter(
        self, runner: AttributionRunner, batch_idx: int, data_batch: Batch | None = None, outputs: Any = None
    ) -> None:
        plan = runner.attribution.plan
        for name in plan.experiment.method.DOCUMENTS if outputs.stage == "maps" else ():
            for uid, document in zip(outputs.uids, outputs.arrays.get(name, ())):
                write_atomic(picture_path(plan.cell.folder / name, uid, ".json"), document.tobytes() + b"\n")

    def after_test_epoch(self, runner: AttributionRunner, metrics: dict | None = None) -> None:
        plan = runner.attribution.plan
        for name in plan.experiment.method.DOCUMENTS:
            for uid in plan.uids:
                path = picture_path(plan.cell.folder / name, uid, ".json")
                try:
                    if not path.exists():
                        write_atomic(path, plan.cell.maps.read(plan.key(uid), [name])[name].tobytes() + b"\n")
                except (KeyError, OSError):
                    continue  # no map, or not readable: the ledger says why


def standard_hooks(*, progress: bool, png: bool) -> list[Hook]:
    return [ScalarHook(), DocumentHook(), *([ProgressHook()] if progress else ()), *([PictureHook()] if png else ())]
