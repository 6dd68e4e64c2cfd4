"""The input that gradient methods explain: an image or a sound itself, or the embedded tokens of a text.

Token ids have neither a gradient nor a zero. So for a text the input is the output of the layer with role
"embedding", and the net is what follows that layer; methods then need not tell images from texts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from attrib.methods.parts.losses import target_score
from attrib.models import Classifier
from attrib.models.token_axis import not_per_token
from attrib.noise import Noise
from attrib.types import Batch, UserError

EMBEDDING = "embedding"  # the role of the layer whose output is the input of a text net

Reduce = Literal["sum", "abs_sum", "abs_max"]


class _Score(nn.Module):
    """(x, target, *rest) -> (N,) the target's score. A module, because captum puts hooks on modules.

    A copy goes into the net, because it may change what it is given in place: captum needs x as it was.
    """

    def __init__(self, net: Callable[..., Tensor]) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, target: Tensor, *rest: Tensor) -> Tensor:
        return target_score(self.net(x.clone(), *rest), target)


@contextmanager
def _captum() -> Iterator[None]:
    """Gradients on, which captum needs, and warnings off: it warns of its own hooks at every call."""
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        yield


def check_per_token(model: Classifier, z: Tensor, x: Tensor) -> None:
    """Raises UserError unless z, what the layer with the role "embedding" gives for x (B, T), is (B, T, E)."""
    if z.ndim != 3 or z.shape[:2] != x.shape:
        raise UserError(not_per_token(EMBEDDING, model.roles.path(EMBEDDING), z, x))
    model.roles.check_tokens(EMBEDDING, x)


@dataclass(frozen=True)
class Inputs:
    """B samples, and the net that takes them as its input.

    x       (B, C, *places), which are (H, W) of images and (L,) of sounds, or (B, T, E) embedded tokens
    target  (B,) or (B, K), as in ``Batch``
    net     (x, *rest) -> logits (B, K), differentiable
    rest    what else the net needs, tensors of B rows: captum gets them as additional arguments, and repeats
            them as it repeats x
    mask    (B, T) bool, True on real tokens; None for images and sounds
    """

    x: Tensor
    target: Tensor
    net: Callable[..., Tensor]
    rest: tuple[Tensor, ...] = ()
    mask: Tensor | None = None

    @classmethod
    def of(cls, model: Classifier, batch: Batch) -> Inputs:
        """Raises UserError for a text net whose embedding is not one vector per token."""
        if batch.mask is None:
            model.examine(batch.x)
            return cls(batch.x, batch.target, model)
        front = model.until(EMBEDDING, batch.x)
        check_per_token(model, front.z, batch.x)
        return cls(front.z, batch.target, model.rear(EMBEDDING), front.rest, batch.mask)

    def score(self) -> nn.Module:
        """What captum explains: (x, *args) -> (N,) the target's score; see ``args``."""
        return _Score(self.net)

    def args(self, samples: slice) -> tuple[Tensor, ...]:
        """The additional arguments that captum passes on to ``score`` for these samples."""
        return tuple(t[samples] for t in (self.target, *self.rest))

    def chunked(
        self,
        model: Classifier,
        explain: Callable[[Tensor, tuple[Tensor, ...], slice], Tensor],
        cost: int = 1,
        least: int | None = None,
    ) -> Tensor:
        """``explain(x, args, samples)`` over pieces of the batch that keep to the model's row limit.

        ``cost`` and ``least``: see ``Classifier.chunked``.
        """

        def piece(samples: slice) -> Tensor:
            with _captum():
                return explain(self.x[samples].clone(), self.args(samples), samples).detach()

        return model.chunked(piece, len(self.x), cost, least)

    def gradients(self, model: Classifier, copies: Tensor) -> Tensor:
        """(B, d, *x) perturbed copies of each sample -> the gradients of its target's score at them, of that shape."""
        sample = torch.arange(len(self.x), device=self.x.device).repeat_interleave(copies.shape[1])
        _, grad = model.gradient(
            copies.flatten(0, 1),
            lambda logits, rows: target_score(logits, self.target[sample[rows]]),
            None if self.mask is None else EMBEDDING,
            self.rest,
        )
        return grad.view_as(copies)

    @torch.no_grad()
    def scores(self, model: Classifier, x: Tensor) -> Tensor:
        """(N, *input) -> (N,) the target's score; rows i, i + B, i + 2B, ... belong to sample i."""

        def piece(rows: slice) -> Tensor:
            at = torch.arange(rows.start, rows.stop, device=x.device) % len(self.x)
            target, *rest = (t[at] for t in (self.target, *self.rest))
            return target_score(self.net(x[rows].clone(), *rest), target)

        return model.chunked(piece, len(x))

    # ---- padding must not change a number --------------------------------------------------

    def real(self, value: Tensor) -> Tensor:
        """The same with zeros on the padding of texts (B, T, ...); images and sounds unchanged."""
        if self.mask is None:
            return value
        return value.masked_fill(~self.mask.view(*self.mask.shape, *[1] * (value.ndim - 2)), 0)

    def reduce(self, attribution: Tensor, how: Reduce, instead: str = "Set method.reduce=abs_sum") -> Tensor:
        """Over channels: (B, C, *places) -> (B, *places); of texts (B, T, E) -> (B, T), zero on padding.

        Raises UserError where the channels of all places of a sample cancel, so that their sum is rounding; it says
        what to do ``instead``.
        """
        channels = 1 if self.mask is None else -1
        attribution = self.real(attribution.detach())
        if how == "abs_max":
            return attribution.abs().amax(channels)
        sizes = attribution.abs().sum(channels)
        if how == "abs_sum":
            return sizes
        total = attribution.sum(channels)
        if cancelled(total, sizes, 100 * torch.finfo(total.dtype).eps).any():
            raise UserError(
                "reduce=sum leaves nothing: the channels of each place cancel, as gradients do behind a LayerNorm (the "
                f"embedding of BERT or GPT-2). {instead}, or take method=input_x_gradient or "
                "method=integrated_gradients"
            )
        return total

    def constant(self, value: float | Literal["mean"]) -> Tensor:
        """x with ``value`` in the place of every number, or the sample's own mean per channel; not on padding.

        Raises UserError for the mean of texts and vectors, which have no channels.
        """
        if value == "mean":
            if self.mask is not None or self.x.ndim < 3:
                raise UserError("baseline=mean is the mean of each channel of an image or sound; these have none")
            return self.x.mean(tuple(range(2, self.x.ndim)), keepdim=True).expand_as(self.x)
        constant = torch.full_like(self.x, value)
        return constant if self.mask is None else torch.where(self.mask.unsqueeze(-1), constant, self.x)

    def spread(self) -> Tensor:
        """(B,) largest minus smallest number of each sample."""
        # Padding is replaced by the first token, which is real.
        x = self.x if self.mask is None else torch.where(self.mask.unsqueeze(-1), self.x, self.x[:, :1])
        return x.flatten(1).amax(1) - x.flatten(1).amin(1)

    def normal(self, noise: Noise) -> Tensor:
        """Standard normal numbers of x's shape from each sample's own stream; zero on padding."""
        ragged = None if self.mask is None else 0
        return self.real(noise.normal(*self.x.shape[1:], ragged=ragged))


def cancelled(total: Tensor, sizes: Tensor, share: float) -> Tensor:
    """(B,) whether sums (B, *places) are everywhere at most ``share`` of the largest sum of the parts' ``sizes``."""
    largest = share * sizes.flatten(1).amax(1)
    return (total.flatten(1).abs().amax(1) <= largest) & (largest > 0)
