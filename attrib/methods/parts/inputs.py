"""What captum's methods are computed on: an image or a sound itself, or the embedded tokens of a text.

Token ids have no gradient and no zero. So for texts the input is the output of the layer with role
"embedding", and the net is what follows it; the methods then read the same for all.
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
from attrib.noise import Noise
from attrib.types import Batch, UserError

EMBEDDING = "embedding"  # the role of the layer whose output is the input of a text net

Reduce = Literal["sum", "abs_sum", "abs_max"]


class _Score(nn.Module):
    """(x, target, *rest) -> the target's score, as a module, because captum hooks modules."""

    def __init__(self, net: Callable[..., Tensor]) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, target: Tensor, *rest: Tensor) -> Tensor:
        return target_score(self.net(x, *rest), target)


@contextmanager
def _captum() -> Iterator[None]:
    """captum runs on inputs that need gradients, and warns of its own hooks at every call."""
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Inputs:
    """B samples as the input of a net.

    x       (B, C, *places), which are (H, W) of images and (L,) of sounds, or (B, T, E) embedded tokens
    target  (B,) or (B, K), as in ``Batch``
    net     (x, *rest) -> logits; gradients flow
    rest    what else the net needs, B rows each: captum's additional arguments, which it repeats
            in the order in which it repeats x
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
            return cls(batch.x, batch.target, model.module)
        front = model.until(EMBEDDING, batch.x)
        if front.z.ndim != 3 or front.z.shape[:2] != batch.x.shape:
            raise UserError(
                f"model.layers.{EMBEDDING}: {model.path(EMBEDDING)} gives {tuple(front.z.shape)} for tokens "
                f"{tuple(batch.x.shape)}; it must be the layer that gives one vector per token, (B, T, E)"
            )
        return cls(front.z, batch.target, model.rear(EMBEDDING), front.rest, batch.mask)

    def score(self) -> nn.Module:
        """What captum explains: (x, *args) -> (N,) the target's score."""
        return _Score(self.net)

    def args(self, samples: slice) -> tuple[Tensor, ...]:
        """captum's additional arguments of these samples."""
        return tuple(t[samples] for t in (self.target, *self.rest))

    def chunked(
        self,
        model: Classifier,
        explain: Callable[[Tensor, tuple[Tensor, ...], slice], Tensor],
        cost: int = 1,
        least: int | None = None,
    ) -> Tensor:
        """``explain(x, args, samples)`` over pieces of the batch that fit the model's row limit."""

        def piece(samples: slice) -> Tensor:
            with _captum():
                return explain(self.x[samples].clone(), self.args(samples), samples).detach()

        return model.chunked(piece, len(self.x), cost, least)

    @torch.no_grad()
    def scores(self, model: Classifier, x: Tensor) -> Tensor:
        """(N, *input) -> (N,) the target's score. N is a multiple of B: all samples, all samples again, ..."""

        def piece(rows: slice) -> Tensor:
            at = torch.arange(rows.start, rows.stop, device=x.device) % len(self.x)
            target, *rest = (t[at] for t in (self.target, *self.rest))
            return target_score(self.net(x[rows].clone(), *rest), target)

        return model.chunked(piece, len(x))

    # ---- padding, which must neither count nor matter ---------------------------------------

    def real(self, value: Tensor) -> Tensor:
        """(B, T, ...) with zeros on padding; images and sounds unchanged."""
        if self.mask is None:
            return value
        return value.masked_fill(~self.mask.view(*self.mask.shape, *[1] * (value.ndim - 2)), 0)

    def reduce(self, attribution: Tensor, how: Reduce) -> Tensor:
        """(B, C, *places) -> (B, *places); (B, T, E) -> (B, T), zero on padding."""
        channels = 1 if self.mask is None else -1
        attribution = self.real(attribution.detach())
        if how == "sum":
            return attribution.sum(channels)
        attribution = attribution.abs()
        return attribution.sum(channels) if how == "abs_sum" else attribution.amax(channels)

    def constant(self, value: float) -> Tensor:
        """x with every number replaced by ``value``; padding stays what it is."""
        constant = torch.full_like(self.x, value)
        return constant if self.mask is None else torch.where(self.mask.unsqueeze(-1), constant, self.x)

    def spread(self) -> Tensor:
        """(B,) largest minus smallest number of each sample."""
        # The first token, which is real, in the place of padding.
        x = self.x if self.mask is None else torch.where(self.mask.unsqueeze(-1), self.x, self.x[:, :1])
        return x.flatten(1).amax(1) - x.flatten(1).amin(1)

    def normal(self, noise: Noise) -> Tensor:
        """Standard normal numbers of the shape of x, of each sample's own stream; none on padding."""
        ragged = None if self.mask is None else 0
        return self.real(noise.normal(*self.x.shape[1:], ragged=ragged))
