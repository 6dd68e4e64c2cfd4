"""Running an experiment: maps first, then scores from the stored maps; only what is missing.

The loop is mmengine's: a ``Runner`` whose test loop walks over samples and calls hooks at its
usual moments, so that any mmengine ``Hook`` or ``VisBackend`` works (``run.hooks``,
``run.vis_backends``). The store decides what is missing, so a run may be killed at any moment.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import BaseLoop, Runner
from mmengine.utils.dl_utils import collect_env
from torch import Tensor, nn

from attrib import keys
from attrib.experiment import Experiment
from attrib.hooks import standard_hooks
from attrib.methods import State
from attrib.noise import Noise
from attrib.plan import Options, Plan, metric_folder, plan, spec_of
from attrib.samples import check_targets
from attrib.states import load_state
from attrib.store import Arrays, write_json
from attrib.types import Batch, SampleError, UserError

log = logging.getLogger(__name__)

PICTURES = 24  # inputs kept for the report, at most


@dataclass(frozen=True)
class Step:
    """What hooks get as ``outputs`` after each batch.

    stage    "maps", or the name of the metric
    arrays   stage "maps": every map and extra, (B, ...); else scores and curves of the last map
    done, total   samples of this stage
    """

    stage: str
    uids: tuple[str, ...]
    arrays: Mapping[str, np.ndarray]
    seconds: float
    done: int
    total: int


@dataclass
class Summary:
    """Samples (scores: samples x metrics) computed by this run, found already present, and failed."""

    maps_computed: int = 0
    maps_present: int = 0
    scores_computed: int = 0
    scores_present: int = 0
    failed: int = 0

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(self).items())


class _Loop(BaseLoop):
    """Maps, then each metric, over the samples that miss them."""

    def __init__(self, runner: AttributionRunner, work: Plan, state: State, options: Options) -> None:
        super().__init__(runner, dataloader=[])
        self.plan, self.state, self.options = work, state, options
        self.summary = Summary()
        self.stage, self.total = "", 0  # what is being done, and for how many samples
        self.samples = work.experiment.samples(work.uids, options.batch)
        self._failed: set[tuple[str, str]] = set()
        self._iteration = 0

    def run(self) -> dict[str, float]:
        self.runner.call_hook("before_test")
        self.runner.call_hook("before_test_epoch")
        self._maps()
        for name in self.plan.experiment.metrics:
            self._scores(name)
        self.runner.call_hook("after_test_epoch", metrics=dataclasses.asdict(self.summary))
        self.runner.call_hook("after_test")
        return dataclasses.asdict(self.summary)

    # ---- one stage ----------------------------------------------------------------------------

    def _fail(self, uid: str, stage: str, reason: str) -> None:
        self.plan.cell.ledger.add(uid, self.plan.fingerprints[uid], stage, reason)
        self._failed.add((uid, stage))
        self.summary.failed = len(self._failed)
        log.warning("%s failed for %s: %s", stage, uid, reason)

    def _alone_if_needed(self, stage: str, batch: Batch, work: Callable[[Batch], Mapping[str, np.ndarray]]) -> Any:
        """``work(batch)``; if it fails, each sample alone, so that only the guilty ones are lost."""
        try:
            return work(batch)
        except UserError:
            raise
        except Exception as error:  # a method or metric may raise anything
            if len(batch) == 1:
                if not isinstance(error, SampleError):
                    log.exception("%s of %s", stage, batch.uids[0])
                self._fail(batch.uids[0], stage, f"{type(error).__name__}: {error}")
                return {}
        result: Mapping[str, np.ndarray] = {}
        for i in range(len(batch)):
            result = self._alone_if_needed(stage, batch[[i]], work) or result
        return result

    def _walk(
        self,
        stage: str,
        todo: Sequence[str],
        work: Callable[[Batch], Mapping[str, np.ndarray]],
        already: Callable[[], set[str]],
    ) -> None:
        """``work`` on every sample of ``todo``, in batches, with hooks before and after each.

        ``stage`` is "maps" or a metric's score folder, ``<name>.<key8>``; the ledger notes it.
        """
        done = 0
        self.stage, self.total = stage.rpartition(".")[0] or stage, len(todo)
        for chunk, (batch, unread) in zip(self.samples.chunks(todo), self.samples.load(self.samples.chunks(todo))):
            start = time.perf_counter()
            for uid, reason in unread:
                self._fail(uid, "load", reason)
            if batch is not None:
                others = already()  # another process may share the cell
                batch = batch[[i for i, uid in enumerate(batch.uids) if uid not in others]] if others else batch
            arrays: Mapping[str, np.ndarray] = {}
            if batch is not None and len(batch):
                self.runner.call_hook("before_test_iter", batch_idx=self._iteration, data_batch=batch)
                arrays = self._alone_if_needed(stage, batch, work)
            done += len(chunk)
            uids = batch.uids if batch is not None else ()
            step = Step(self.stage, uids, arrays, time.perf_counter() - start, done, self.total)
            self.runner.call_hook("after_test_iter", batch_idx=self._iteration, data_batch=batch, outputs=step)
            self._iteration += 1

    # ---- maps ---------------------------------------------------------------------------------

    def _maps(self) -> None:
        work, cell = self.plan, self.plan.cell
        experiment = work.experiment
        todo = [u for u in work.uids if u not in work.present]
        self.summary.maps_present = len(work.uids) - len(todo)
        if todo:
            self._keep_pictures()

        def explain(batch: Batch) -> Mapping[str, np.ndarray]:
            model, method = experiment.model, experiment.method
            start, passed = time.perf_counter(), model.passed
            noise = Noise(batch.uids, experiment.seed, model.device, model.dtype)
            found = method.attribute(model, batch, self.state, noise)
            arrays = {name: value.detach().float().cpu().numpy() for name, value in found.items()}
            self._check_maps(batch, arrays)
            cost = {
                "seconds": (time.perf_counter() - start) / len(batch),
                "rows": (model.passed - passed) / len(batch),
            }
            bad = np.zeros(len(batch), dtype=bool)
            for name in method.MAPS:
                bad |= ~np.isfinite(arrays[name]).reshape(len(batch), -1).all(1)
            for i, uid in enumerate(batch.uids):
                if bad[i]:
                    self._fail(uid, "maps", "the map has NaN or infinite values")
                    continue
                one = {name: value[i] for name, value in arrays.items()}
                cell.maps.add(uid, work.fingerprints[uid], one, target=_plain(batch.target[i]), **cost)
                self.summary.maps_computed += 1
            cell.maps.flush_if_due()
            return arrays

        try:
            self._walk("maps", todo, explain, self._present)
        finally:
            cell.maps.flush()

    def _present(self) -> set[str]:
        return {u for u, fingerprint in self.plan.cell.maps.index() if self.plan.fingerprints.get(u) == fingerprint}

    def _check_maps(self, batch: Batch, arrays: Mapping[str, np.ndarray]) -> None:
        """What a user's own method may get wrong."""
        method = self.plan.experiment.method
        name = type(method).__name__
        declared = {*method.MAPS, *method.EXTRAS}
        if set(arrays) != declared:
            raise UserError(f"{name}.attribute returned {sorted(arrays)}, but MAPS and EXTRAS say {sorted(declared)}")
        for key, value in arrays.items():
            spatial = key not in method.MAPS or value.shape[1:] == tuple(batch.x.shape[-(value.ndim - 1) :])
            if value.shape[:1] != (len(batch),) or not spatial or (key in method.MAPS and value.ndim < 2):
                raise UserError(f"{name}: {key} has shape {value.shape} for inputs {tuple(batch.x.shape)}")

    def _keep_pictures(self) -> None:
        """The first inputs as the network sees them, so that a report needs no dataset."""
        experiment = self.plan.experiment
        folder = Path(self.options.root) / "state" / f"pictures.{experiment.dataset_key[:8]}"
        pictures = Arrays(folder, self.plan.cell.writer)
        present = pictures.index()
        for uid in self.plan.uids[:PICTURES]:
            if (uid, "") in present:
                continue
            try:
                batch = self.samples.batch([uid])
                arrays = {"image": experiment.dataset.picture(uid)}
            except SampleError:
                continue  # the ledger will say so when its map is due
            check_targets(batch, experiment.model.logits(batch.x).shape[1])
            if batch.roi is not None and batch.roi.any():
                arrays["roi"] = batch.roi[0].cpu().numpy()
            target = _plain(batch.target[0])
            name = experiment.dataset.names.get(target, "") if isinstance(target, int) else ""
            pictures.add(uid, "", arrays, name=name, target=target)
        pictures.flush()

    # ---- scores -------------------------------------------------------------------------------

    def _scores(self, name: str) -> None:
        work, cell = self.plan, self.plan.cell
        experiment = work.experiment
        metric, folder = experiment.metrics[name], metric_folder(experiment, name)
        stored = cell.maps.index()
        done = work.scored[name]
        self.summary.scores_present += len(done)
        todo = [u for u in work.uids if u not in done and work.key(u) in stored]
        if not todo:
            return
        rows, curves = cell.scores(folder), cell.curves(folder)
        if not (rows.folder / "metric.json").exists():
            declared = {"columns": dict(metric.COLUMNS), "curves": dict(metric.CURVES)}
            write_json(rows.folder / "metric.json", {"name": name, "spec": keys.spec(metric), **declared})

        def judge(batch: Batch) -> Mapping[str, np.ndarray]:
            start = time.perf_counter()
            values: list[dict[tuple[str, str], float]] = [{} for _ in batch.uids]
            lines: list[dict[str, np.ndarray]] = [{} for _ in batch.uids]
            read = [cell.maps.read(work.key(u), experiment.method.MAPS) for u in batch.uids]
            scored: dict[str, np.ndarray] = {}
            for kind in experiment.method.MAPS:
                maps = torch.from_numpy(np.stack([r[kind] for r in read])).to(batch.x)
                noise = Noise(batch.uids, experiment.seed, batch.x.device, batch.x.dtype).child(name)
                found: Mapping[str, Tensor] = metric.score(experiment.model, batch, maps, noise)
                scored = {key: value.detach().cpu().double().numpy() for key, value in found.items()}
                for i in range(len(batch)):
                    values[i] |= {(kind, c): float(scored[c][i]) for c in metric.COLUMNS}
                    lines[i] |= {f"{kind}/{c}": scored[c][i].astype(np.float32) for c in metric.CURVES}
            seconds = (time.perf_counter() - start) / len(batch)
            for i, uid in enumerate(batch.uids):
                if not all(np.isfinite(list(values[i].values()))):
                    self._fail(uid, folder, _why_undefined(batch, i))
                    continue
                curves.add(uid, work.fingerprints[uid], lines[i], seconds=seconds)
                rows.add(uid, work.fingerprints[uid], values[i])
                self.summary.scores_computed += 1
            # Curves first: a sample whose rows are there has its curves too.
            if curves.flush_if_due():
                rows.flush()
            return scored

        try:
            self._walk(folder, todo, judge, set)
        finally:
            curves.flush()
            rows.flush()


def _why_undefined(batch: Batch, i: int) -> str:
    if batch.roi is None or not batch.roi[i].any():
        return "the score is not defined (NaN); the sample has no region of interest"
    return "the score is not defined (NaN) for this map"


def _plain(target: Tensor) -> int | list[int]:
    return int(target) if target.ndim == 0 else [int(t) for t in target]


class AttributionRunner(Runner):
    """mmengine's runner with what it gets wrong for frozen models on one CPU put right."""

    def __init__(self, net: nn.Module, folder: Path, name: str, options: Options, seed: int) -> None:
        self._run_name = folder.name
        self.attribution: _Loop | None = None
        unused = ("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint")
        super().__init__(
            model=net,
            work_dir=str(folder.parent),
            test_dataloader=[],
            test_evaluator=[],
            test_cfg={},
            default_hooks=dict.fromkeys(unused),  # training hooks, which would run in a test loop too
            custom_hooks=[*standard_hooks(progress=options.progress, png=options.png), *options.hooks],
            visualizer={"type": "Visualizer", "vis_backends": list(options.vis_backends), "save_dir": str(folder)},
            env_cfg={"cudnn_benchmark": False},
            randomness={"seed": seed},
            # Two runners of one second share their logger and visualizer, unless their names differ.
            experiment_name=f"{name}.{folder.name}",
            cfg=Config(),
        )
        for hook in self.hooks:
            if not isinstance(hook, Hook):
                raise UserError(f"run.hooks: {hook!r} is not an mmengine Hook")

    def setup_env(self, env_cfg: dict) -> None:
        super().setup_env(env_cfg)
        self._timestamp = self._run_name  # names mmengine's log folder, which is our run's folder

    def build_logger(self, *args: Any, **kwargs: Any) -> Any:
        """The log goes to the run's folder whole; only warnings disturb the progress bar."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                self.file_handler = handler
            else:
                handler.setLevel(logging.ERROR)
        return logger

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        return model  # mmengine would move it to a device of its choice

    def dump_config(self) -> None:
        """The composed configuration is written as config.json instead."""

    def _log_env(self, env_cfg: dict) -> None:
        found = {k: str(v) for k, v in _environment().items()}
        about = {"command": sys.argv, "machine": f"{platform.node()}, {platform.machine()}, {os.cpu_count()} cores"}
        write_json(Path(self.log_dir) / "environment.json", {**found, **about})

    def build_test_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        return self.attribution

    def attribute(self, work: Plan, state: State, options: Options) -> Summary:
        self.attribution = _Loop(self, work, state, options)
        self.test()
        return self.attribution.summary


@functools.cache
def _environment() -> Mapping[str, Any]:
    """Asks compilers and drivers for their versions, which takes seconds: once per process."""
    return collect_env()


def run(experiment: Experiment, options: Options) -> Summary:
    """Compute what is missing of one cell and leave a record under ``runs/``.

    Raises UserError for what a person must put right; samples that fail are in the summary, the
    ledger and, with ``strict``, in the exit status of the tool.
    """
    # TF32 rounds to 10 bits: a GPU would give other numbers than a CPU.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    start = time.time()
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(start))
    writer = f"{stamp}-{os.getpid()}-{options.shard}-{secrets.token_hex(2)}"
    work = plan(experiment, options, writer)
    folder = work.cell.folder / "runs" / writer
    work.cell.write_spec(spec_of(work))
    work.cell.write_samples(work.selected)
    write_json(folder / "config.json", {**experiment.config, "run": _options_record(options)})
    runner = AttributionRunner(experiment.model.module, folder, work.cell.folder.name, options, experiment.seed)
    package = logging.getLogger("attrib")
    package.addHandler(runner.file_handler)
    summary, finished = Summary(), False
    try:
        state: State = {}
        if work.state_key is not None and len(work.present) < len(work.uids):
            samples = experiment.estimation_samples(options.batch)
            state = load_state(Path(options.root), work.state_key, experiment.method.fit, experiment.model, samples)
        runner.attribute(work, state, options)
        finished = True
    finally:
        if runner.attribution is not None:
            summary = runner.attribution.summary  # also of a run that was interrupted
        record = {"finished": finished, "seconds": time.time() - start, "cell": work.cell.folder.name}
        write_json(folder / "summary.json", {**dataclasses.asdict(summary), **record})
        package.removeHandler(runner.file_handler)
        runner.visualizer.close()
        runner.file_handler.close()
    return summary


def _options_record(options: Options) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(options), default=repr))
