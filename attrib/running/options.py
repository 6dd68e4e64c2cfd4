"""How an experiment is run: settings that change speed and storage, never results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from attrib.errors import UserError

FIXED = 8  # samples at once where nothing is measured


@dataclass(frozen=True)
class Options:
    """How to compute. Nothing here changes a number beyond floating-point noise, or enters a key.

    root      the work directory
    limit     only the first N samples of the selection
    batch     samples explained at once, halved when memory runs out; "auto": as many as the free memory
              allows (``attrib.running.batch_size``); None: auto on a GPU, unless ``deterministic``; 8 on a CPU,
              where more gains little, and a kill loses what is in work
    rows      rows that go through the net at once; halved when memory runs out; "auto": as many as suit the caches of a
              CPU, or the free memory of a GPU (``attrib.models.sizes``)
    fold      compute nets with their batch norms folded into the layers in front of them, and on a CPU in the faster
              memory format (``attrib.models.fast``)
    compile   compile what runs often with ``torch.compile`` (``attrib.models.compiled``)
    deterministic   the same bits in every run on the same GPU (``attrib.process.repeatable``)
    flush     seconds after which finished samples are made durable
    grace     seconds that the batch in work gets when the run is told to stop (``attrib.process.signals``)
    strict    exit with status 3 at the end if any sample failed (always, if no map, or no score of a metric, came out)
    hooks, vis_backends   extra mmengine hooks and visualisation backends: objects or mmengine dicts
    """

    root: str = "workdirs"
    limit: int | None = None
    device: str = "auto"
    dtype: str = "float32"
    batch: int | Literal["auto"] | None = None
    rows: int | Literal["auto"] = "auto"
    fold: bool = True
    compile: bool = False
    deterministic: bool = False
    shard: int = 0
    shards: int = 1
    flush: float = 5.0
    grace: float = 20.0
    png: bool = False
    dry: bool = False
    strict: bool = False
    progress: bool = True
    hooks: Sequence[Any] = ()
    vis_backends: Sequence[Any] = ()

    def __post_init__(self) -> None:
        if not self.root:
            raise UserError("run.root must name a folder")
        if not 0 <= self.shard < self.shards:
            raise UserError(f"run.shard must be in 0 .. run.shards - 1, not {self.shard} of {self.shards}")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"run.limit must be at least 1, or null for all, not {self.limit}")
        if self.grace < 0:
            raise UserError(f"run.grace must be seconds, 0 or more, not {self.grace}")
        if isinstance(self.batch, int) and self.batch < 1:
            raise UserError(f"run.batch must be at least 1, or auto, not {self.batch}")

    @property
    def explained(self) -> int | Literal["auto"] | None:
        """Samples explained at once; None: as the device suggests."""
        return FIXED if self.batch is None and self.deterministic else self.batch

    @property
    def read(self) -> int:
        """Samples at once where nothing is explained: selection, fits, scores. ``rows`` bounds what they cost."""
        return self.batch if isinstance(self.batch, int) else FIXED
