"""Texts without some of their words, made and scored in blocks: the engine of the metrics on texts.

A metric says which words are missing by places in the map's order: ``score_without`` scores any
number of texts per sample, each without the words of the places ``first`` .. ``last - 1``. Deleting
the best c words is (0, c), keeping only these is (c, count), the text itself is (0, 0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from attrib.metrics.perturb import ranks, score_rows, target_score
from attrib.models import Classifier, ScoreScale
from attrib.noise import Noise
from attrib.types import Batch, UserError

Removal = Literal["zero", "mask", "delete"]
REMOVALS: tuple[str, ...] = get_args(Removal)
Logits = Callable[[slice], Tensor]  # a block of rows -> (R, K)


@dataclass(frozen=True)
class Words:
    """The words of B texts in the order of a map.

    rank     (B, T) int64: place of the token's word, 0 for the largest value; -1 for special tokens and padding
    count    (B,) int64: number of words
    defined  (B,) bool: the text has a word, and its map is finite
    """

    rank: Tensor
    count: Tensor
    defined: Tensor


def order(batch: Batch, map: Tensor, noise: Noise) -> Words:
    """The order of a map (B, T) over the words of a text batch, on the batch's device.

    A word's value is the sum over its tokens; ``batch.words`` says which these are. Equal values are
    ordered by the sample's own stream "ties", the same for every map. Padding and values on special
    tokens do not count. Raises ValueError for a batch without words, or if the map does not fit.
    """
    if batch.words is None or batch.lengths is None:
        raise ValueError("a metric of words needs a batch of texts, with lengths and words")
    if map.shape != batch.x.shape:
        raise ValueError(
            f"a map of shape {tuple(map.shape)} does not fit texts of shape {tuple(batch.x.shape)}; expected (B, T)"
        )
    map = map.detach().to(batch.x.device, torch.float64)
    is_word, index = batch.words >= 0, batch.words.clamp(min=0)
    count = batch.words.amax(dim=1) + 1
    mask = batch.mask
    assert mask is not None  # there are lengths
    finite = (map.isfinite() | ~mask).all(dim=1)
    values = map.new_zeros(len(batch), max(1, int(count.max())))
    values.scatter_add_(1, index, torch.where(is_word, map, 0.0))
    beyond = torch.arange(values.shape[1], device=map.device) >= count[:, None]
    place = ranks(values.masked_fill(beyond, -torch.inf), noise.child("ties"), ragged=True)
    rank = torch.where(is_word, place.gather(1, index), -1)
    return Words(rank, count, finite & (count > 0))


def score_without(
    model: Classifier,
    batch: Batch,
    words: Words,
    first: Tensor,
    last: Tensor,
    removal: Removal = "zero",
    output: ScoreScale = "probability",
) -> Tensor:
    """The target's score without the words of the places ``first`` .. ``last - 1``: (B, P) float64.

    ``first`` and ``last`` are (B, P) int64, ``batch``, ``words`` and they on the model's device. A sample
    that is not defined is NaN. What becomes of a missing word:

    zero    the vectors of its tokens at the layer ``embedding`` are 0
    mask    its tokens are the net's ``mask_id``
    delete  it is taken out and the rest moves together; special tokens stay. A text of which nothing
            stays is a row of the net's ``pad_id``

    Equal texts of a sample go through the net once; with "mask" and "delete", long ones first, so that
    a block holds little padding. Raises UserError if the net lacks the layer or the id.
    """
    assert batch.lengths is not None  # ``order`` has seen to it
    asked, scores = words.defined[:, None].expand_as(first), torch.full_like(first, torch.nan, dtype=torch.float64)
    if batch.logits is not None:  # what the net says of the texts as they are
        own = target_score(batch.logits, batch.target, output, model.link)[:, None]
        scores = torch.where(asked, own, scores)
        asked = asked & (last > first)
    at = asked.nonzero(as_tuple=True)
    if not len(at[0]):
        return scores
    first, last = first[at], last[at]
    whole = last <= first
    texts = torch.stack((at[0], first.masked_fill(whole, 0), last.masked_fill(whole, 0)), dim=1)
    texts, place = texts.unique(dim=0, return_inverse=True)

    missing = texts[:, 2] - texts[:, 1] if removal == "delete" else 0
    by_length = (batch.lengths[texts[:, 0]] - missing).argsort(descending=True, stable=True)
    sample, first, last = texts[by_length].unbind(dim=1)

    def removed(rows: slice) -> Tensor:
        rank = words.rank[sample[rows]]
        return (rank >= first[rows, None]) & (rank < last[rows, None])

    made = _LOGITS[removal](model, batch, sample, removed)
    found = score_rows(model, batch.target, sample, made, output)
    scores[at] = torch.empty_like(found).scatter_(0, by_length, found)[place]
    return scores


def score_subsets(
    model: Classifier,
    batch: Batch,
    sample: Tensor,
    removed: Callable[[slice], Tensor],
    removal: Removal = "zero",
    output: ScoreScale = "probability",
) -> Tensor:
    """The target's score of N texts without any of their words: (N,) float64.

    Row i is the text ``sample[i]``; ``removed(rows)`` says which tokens of a block are gone, (R, T) bool. What
    becomes of them: see ``score_without``.
    """
    return score_rows(model, batch.target, sample, _LOGITS[removal](model, batch, sample, removed), output)


def _zero(model: Classifier, batch: Batch, sample: Tensor, removed: Callable[[slice], Tensor]) -> Logits:
    front = model.until("embedding", batch.x)
    if front.z.ndim != 3 or front.z.shape[:2] != batch.x.shape:
        raise UserError(
            f"model.layers.embedding: {model.roles.path('embedding')} gives {tuple(front.z.shape)} for texts "
            f"{tuple(batch.x.shape)}; it must give one vector per token"
        )
    model.roles.check_tokens("embedding", batch.x)
    rear = model.rear("embedding")

    def logits(rows: slice) -> Tensor:
        z = front.z[sample[rows]].masked_fill(removed(rows)[..., None], 0.0)
        return rear(z, *(t[sample[rows]] for t in front.rest))

    return logits


def _mask(model: Classifier, batch: Batch, sample: Tensor, removed: Callable[[slice], Tensor]) -> Logits:
    mask_id, lengths = _token_id(model, "mask_id"), batch.lengths
    assert lengths is not None  # of a text
    width = lengths[sample].cpu()  # for all blocks: a device would have to be waited for by each

    def logits(rows: slice) -> Tensor:
        x = batch.x[sample[rows]].masked_fill(removed(rows), mask_id)
        return model(x[:, : width[rows].max()])

    return logits


def _delete(model: Classifier, batch: Batch, sample: Tensor, removed: Callable[[slice], Tensor]) -> Logits:
    pad_id, real, widest = _token_id(model, "pad_id"), batch.mask, batch.x.shape[1]
    assert real is not None  # of a text

    def kept(rows: slice) -> Tensor:
        return real[sample[rows]] & ~removed(rows)

    blocks = [slice(start, start + model.rows) for start in range(0, len(sample), model.rows) or (0,)]
    width = torch.cat([kept(rows).sum(1) for rows in blocks]).cpu()  # for all blocks: waited for once

    def logits(rows: slice) -> Tensor:
        left = kept(rows)
        # Every token goes to its new position, what is not kept to one behind the last.
        position = torch.where(left, left.cumsum(dim=1) - 1, widest)
        x = batch.x.new_full((len(left), widest + 1), pad_id).scatter_(1, position, batch.x[sample[rows]])
        return model(x[:, : width[rows].max().clamp(min=1)])

    return logits


_LOGITS = {"zero": _zero, "mask": _mask, "delete": _delete}


def _token_id(model: Classifier, name: str) -> int:
    value = getattr(model.module, name, None)
    if not isinstance(value, int):
        raise UserError(
            f"{type(model.module).__name__} has no {name}, an int: the token that stands for missing words; set "
            f"net.{name} to the tokenizer's, or take removal=zero"
        )
    if name == "mask_id" and value == getattr(model.module, "pad_id", None):
        raise UserError(
            f"{type(model.module).__name__} has the same id, {value}, for padding and for missing words, so that a "
            "text would end before missing words at its end; set model.mask_id to another one, or removal=delete"
        )
    return value
