"""The loop: maps, then each metric, over the samples that miss them, with hooks and a failure ledger."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mmengine.runner import BaseLoop
from torch import Tensor

from attrib import keys
from attrib.fit import State
from attrib.metrics import Explain, Explaining
from attrib.models.classifier import is_out_of_memory, release_memory
from attrib.noise import Noise
from attrib.process.signals import Interrupted, Stop
from attrib.running.batch_size import Budget
from attrib.running.costs import Meter
from attrib.running.documents import own_scores, packed
from attrib.running.kept_inputs import keep_inputs, plain
from attrib.running.options import Options
from attrib.running.plan import Plan, metric_folder
from attrib.running.summary import Step, Summary
from attrib.store.cell import DamagedError, ScoreRows
from attrib.store.damaged import recover
from attrib.store.files import Buffered, Key, write_json
from attrib.types import Batch, SampleError, UserError

if TYPE_CHECKING:
    from attrib.running.runner import AttributionRunner

log = logging.getLogger(__name__)

NO_ROOM = (
    "this sample does not fit into memory even alone; take fewer draws, a smaller input (model.input.size) or layer, "
    "run.dtype=float32, or a device with more memory"
)

Done = tuple[tuple[str, ...], Mapping[str, np.ndarray]]  # the samples that succeeded, and their arrays
Work = Callable[[Batch], Done]
Present = Callable[[Sequence[str]], set[str]]


class Loop(BaseLoop):
    """Maps, then each metric, over the samples that miss them."""

    def __init__(
        self, runner: AttributionRunner, work: Plan, state: Callable[[], State], options: Options, stop: Stop
    ) -> None:
        super().__init__(runner, dataloader=[])
        self.plan, self.state, self.options, self.stop = work, state, options, stop
        self.summary = Summary()
        self.stage, self.total = "", 0  # what is being done, and for how many samples
        self.samples = work.experiment.samples(work.uids, options.read)
        self._budget = Budget(options.batch, work.experiment.model)
        self._meter = Meter(work.experiment.model)
        self.at_once: int | None = None  # samples explained at once, at the end; None if none had to be
        self._failed: set[tuple[str, str]] = set()
        self._left: dict[str, int] = {}  # stage that was begun -> samples still to do
        self._lost: dict[Key, Mapping[str, Any]] = {}  # maps that were damaged -> what was noted beside them
        self._buffers: list[Buffered] = [work.cell.maps]  # of the stages that were begun
        self._iteration = 0

    def run(self) -> dict[str, float]:
        self.runner.call_hook("before_test")
        self.runner.call_hook("before_test_epoch")
        try:
            missing = [u for u in self.plan.uids if u not in self.plan.present]
            self.summary.maps_present = len(self.plan.uids) - len(missing)
            self._maps(missing)
            if not (self.stop() and self.left):
                own_scores(self.plan, self._stored)
            for name in self.plan.experiment.metrics:
                self._scores(name)
            if lost := [u for u in self.plan.uids if self.plan.key(u) in self._lost]:
                self._maps(lost)  # of which no score was asked for
            if self.stop() and self.left:
                self.summary.stopped = self.stop.name
            else:
                self.runner.call_hook("after_test_epoch", metrics=dataclasses.asdict(self.summary))
        except Interrupted:
            self.summary.stopped = self.stop.name
        self.runner.call_hook("after_test")
        return dataclasses.asdict(self.summary)

    @property
    def left(self) -> int:
        """Maps and scores that are still to be done."""
        experiment = self.plan.experiment
        mapless = {uid for uid, stage in self._failed if stage in ("load", "maps")}
        count = sum(self._left.values())
        if "maps" not in self._left:
            count += len(self.plan.uids) - len(self.plan.present)
        for name in experiment.metrics:
            if metric_folder(experiment, name) not in self._left:
                done = self.plan.scored[name]
                count += sum(u not in done and u not in mapless for u in self.plan.uids)
        return count

    @property
    def unwritten(self) -> int:
        """Maps and scores that were computed, but that the disk did not take."""
        return sum(buffer.unwritten for buffer in self._buffers)

    # ---- one stage ----------------------------------------------------------------------------

    def _fail(self, uid: str, stage: str, reason: str) -> None:
        self.plan.cell.ledger.add(uid, self.plan.fingerprints[uid], stage, reason)
        if stage in self._left:
            self._left[stage] -= 1
        self._failed.add((uid, stage))
        self.summary.failed = len(self._failed)
        log.warning("%s failed for %s: %s", stage, uid, reason)

    def _attempt(self, stage: str, batch: Batch, work: Work) -> Done:
        """``work(batch)``, or in pieces.

        If memory runs out, half as many samples at once from now on; after any other error each
        sample of the batch alone, so that only the guilty ones are lost.
        """
        model, budget = self.plan.experiment.model, self._budget
        if len(batch) > budget.most:
            return self._pieces(stage, batch, work, budget.most)
        rows = model.rows
        try:
            return work(batch)
        except UserError:
            raise
        except Exception as error:  # a method or metric may raise anything
            full = is_out_of_memory(error)
            if len(batch) == 1 and not full and not isinstance(error, SampleError):
                log.exception("%s of %s", stage, batch.uids[0])
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if full and str(error) else error}"
        if full:  # outside the except block, whose traceback keeps the batch's tensors alive
            release_memory(model.device)
            model.rows = rows  # halved in vain, perhaps to one: it was the samples that had no room
        if len(batch) == 1:
            self._fail(batch.uids[0], stage, f"{reason}; {NO_ROOM}" if full else reason)
            return (), {}
        if full:
            budget.halve(len(batch))
        return self._pieces(stage, batch, work, budget.most if full else 1)

    def _pieces(self, stage: str, batch: Batch, work: Work, size: int) -> Done:
        uids: tuple[str, ...] = ()
        parts: dict[str, list[np.ndarray]] = {}
        start = 0
        while start < len(batch) and not (start and self.stop()):
            stop = start + min(size, self._budget.most)
            succeeded, arrays = self._attempt(stage, batch[start:stop], work)
            start = stop
            uids += succeeded
            for name, value in arrays.items():
                parts.setdefault(name, []).append(value)
        return uids, {name: np.concatenate(values) for name, values in parts.items()}

    def _walk(self, stage: str, todo: Sequence[str], work: Work, present: Present, flush: Callable[[], object]) -> None:
        """``work`` on every sample of ``todo``, in batches, with hooks before and after each.

        stage     "maps" or a metric's score folder, ``<name>.<key8>``; the ledger notes it
        present   which of these samples another process has done meanwhile
        flush     called between batches; what it raises is the disk's fault, not a sample's
        Ends early when told to stop.
        """
        experiment, maps = self.plan.experiment, stage == "maps"
        self.stage, self.total, done = stage.rpartition(".")[0] or stage, len(todo), 0
        self._left[stage] = len(todo)
        samples = self.samples if maps else experiment.stored_samples(todo, self.options.read)
        explains = maps or isinstance(experiment.metrics[self.stage], Explaining)
        self._budget = Budget(self.options.batch, experiment.model, experiment.method if explains else None)
        for portion in self._budget.portions(self._by_length(todo)):
            for batch, unread in samples.load(self._budget.chunks(portion)):
                if self.stop():
                    return
                start = time.perf_counter()
                done += len(unread) + (len(batch) if batch is not None else 0)
                for uid, reason in unread:
                    self._fail(uid, "load", reason)
                self._left[stage] -= len(unread)
                uids: tuple[str, ...] = ()
                arrays: Mapping[str, np.ndarray] = {}
                if batch is not None:
                    self.plan.refresh_fingerprints(batch.uids)
                    others = present(batch.uids)
                    self._left[stage] -= len(others)
                    batch = batch[[i for i, uid in enumerate(batch.uids) if uid not in others]] if others else batch
                if batch is not None and len(batch):
                    self.runner.call_hook("before_test_iter", batch_idx=self._iteration, data_batch=batch)
                    self._budget.ask(batch)
                    uids, arrays = self._attempt(stage, batch, work)
                    self._budget.succeeded += len(uids)
                    if uids != batch.uids:
                        batch = batch[[batch.uids.index(uid) for uid in uids]]
                step = Step(self.stage, uids, arrays, time.perf_counter() - start, done, self.total)
                self.runner.call_hook("after_test_iter", batch_idx=self._iteration, data_batch=batch, outputs=step)
                self._iteration += 1
                with self.stop.deferred():
                    flush()
                if self.stop():
                    return  # before the next batch is waited for

    def _by_length(self, uids: Sequence[str]) -> Sequence[str]:
        """Texts by their length, because a batch is padded to its longest; the order does not matter otherwise.

        The longest first: what fits them fits the others too.
        """
        dataset = self.plan.experiment.dataset
        if dataset.modality != "text" or self.options.batch == 1:
            return uids

        def length(uid: str) -> int:
            try:
                return len(dataset.tokens(uid))
            except Exception:  # a user's dataset may raise anything
                return 0  # the ledger will say so

        return sorted(uids, key=lambda uid: (-length(uid), uid))

    # ---- maps ---------------------------------------------------------------------------------

    def _maps(self, todo: Sequence[str]) -> None:
        maps = self.plan.cell.maps
        if todo:
            keep_inputs(self.plan, self.samples, Path(self.options.root))
        with self.stop.deferred():
            try:
                with self.stop.finishing():
                    self._walk("maps", todo, self._mapped, self._present, maps.flush_if_due)
            finally:
                maps.flush()
                self.at_once = self._budget.most if todo else self.at_once

    def _mapped(self, batch: Batch) -> Done:
        """Explain a batch and store its maps."""
        work, experiment = self.plan, self.plan.experiment
        method = experiment.method
        self._meter.begin()
        found = experiment.explain(batch, self.state())
        documents = {name: packed(found[name]) for name in method.DOCUMENTS if name in found}
        arrays = documents | {n: v.detach().float().cpu().numpy() for n, v in found.items() if n not in documents}
        self._check_maps(batch, arrays)
        cost = self._meter.each(len(batch))
        finite = np.ones(len(batch), dtype=bool)
        for name in method.MAPS:
            finite &= np.isfinite(arrays[name]).reshape(len(batch), -1).all(1)
        for i, uid in enumerate(batch.uids):
            if not finite[i]:
                self._fail(uid, "maps", "the map has NaN or infinite values")
                continue
            length = None if batch.lengths is None else int(batch.lengths[i])
            per_token = () if length is None else (*method.MAPS, *method.TOKENS)
            one = {name: value[i, :length] if name in per_token else value[i] for name, value in arrays.items()}
            work.cell.maps.add(uid, work.fingerprints[uid], one, target=plain(batch.target[i]), **cost)
            self.summary.maps_computed += 1
            self._left["maps"] -= 1
            self._lost.pop(self.plan.key(uid), None)
        return _only(batch.uids, arrays, finite)

    def _present(self, uids: Sequence[str]) -> set[str]:
        index = self.plan.cell.maps.index(patient=True)
        return {u for u in uids if self.plan.key(u) in index}

    def _check_maps(self, batch: Batch, arrays: Mapping[str, np.ndarray]) -> None:
        """What a user's own method may get wrong."""
        method = self.plan.experiment.method
        name = type(method).__name__
        declared = {*method.MAPS, *method.EXTRAS, *method.DOCUMENTS}
        if set(arrays) != declared:
            raise UserError(f"{name}.attribute returned {sorted(arrays)}, but MAPS and EXTRAS say {sorted(declared)}")
        for key, value in arrays.items():
            spatial = key not in method.MAPS or value.shape[1:] == tuple(batch.x.shape[-(value.ndim - 1) :])
            if value.shape[:1] != (len(batch),) or not spatial or (key in method.MAPS and value.ndim < 2):
                raise UserError(f"{name}: {key} has shape {value.shape} for inputs {tuple(batch.x.shape)}")
            if batch.mask is not None and key in method.MAPS and value[~batch.mask.cpu().numpy()].any():
                raise UserError(f"{name}: {key} is not zero on the padding of the texts")

    def _stored(self, uid: str, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Stored arrays of a sample; what turns out to be damaged, or gone, is computed again.

        Raises SampleError if that fails, KeyError for what was never stored.
        """
        maps, key = self.plan.cell.maps, self.plan.key(uid)
        if key not in self._lost:
            try:
                return maps.read(key, names)
            except (DamagedError, FileNotFoundError):
                with self.stop.deferred():  # what was salvaged must be written
                    lost = recover(maps, maps.index()[key].path, Path(self.options.root))
                    self._lost |= lost
                    mine = {u for u in self.plan.uids if self.plan.key(u) in lost}
                    self._left["maps"] += len(mine)
                    self.summary.maps_present -= len(mine & self.plan.present)
        if key in self._lost:
            if (uid, "maps") not in self._failed:
                batch, target = self.samples.batch([uid]), [self._lost[key]["target"]]
                self._attempt("maps", dataclasses.replace(batch, target=batch.target.new_tensor(target)), self._mapped)
            if key in self._lost:
                raise SampleError("its map was damaged, and could not be computed again")
        return maps.read(key, names)

    # ---- scores -------------------------------------------------------------------------------

    def _scores(self, name: str) -> None:
        work, cell = self.plan, self.plan.cell
        experiment = work.experiment
        metric, folder = experiment.metrics[name], metric_folder(experiment, name)
        stored = cell.maps.index()
        done = work.scored[name]
        self.summary.scores_present += len(done)
        todo = [u for u in work.uids if u not in done and work.key(u) in stored]
        if self.stop() or not todo:
            return
        targets = {u: stored[work.key(u)].info["target"] for u in todo}  # what the map explains
        rows, curves = cell.scores(folder), cell.curves(folder)
        self._buffers.append(rows)
        if not (rows.folder / "metric.json").exists():
            declared = {"columns": dict(metric.COLUMNS), "curves": dict(metric.CURVES)}
            write_json(rows.folder / "metric.json", {"name": name, "spec": keys.spec(metric), **declared})

        def judge(batch: Batch) -> Done:
            start = time.perf_counter()
            target = torch.tensor([targets[u] for u in batch.uids], device=batch.x.device)
            batch = dataclasses.replace(batch, target=target)
            values: list[dict[tuple[str, str], float]] = [{} for _ in batch.uids]
            lines: list[dict[str, np.ndarray]] = [{} for _ in batch.uids]
            read = [self._stored(u, experiment.method.MAPS) for u in batch.uids]
            scored: dict[str, np.ndarray] = {}
            for kind in experiment.method.MAPS:
                maps = _stacked([r[kind] for r in read], batch).to(experiment.model.device, experiment.model.dtype)
                noise = Noise(batch.uids, experiment.seed, maps.device, maps.dtype).child(name)
                explain = {"explain": self._explain(kind)} if isinstance(metric, Explaining) else {}
                found: Mapping[str, Tensor] = metric.score(experiment.model, batch, maps, noise, **explain)
                scored = {key: value.detach().cpu().double().numpy() for key, value in found.items()}
                for i in range(len(batch)):
                    values[i] |= {(kind, c): float(scored[c][i]) for c in metric.COLUMNS}
                    lines[i] |= {f"{kind}/{c}": scored[c][i].astype(np.float32) for c in metric.CURVES}
            seconds = (time.perf_counter() - start) / len(batch)
            finite = np.array([all(np.isfinite(list(v.values()))) for v in values])
            for i, uid in enumerate(batch.uids):
                if not finite[i]:
                    self._fail(uid, folder, _why_undefined(batch, i))
                    continue
                curves.add(uid, work.fingerprints[uid], lines[i], seconds=seconds)
                rows.add(uid, work.fingerprints[uid], values[i])
                self.summary.scores_computed += 1
                self._left[folder] -= 1
            return _only(batch.uids, scored, finite)

        def flush() -> None:
            cell.maps.flush_if_due()  # those that had been damaged
            if curves.flush_if_due():  # curves first: a sample whose rows are there has its curves too
                rows.flush()

        with self.stop.deferred():
            try:
                with self.stop.finishing():
                    self._walk(folder, todo, judge, self._scored(rows), flush)
            finally:
                cell.maps.flush()
                curves.flush()
                rows.flush()

    def _explain(self, kind: str) -> Explain:
        """What a metric that asks for other maps gets: the method's map of this name."""
        return lambda batch: self.plan.experiment.explain(batch, self.state())[kind]

    def _scored(self, rows: ScoreRows) -> Present:
        """Asks the disk every half minute only: reading all rows costs more than a few samples done twice."""
        asked = time.monotonic()
        found: set[Key] = set()

        def present(uids: Sequence[str]) -> set[str]:
            nonlocal asked, found
            if time.monotonic() - asked > 30:
                asked, found = time.monotonic(), rows.present()
            return {u for u in uids if self.plan.key(u) in found}

        return present


def _stacked(maps: Sequence[np.ndarray], batch: Batch) -> Tensor:
    """One tensor; the maps of texts are stored at their own lengths, and get the batch's padding back."""
    if batch.lengths is not None:
        maps = [np.pad(m, (0, batch.x.shape[1] - len(m))) for m in maps]
    return torch.from_numpy(np.stack(maps))


def _only(uids: tuple[str, ...], arrays: Mapping[str, np.ndarray], keep: np.ndarray) -> Done:
    return tuple(u for u, k in zip(uids, keep) if k), {name: value[keep] for name, value in arrays.items()}


def _why_undefined(batch: Batch, i: int) -> str:
    if batch.roi is None or not batch.roi[i].any():
        return "the score is not defined (NaN); the sample has no region of interest"
    return "the score is not defined (NaN) for this map"
