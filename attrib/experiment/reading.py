"""Samples as their dataset gives them: read ahead on all cores, and kept for the stages that read them again."""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

import torch

from attrib.datasets import Dataset, ImageDataset, holds_texts
from attrib.process.free_memory import free_memory
from attrib.types import Batch, UserError

PATIENCE = 2.0  # seconds that whoever stops early gives to what is being read: on a dead file server it may hang
PIECE = 8  # samples that a thread reads at a time
MOST_READERS = 16
AHEAD, ROOM = 2, 2**30  # batches that are read ahead in any case, and bytes that more of them may take
SHARE, MOST_KEPT = 1 / 8, 2 * 2**30  # of the free memory, and bytes however much that is

Loaded = tuple[Batch | None, list[tuple[str, str]]]  # what could be read; (uid, reason) of what could not


def readers() -> int:
    """How many threads read: one for each core that this process may use, at least 2 and at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(cores, MOST_READERS))


def can_be_kept(dataset: Dataset) -> bool:
    """Whether a sample is the same in every batch: a user's dataset may pad its images to the largest of a batch."""
    return isinstance(dataset, ImageDataset) and type(dataset).batch is ImageDataset.batch


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

    def of(self, uid: str, read: Callable[[Sequence[str]], Batch]) -> Batch:
        """The sample as a batch of one: as it was kept, or read, and kept if there is room. Not to be changed."""
        row = self._rows.get(uid)
        if row is None:
            row = read([uid])
            with self._lock:
                if uid not in self._rows and row.bytes <= self._left:
                    self._rows[uid] = row
                    self._left -= row.bytes
        return row


class Reader:
    """What reads the samples of a dataset, also several batches ahead. A bad sample costs the others nothing.

    inputs   false: the regions of images are read and not the images, so that ``Batch.x`` is (B, 0, H, W)
    kept     where decoded images are looked for first, and left for others; for a dataset that ``can_be_kept``
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
        if self._kept is not None:
            rows = [self._kept.of(uid, self.dataset.batch) for uid in uids]
            with suppress(ValueError, RuntimeError):  # the dataset knows how they go together
                return Batch.joined(rows)
        return self.dataset.batch(uids)

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
        """Each chunk of uids as ``read`` gives it. While one is worked on, the next two are read; if that leaves
        threads idle, more of them, as far as they take no more than 1 GiB."""
        # Threads of the first pool wait for those of the second, so that no thread waits for one of its own kind.
        whole, parts = (ThreadPoolExecutor(self._threads, f"attrib-{kind}") for kind in ("batches", "parts"))
        waiting: deque[Future[Loaded]] = deque()
        reading: set[Future[Any]] = set()
        rest, most = iter(chunks), AHEAD  # until it is known how large a batch is

        def begin() -> None:
            for chunk in itertools.islice(rest, max(0, most + 1 - len(waiting))):
                waiting.append(whole.submit(self._in_parts, chunk, parts, reading))

        try:
            begin()
            while waiting:
                batch, bad = waiting[0].result()
                if batch is not None:
                    busy = self._threads // math.ceil(len(batch) / PIECE)
                    most = max(AHEAD, min(busy, ROOM // max(1, batch.bytes)))
                begin()
                yield batch, bad
                waiting.popleft()
                begin()
        finally:
            for pool in (whole, parts):
                pool.shutdown(wait=False, cancel_futures=True)
            left = [future for future in (*waiting, *reading) if not future.cancelled()]
            if not wait(left, PATIENCE).not_done:
                whole.shutdown()
                parts.shutdown()

    def _in_parts(self, uids: Sequence[str], pool: ThreadPoolExecutor, reading: set[Future[Any]]) -> Loaded:
        """``read`` by several threads; texts by one, because a batch of them is padded to its longest."""
        alone = len(uids) <= PIECE or holds_texts(self.dataset)
        batch, bad = self.read(uids) if alone else self._joined(uids, pool, reading)
        return (batch.pinned() if self._pinned and batch is not None else batch), bad

    def _joined(self, uids: Sequence[str], pool: ThreadPoolExecutor, reading: set[Future[Any]]) -> Loaded:
        pieces = [pool.submit(self.read, uids[i : i + PIECE]) for i in range(0, len(uids), PIECE)]
        for piece in pieces:
            reading.add(piece)
            piece.add_done_callback(reading.discard)
        found = [piece.result() for piece in pieces]
        good = [batch for batch, _ in found if batch is not None]
        try:
            return (Batch.joined(good) if good else None), [each for _, bad in found for each in bad]
        except (ValueError, RuntimeError):  # the dataset may know how they go together
            return self.read(uids)
