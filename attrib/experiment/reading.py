"""Samples as their dataset gives them: read ahead on all cores, and kept for the stages that read them again."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from attrib.datasets import Dataset, holds_texts
from attrib.process.free_memory import free_memory
from attrib.types import Batch, UserError

PATIENCE = 2.0  # seconds that whoever stops early gives to what is being read: on a dead file server it may hang
PIECE = 8  # samples that a thread reads at a time
MOST_READERS = 16
SHARE, MOST_KEPT = 1 / 8, 2 * 2**30  # of the free memory, and bytes however much that is

Loaded = tuple[Batch | None, list[tuple[str, str]]]  # what could be read; (uid, reason) of what could not


def readers() -> int:
    """How many threads read: one for each core that this process may use, at least 2 and at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(cores, MOST_READERS))


class Kept:
    """Decoded images, for the stages of a run that need them again: those that came first, until there is no room.

    Not those that were used last, as in other caches: stages go through the samples from the first to the last, so each
    would throw out what the next one needs.

    room   bytes; by default an eighth of the free memory, at most 2 GiB
    """

    def __init__(self, room: int | None = None) -> None:
        if room is None:
            room = min(MOST_KEPT, int(SHARE * (free_memory(torch.device("cpu")) or 0)))
        self._left, self._rows, self._lock = room, dict[str, Batch](), threading.Lock()

    def add(self, batch: Batch) -> None:
        for i, uid in enumerate(batch.uids):
            row = batch[[i]]  # a copy
            with self._lock:
                if uid not in self._rows and row.bytes <= self._left:
                    self._rows[uid] = row
                    self._left -= row.bytes

    def of(self, uids: Iterable[str]) -> dict[str, Batch]:
        """Those that are there, each as a batch of one."""
        return {uid: self._rows[uid] for uid in uids if uid in self._rows}


class Reader:
    """What reads the samples of a dataset, also several batches ahead. A bad sample costs the others nothing.

    inputs   false: the regions of images are read and not the images, so that ``Batch.x`` is (B, 0, H, W)
    kept     where decoded images are looked for first, and left for others
    pinned   whether batches lie in memory from which a GPU copies while the CPU goes on
    """

    def __init__(self, dataset: Dataset, *, inputs: bool = True, kept: Kept | None = None, pinned: bool = False):
        self.dataset, self.inputs = dataset, inputs
        self._kept = kept if inputs else None
        self._pinned = pinned
        self._threads = readers()

    def batch(self, uids: Sequence[str]) -> Batch:
        """Raises what the dataset raises."""
        roi = None if self.inputs else self.dataset.regions(uids)  # type: ignore[attr-defined]
        if roi is not None:
            nothing = torch.empty(len(uids), 0, *roi.shape[1:])
            return Batch(tuple(uids), nothing, torch.full((len(uids),), -1), roi)
        if self._kept is None:
            return self.dataset.batch(uids)
        there = self._kept.of(uids)
        missing = [uid for uid in uids if uid not in there]
        if missing:
            read = self.dataset.batch(missing)
            self._kept.add(read)
            if not there:
                return read
            there |= {uid: read[[i]] for i, uid in enumerate(missing)}
        return Batch.joined([there[uid] for uid in uids])

    def read(self, uids: Sequence[str]) -> Loaded:
        """All that can be read. Raises UserError if the samples do not go together."""
        try:
            return self.batch(uids), []
        except Exception as error:  # a user's dataset may raise anything
            if isinstance(error, UserError):
                raise
            if len(uids) == 1:
                return None, [(uids[0], f"{type(error).__name__}: {error}")]
        good, bad = [], []
        for uid in uids:
            batch, failed = self.read([uid])
            bad += failed
            good += [uid] if batch is not None else []
        if not good:
            return None, bad
        try:
            return self.batch(good), bad
        except Exception as error:
            raise UserError(
                f"samples {good[0]} to {good[-1]} can be read one by one, but not as a batch "
                f"({type(error).__name__}: {error}); try run.batch=1"
            ) from error

    def ahead(self, chunks: Iterable[Sequence[str]]) -> Generator[Loaded, None, None]:
        """Each chunk of uids as ``read`` gives it; while one is worked on, the threads read the next two or more."""
        # Threads of the first pool wait for those of the second, so that no thread waits for one of its own kind.
        whole, parts = ThreadPoolExecutor(self._threads), ThreadPoolExecutor(self._threads)
        waiting: deque[Future[Loaded]] = deque()
        try:
            for chunk in chunks:
                waiting.append(whole.submit(self._in_parts, chunk, parts))
                if len(waiting) > max(2, self._threads // math.ceil(len(chunk) / PIECE)):
                    yield waiting[0].result()
                    waiting.popleft()
            while waiting:
                yield waiting[0].result()
                waiting.popleft()
        finally:
            for pool in (whole, parts):
                pool.shutdown(wait=False, cancel_futures=True)
            if not wait([f for f in waiting if not f.cancelled()], PATIENCE).not_done:
                whole.shutdown()
                parts.shutdown()

    def _in_parts(self, uids: Sequence[str], pool: ThreadPoolExecutor) -> Loaded:
        """``read`` by several threads; texts by one, because a batch of them is padded to its longest."""
        if len(uids) <= PIECE or holds_texts(self.dataset):
            return self._pin(self.read(uids))
        pieces = list(pool.map(self.read, (uids[i : i + PIECE] for i in range(0, len(uids), PIECE))))
        good = [batch for batch, _ in pieces if batch is not None]
        try:
            return self._pin((Batch.joined(good) if good else None, [bad for _, failed in pieces for bad in failed]))
        except (ValueError, RuntimeError):  # the dataset may know how they go together
            return self._pin(self.read(uids))

    def _pin(self, loaded: Loaded) -> Loaded:
        batch, bad = loaded
        return (batch.pinned() if self._pinned and batch is not None else batch), bad
