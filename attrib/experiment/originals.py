"""What the net says of the samples as they are, which several metrics of a cell ask for."""

from __future__ import annotations

import torch
from torch import Tensor

from attrib.models import Classifier
from attrib.types import Batch

ROOM = 2**28  # bytes


class Originals:
    """Logits of samples, of those that came first, until there is no room: stages go from the first to the last."""

    def __init__(self, room: int = ROOM) -> None:
        self._left, self._rows = room, dict[str, Tensor]()

    def of(self, model: Classifier, batch: Batch) -> Tensor:
        """(B, K), always of the same net; what is not known yet goes through it."""
        missing = [i for i, uid in enumerate(batch.uids) if uid not in self._rows]
        found = dict[str, Tensor]()
        if missing:
            some = batch if len(missing) == len(batch) else batch[missing]
            found = dict(zip(some.uids, model.logits(some.x).unbind(), strict=True))
        for uid, row in found.items():
            if row.nbytes <= self._left:
                self._rows[uid] = row
                self._left -= row.nbytes
        return torch.stack([found[uid] if uid in found else self._rows[uid] for uid in batch.uids])
