"""The loop: maps, then each metric, over the samples that miss them, with mmengine's hooks around each batch."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from mmengine.runner import BaseLoop, Runner

from attrib.datasets import holds_texts
from attrib.experiment.samples import in_order
from attrib.fit import State
from attrib.process.signals import Interrupted, Stop
from attrib.running.options import Options
from attrib.running.plan import Plan
from attrib.running.stages import Maps, Scores, Shared, Stage, own_scores
from attrib.running.summary import Step
from attrib.store.workers import RUNNING, clock, workers


class Loop(BaseLoop):
    """Maps, then the method's own columns, then each metric.

    stage, total   what is being done, and for how many samples
    batch_size     samples explained at once, at the end; None if none had to be
    """

    def __init__(self, runner: Runner, plan: Plan, state: Callable[[], State], options: Options, stop: Stop) -> None:
        super().__init__(runner, dataloader=[])
        shared = Shared(plan, options, stop)
        self.plan, self.options, self.stop, self.summary = plan, options, stop, shared.summary
        self.stage, self.total = "", 0
        self.batch_size: int | None = None
        self._maps = Maps(shared, state)
        self._stages: list[Stage] = [self._maps, *(Scores(self._maps, name) for name in plan.experiment.metrics)]
        self._iteration = 0

    @property
    def left(self) -> int:
        """Maps and scores that are still to be done."""
        return sum(stage.left for stage in self._stages)

    @property
    def unwritten(self) -> int:
        """Maps and scores that were computed, but that the disk did not take."""
        return sum(stage.unwritten for stage in self._stages)

    def run(self) -> dict[str, float]:
        self.runner.call_hook("before_test")
        self.runner.call_hook("before_test_epoch")
        try:
            self._do(self._maps)
            if not (self.stop() and self.left):
                own_scores(self._maps)
            for stage in self._stages[1:]:
                self._do(stage)
            self._do(self._maps)  # that were damaged, and of which no score was asked for
            self.summary.all_failed = tuple(stage.name for stage in self._stages if stage.all_failed)
            if self.stop() and self.left:
                self.summary.stopped = self.stop.name
            else:
                self.runner.call_hook("after_test_epoch", metrics=dataclasses.asdict(self.summary))
        except Interrupted:
            self.summary.stopped = self.stop.name
        self.runner.call_hook("after_test")
        return dataclasses.asdict(self.summary)

    def _do(self, stage: Stage) -> None:
        """All that can be done of a stage; what is done is written, whatever happens."""
        todo = stage.todo()
        if self.stop() or not todo:
            return
        with self.stop.deferred():
            try:
                with self.stop.finishing():
                    self._walk(stage, todo)
            finally:
                self._maps.flush()  # also those that had been damaged
                stage.flush()
                if stage is self._maps:
                    self.batch_size = stage.budget.most

    def _walk(self, stage: Stage, todo: Sequence[str]) -> None:
        """Every sample of ``todo``, in batches, with hooks before and after each; ends early when told to stop.

        What writing raises between batches is the disk's fault, not a sample's.
        """
        self.plan.cell.check()
        samples, budget = stage.begin(todo), stage.budget
        self.stage, self.total, seen = stage.name, len(todo), 0
        order = self._apart(in_order(self.plan.experiment.dataset, todo, self.options.batch), budget.expected)
        for portion in budget.portions(order):
            for batch, unread in samples.load(budget.chunks(portion)):
                if self.stop():
                    return
                start = time.perf_counter()
                seen += len(unread) + (len(batch) if batch is not None else 0)
                for uid, reason in unread:
                    stage.fail(uid, reason, unread=True)
                uids: tuple[str, ...] = ()
                arrays: Mapping[str, np.ndarray] = {}
                if batch is not None:
                    self.plan.refresh_fingerprints(batch.uids)
                    others = stage.present(batch.uids)
                    stage.done |= others
                    batch = batch[[i for i, uid in enumerate(batch.uids) if uid not in others]] if others else batch
                if batch is not None and len(batch):
                    self.runner.call_hook("before_test_iter", batch_idx=self._iteration, data_batch=batch)
                    budget.ask(batch)
                    uids, arrays = stage.attempt(batch)
                    budget.succeeded += len(uids)
                    if uids != batch.uids:
                        batch = batch[[batch.uids.index(uid) for uid in uids]]
                self.plan.cell.check()  # before hooks write
                step = Step(self.stage, uids, arrays, time.perf_counter() - start, seen, self.total)
                self.runner.call_hook("after_test_iter", batch_idx=self._iteration, data_batch=batch, outputs=step)
                self._iteration += 1
                with self.stop.deferred():
                    self._maps.flush_if_due()
                    stage.flush_if_due()
                if self.stop():
                    return  # before the next batch is waited for

    def _apart(self, uids: Sequence[str], size: int) -> Sequence[str]:
        """The samples in another order of batches where another process is at work on the same ones.

        The order depends on the process, and each looks whether a sample is done before it begins it, so they share the
        work. Alone, samples come in the order in which they lie on disk. The first batch, of the longest texts, stays.
        """
        cell, mine = self.plan.cell, (self.options.shard, self.options.shards)
        found = workers(cell.folder, clock(Path(self.options.root)))
        others = [w for w in found if w.state == RUNNING and w.name != cell.writer]
        if not any((w.shard, w.shards) == mine or w.shards != mine[1] for w in others):
            return uids
        batches = [uids[start : start + size] for start in range(0, len(uids), size)]
        rest = batches[1:] if holds_texts(self.plan.experiment.dataset) else batches
        random.Random(cell.writer).shuffle(rest)
        return [uid for batch in (*batches[: len(batches) - len(rest)], *rest) for uid in batch]
