"""How many samples are explained at once: ``run.batch=auto``, and what is done when memory runs out.

``auto`` is the default on a GPU. Elsewhere that is 8: on a CPU more gains little, a kernel that is short of memory
kills instead of refusing, and two runs give the same bits whatever memory was free, as long as it is enough.

With ``auto`` one sample is explained alone first (of texts, the longest), and then

    B = min(run.rows, 0.5 * free / need), at least 1

free   bytes that this process may still take, found just before that sample. On a GPU: what the driver
       says is free, torch's cache being emptied first. On the CPU: the least of MemAvailable and of
       what the control groups of the process (a Slurm job, a container) leave it; files in the page
       cache that nobody reads any more count as free.
need   bytes per sample: the larger of what that sample took at its peak and of what the method says
       that it will take (``Method.bytes_per_sample``)

Half of the memory is left to others and to what was not foreseen. The peak of one sample counts the rows
that it sends through the net, although ``run.rows`` bounds those of all samples together, so B is
rather too small than too large.

A number stays what it is, unless the method says that so many samples do not fit at all.

None of this changes a number, or enters a key.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from attrib.methods import Method
from attrib.models import Classifier
from attrib.models.device_memory import is_lost, release_memory
from attrib.process.free_memory import Peak, free_memory
from attrib.process.memory import give_back
from attrib.running.options import FIXED
from attrib.types import Batch, UserError

log = logging.getLogger(__name__)

SHARE = 0.5  # of the free memory


def fitting(free: int, need: int, most: int) -> int:
    """Samples at once by the formula above, for at most ``most``."""
    return max(1, min(int(SHARE * free / need), most))


class Budget:
    """How many samples a stage of a run takes at once.

    most        so many from now on; see ``halve``
    open        ``run.batch=auto`` has not been decided yet; until then samples come one by one
    succeeded   how many samples did so far; the loop counts them
    method      whose word on ``bytes_per_sample`` counts; None for work that is not a method's
    """

    def __init__(self, batch: int | Literal["auto"] | None, model: Classifier, method: Method | None = None) -> None:
        self.model, self.method, self.succeeded = model, method, 0
        if batch is None:
            known = model.device.type != "cpu" and free_memory(model.device) is not None
            batch = "auto" if known else FIXED
        self.open = batch == "auto" and method is not None
        self.most = 1 if self.open else FIXED if batch == "auto" else batch
        self._declared: int | None = None
        self._asked = False

    @property
    def expected(self) -> int:
        """How many samples there will be at once, as far as that is known."""
        return FIXED if self.open else self.most

    def portions(self, uids: Sequence[str]) -> Iterator[Sequence[str]]:
        """The samples in their order; one portion is done before the next is asked for.

        With ``auto`` a portion is a single sample, which is measured, until one succeeds.
        """
        while self.open and uids:
            free, peak = _free(self.model.device), Peak(self.model.device)
            yield uids[:1]
            uids = uids[1:]
            if self.succeeded:
                self._decide(free, peak.bytes())
        if uids:
            yield uids

    def chunks(self, uids: Sequence[str]) -> Iterator[tuple[str, ...]]:
        """The samples of a portion, as many at a time as are allowed when it is their turn."""
        start = 0
        while start < len(uids):
            stop = start + self.most
            yield tuple(uids[start:stop])
            start = stop

    def halve(self, size: int) -> None:
        """``size`` samples did not fit: half as many from now on."""
        self.most = min(self.most, max(1, size // 2))
        # Filled in here: mmengine lets a warning pass once only, whatever its numbers.
        log.warning(f"out of memory with {size} samples at once; going on with {self.most}")

    def _decide(self, free: int | None, measured: int | None) -> None:
        self.open = False
        need = max(self._declared or 0, measured or 0)
        if free is None or not need:
            self.most = min(FIXED, self.model.rows)
            log.warning(
                "run.batch=auto: there is no way to tell how much memory this takes and how much is free (%s); "
                "going on with %d samples at once",
                self.model.device,
                self.most,
            )
            return
        self.most = fitting(free, need, self.model.rows)
        found = self.most, _size(free), _size(need), self.model.rows
        log.info("run.batch=auto: %d samples at once (%s free, %s per sample, run.rows=%d)", *found)

    def ask(self, batch: Batch) -> None:
        """Ask the method, once, what such samples will need; fewer at once if they do not fit.

        The first samples are the largest, so what is true of them will do for all.
        """
        if self._asked or self.method is None:
            return
        self._asked = True
        try:
            self._declared = self.method.bytes_per_sample(self.model, batch)
        except UserError:
            raise
        except Exception as error:  # a user's method may raise anything, and this is only a hint
            if is_lost(error):
                raise
            log.warning("%s.bytes_per_sample: %s: %s", type(self.method).__name__, type(error).__name__, error)
        if self.open or self._declared is None:
            return
        free = _free(self.model.device)
        if free is not None and self.most * self._declared > free:
            before, self.most = self.most, max(1, free // self._declared)
            if self.most < before:
                log.warning(
                    "run.batch=%d needs %s, and %s is free; going on with %d samples at once",
                    before,
                    _size(before * self._declared),
                    _size(free),
                    self.most,
                )


def _size(bytes: int) -> str:
    return f"{bytes / 2**30:.2f} GiB" if bytes >= 2**30 else f"{bytes / 2**20:.0f} MiB"


def _free(device: torch.device) -> int | None:
    """Free memory, with all that was freed and is only kept for the next allocation."""
    release_memory(device)
    if device.type == "cpu":
        give_back()
    return free_memory(device)
