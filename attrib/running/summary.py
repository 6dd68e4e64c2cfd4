"""What a run says of itself: to hooks after each batch, to people at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Step:
    """What hooks get as ``outputs`` after each batch.

    stage    "maps", or the name of the metric
    uids     the B samples that succeeded; ``data_batch`` holds the same
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
    """Samples (scores: samples x metrics) computed by this run, found already present, and failed.

    left         maps and scores that a run that ended early has not come to
    stopped      the signal that ended it early, such as "SIGTERM"; None if it came to its end
    all_failed   "maps" and the metrics of which every sample failed, and none was there before
    """

    maps_computed: int = 0
    maps_present: int = 0
    scores_computed: int = 0
    scores_present: int = 0
    failed: int = 0
    left: int = 0
    stopped: str | None = None
    all_failed: tuple[str, ...] = ()

    def __str__(self) -> str:
        numbers = {n: v for n, v in vars(self).items() if isinstance(v, int) and (n != "left" or v)}
        return " ".join(f"{name}={value}" for name, value in numbers.items())

    @property
    def ending(self) -> str:
        """What a run that was stopped says last."""
        what = f"{self.left} maps and scores are left" if self.left else "not all of it is written"
        return f"stopped by {self.stopped}, {what}; the same command goes on"
