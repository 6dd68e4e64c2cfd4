"""What the net says of the samples as they are, which several metrics of a cell ask for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attrib.models import Classifier
from attrib.types import Batch

ROOM = 2**28  # bytes
# Bytes of a number -> as which whole numbers its bits are read: 32 bits at most, or the signs of two float64 cancel.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


@dataclass
class _Kept:
    content: tuple[int, ...]
    logits: Tensor
    asks: int  # how often they will be asked for


class Originals:
    """Logits of samples, of those that came first, until there is no room: stages go from the first to the last.

    They are always those of the input that is asked about, as a file may be another one when the next metric reads it.
    What nobody will ask for again is not kept.

    names   the metrics that ask, in the order in which they do
    maps    how many maps a sample has: every metric asks once for each
    room    bytes
    """

    def __init__(self, names: Sequence[str], maps: int, room: int = ROOM) -> None:
        self._names, self._maps, self._left = list(names), maps, room
        self._rows = dict[str, _Kept]()

    def told(self, name: str, model: Classifier, batch: Batch) -> Batch:
        """The batch with its ``logits``, for a metric that shares them; ``model`` is always the same net."""
        if name not in self._names or len(self._names) * self._maps < 2:
            return batch
        asks = self._maps * (len(self._names) - self._names.index(name))  # from now on, this time included
        contents = contents_of(batch)
        taken = {uid: self._taken(uid, content) for uid, content in zip(batch.uids, contents)}
        found = {uid: kept.logits for uid, kept in taken.items() if kept is not None}
        missing = [i for i, uid in enumerate(batch.uids) if uid not in found]
        if missing:
            some = batch if len(missing) == len(batch) else batch[missing]
            logits = model.logits(some.x)
            for i, uid, row in zip(missing, some.uids, logits.unbind(), strict=True):
                found[uid] = row
                if asks > 1 and row.nbytes <= self._left:
                    # A copy, because a row keeps the tensor that it is one of.
                    self._rows[uid] = _Kept(contents[i], row.clone(), asks - 1)
                    self._left -= row.nbytes
        return dataclasses.replace(batch, logits=torch.stack([found[uid] for uid in batch.uids]))

    def _taken(self, uid: str, content: tuple[int, ...]) -> _Kept | None:
        """What is kept of a sample with this content; of another one, or after the last has asked, it goes."""
        row = self._rows.get(uid)
        if row is None:
            return None
        same = row.content == content
        row.asks -= 1
        if row.asks < 1 or not same:
            del self._rows[uid]
            self._left += row.logits.nbytes
        return row if same else None


def contents_of(batch: Batch) -> list[tuple[int, ...]]:
    """Of each sample its shape and a checksum of its bits, without the padding behind a text.

    On the batch's device, for which the host waits once: to copy inputs and digest them on the CPU would take a GPU
    longer than the pass that is saved. The sum of the numbers' bits, each times a random number of its own.
    """
    x = batch.x if batch.mask is None else batch.x.masked_fill(~batch.mask, 0)
    bits = x.contiguous().view(_BITS[x.element_size()]).flatten(1)
    weights = _weights(bits.shape[1], bits.device)
    found = [torch.stack([(row.long() * weights).sum() for row in bits])]  # one by one: int64 take twice the memory
    if batch.lengths is not None:
        found.append(batch.lengths)
    shape = batch.x.shape[1:] if batch.lengths is None else ()
    return [(*shape, *row) for row in torch.stack(found, 1).tolist()]


@functools.lru_cache(maxsize=4)
def _weights(n: int, device: torch.device) -> Tensor:
    """(n,) int64; the first are the same for every n."""
    numbers = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (n,), generator=numbers).to(device)
