"""The admission exam on real samples, which come when they come: one by one, padded, or never."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib.models.device_memory import is_lost, is_out_of_memory
from attrib.models.exam import Exam, examine, tolerance
from attrib.models.output import Output
from attrib.models.padding import keep_lengths_apart
from attrib.models.text import real_tokens
from attrib.types import UserError

log = logging.getLogger(__name__)

LOOKED_AT = 64  # rows of a batch, among which two different ones are looked for


class Admission:
    """Examines a net on the first two different samples that it is to get.

    exam           what was found so far, at first on noise, if at all
    lengths_apart  the net sees the padding of texts, and gets only texts of equal length together
    one_by_one     the net gets one row at a time: it sorts the texts of a batch, of which nobody knows in which order a
                   layer has those of equal length, or it reads numbers of its samples
    shape          of an input: that which was given, else of the images or sounds seen last; None if there were none
    """

    def __init__(self, net: nn.Module, output: Output, exam: Exam | None, shape: tuple[int, ...] | None) -> None:
        self.exam, self.lengths_apart, self.one_by_one = exam, False, False
        self._net, self._output, self._shape_given = net, output, shape
        self._part_rows()
        self.shape = shape
        self._tight = False  # memory has no room for two rows
        # A copy with the same weights is examined: the exam leaves no trace in what the net remembers, and calls no
        # hooks that are put on it.
        self._examined = copy.deepcopy(net, {id(p): p for p in net.parameters()})
        own = getattr(net, "pad_id", None)
        self._pad = own if isinstance(own, int) else None
        self._sample: Tensor | None = None  # the first one, until there is a different one

    def see(self, x: Tensor, lengths: Tensor | None, rows: int) -> bool:
        """Samples (N, *input), of texts with their lengths (N,), of which ``rows`` may go through the net at a time.

        True if the net was changed because of what it did. Raises UserError for a net that is refused.
        """
        is_text = x.ndim == 2 and not x.is_floating_point()
        if self._shape_given is None and x.ndim in (3, 4) and x.is_floating_point():
            self.shape = tuple(x.shape[1:])
        if is_text and self._pad is None and lengths is not None:
            self._pad = _behind(x, lengths)
        pad, pairs, found = self._pad if is_text else None, rows > 1 and not self._tight, self.exam
        news = found is None or (pad is not None and found.padding is None) or (pairs and found.together is None)
        if found is not None and not news and found.on == "samples":
            return False
        pair = self._pair(x, pad)
        if pair is None and not news:
            return False
        on: Literal["sample", "samples"] = "sample" if pair is None else "samples"
        if pair is None:
            one = x[:1] if pad is None else x[:1, : int(real_tokens(x[:1], pad).sum())]
            pair = torch.cat((one, other_than(one, pad)))
        tokens = [] if pad is None else _shortest_first(x[:LOOKED_AT], pad)
        failed = self._examine(pair, on, pad, pairs, tokens)
        if failed and pad is not None and news and not self._tight:
            # Some want the token that ends a text, of which the longer one was cut.
            pair, on = _whole(x, pad), "sample"
            failed = self._examine(pair, on, pad, pairs, tokens)
        if failed:  # whoever brought these samples will meet it
            return False
        assert self.exam is not None
        name = type(self._net).__name__
        if on == "samples":
            self._sample = None
        self._part_rows()
        # Nothing is refused for padding, so the bound may be narrower.
        if pad is None or self.lengths_apart or (self.exam.padding or 0.0) <= tolerance(x) / 10:
            return False
        log.warning("%s sees the padding of texts: only texts of equal length go through it together", name)
        keep_lengths_apart(self._net, pad)
        self.lengths_apart = True
        return True

    def _part_rows(self) -> None:
        """From now on one row at a time goes through a net that needs it."""
        if self.exam is None or self.one_by_one or not (self.exam.sorted or self.exam.decides):
            return
        why = (
            "sorts the texts of a batch: they go through it one by one. With pack_padded_sequence(..., "
            "enforce_sorted=False) a net has no need to sort them, and is faster"
            if self.exam.sorted
            else "reads numbers of its samples (if x.max() > 1, float(z.norm()), ...), and may decide by them for a "
            "whole batch: they go through it one by one. With torch.where, or such a check outside of it, it is faster"
        )
        log.warning("%s %s", type(self._net).__name__, why)
        self.one_by_one = True

    def _examine(
        self, pair: Tensor, on: Literal["sample", "samples"], pad: int | None, pairs: bool, tokens: list[int]
    ) -> bool:
        """Whether the net itself fails on these samples. Raises UserError for a net that is refused."""
        try:
            with warnings.catch_warnings():
                # nn.TransformerEncoder leaves out padding in its own way, of which torch tells the first to run one.
                warnings.filterwarnings("ignore", "The PyTorch API of nested tensors", UserWarning)
                self.exam = examine(self._examined, self._output, pair, on, pad, pairs, tokens)
        except UserError:
            raise
        except Exception as error:
            if is_lost(error):
                raise
            self._tight = self._tight or is_out_of_memory(error)
            return True
        return False

    def check_padding(self, x: Tensor) -> None:
        """Raises UserError for texts with padding if the net sees it: its layers differ in length as the texts do."""
        if self.lengths_apart and self._pad in x[:, -1]:
            raise UserError(
                f"{type(self._net).__name__} sees the padding of texts, so its layers can be read for texts of equal "
                "length together only, without padding; a run does that itself"
            )

    def of_one_length(self, x: Tensor) -> list[Tensor]:
        """x (N, *input) in parts that ``check_padding`` lets pass, which together are all rows."""
        if not self.lengths_apart or self._pad is None:
            return [x]
        lengths = real_tokens(x, self._pad).sum(1)
        return [x[lengths == length, :length] for length in lengths.unique().tolist()]

    def _pair(self, x: Tensor, pad: int | None) -> Tensor | None:
        """Two different samples (2, *input), texts of equal length; None if there was only one so far."""
        known, first = x[:LOOKED_AT], self._sample
        if first is not None and first.ndim == known.ndim:
            if pad is not None:
                width = max(first.shape[1], known.shape[1])
                first, known = (F.pad(t, (0, width - t.shape[1]), value=pad) for t in (first, known))
            if first.shape[1:] == known.shape[1:]:
                known = torch.cat((first.to(known), known))
        pair = _different(known) if pad is None else _longest(known, pad)
        if pair is not None:
            return pair
        self._sample = x[:1].clone() if self._sample is None else self._sample
        return None


def _different(x: Tensor) -> Tensor | None:
    """Of samples (N, *input), the first and the last that differs from it, (2, *input)."""
    others = (x != x[:1]).flatten(1).any(1).nonzero().flatten()
    return x[[0, int(others[-1])]] if len(others) else None


def _longest(x: Tensor, pad: int) -> Tensor | None:
    """Of texts (N, T), the longest and the longest that differs from it, as long as the shorter of them, (2, T)."""
    lengths, order = real_tokens(x, pad).sum(1).sort(descending=True, stable=True)
    for length, row in zip(lengths[1:].tolist(), order[1:].tolist(), strict=True):
        pair = x[[int(order[0]), row], :length]
        if not torch.equal(pair[0], pair[1]):
            return pair
    return None


def _shortest_first(x: Tensor, pad: int) -> list[int]:
    """The tokens of texts (N, T), those of the shortest first."""
    real = real_tokens(x, pad)
    order = real.sum(1).argsort(stable=True)
    return list(dict.fromkeys(x[order][real[order]].tolist()))


def _behind(x: Tensor, lengths: Tensor) -> int | None:
    """What stands behind a text that is shorter than others."""
    shorter = (lengths < x.shape[1]).nonzero().flatten()
    return int(x[shorter[0], int(lengths[shorter[0]])]) if len(shorter) else None


def _whole(x: Tensor, pad: int) -> Tensor:
    """The first text as it is, and with what is between its first and its last token turned round, (2, T)."""
    one = x[:1, : int(real_tokens(x[:1], pad).sum())]
    return torch.cat((one, torch.cat((one[:, :1], one[:, 1:-1].flip(1), one[:, 1:][:, -1:]), 1)))


def other_than(one: Tensor, pad: int | None = None) -> Tensor:
    """Another sample, made of the only one (1, *input): a text of its tokens or, of one kind of token, of other ids.

    Of a text of the id that pads, ``pad``, the net would see another length, or nothing.
    """
    if one.is_floating_point():
        return 3 * one.flip(-1) + 1
    turned = one.flip(-1)
    if not torch.equal(turned, one):
        return turned
    free = [token for token in range(3) if token != pad]
    return torch.where(one == free[0], free[1], free[0]).to(one.dtype)
