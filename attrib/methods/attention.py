"""What a transformer's attention says of its input: raw attention, rollout, and gradient times attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from attrib.checks import require
from attrib.fit import State
from attrib.methods import Method
from attrib.methods.parts.layout import image_size, resize
from attrib.methods.parts.losses import target_score
from attrib.models import Classifier
from attrib.models.graph import check_same
from attrib.noise import Noise
from attrib.relevance.attentions import Attentions, gradient_relevance, read_tokens, rollout
from attrib.types import Batch, SampleError, UserError

Follow = Literal["last_layer", "rollout", "gradient"]
_MAPS = {
    "last_layer": "attention of the last layer, mean over heads, in [0, 1]",
    "rollout": "share of each token in what the logits read, in [0, 1]",
    "gradient": "relevance, >= 0, in units of the logit",
}


@dataclass(frozen=True)
class Attention(Method):
    """How much the tokens that the logits read attend to each token of the input.

    follow  last_layer: the attention of the last layer, mean over heads. rollout: the product of all layers, each half
            attention and half identity (Abnar & Zuidema, 2020, section 3). gradient: the positive part of attention
            times its gradient, followed through all layers (Chefer et al., 2021, eq. 5 and 6)

    Only ``gradient`` depends on the target. Which tokens the logits read (a class token, the last one, all of them) is
    found out from where the gradient goes; of several the mean is taken. How tokens lie on an image is found out as for
    other layers (``attrib.models.reading``); class tokens and registers have no place and are left out.

    Raises UserError for a net without self-attention over the whole input, such as Swin, whose windows change from
    layer to layer.
    """

    NAME: ClassVar[str] = "attrib.methods.attention.Attention"
    VERSION: ClassVar[int] = 1
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text")
    follow: Follow = "gradient"

    def __post_init__(self) -> None:
        require(self, "follow", one_of=get_args(Follow))

    @property
    def MAPS(self) -> Mapping[str, str]:  # noqa: N802
        return {"map": _MAPS[self.follow]}

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        graph = model.graph(batch.x)
        found_once = Attentions(graph)
        _check_rows(model, batch.x)
        found_once.check_tokens(batch.x)

        def piece(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            x = batch.x[rows]
            passed = (found_once if graph.fits(x) else Attentions(model.graph(x)))(x)
            read = read_tokens(passed)
            weights = [weight.detach() for weight in passed.weights]
            if self.follow == "gradient":
                score = target_score(passed.logits, batch.target[rows]).sum()
                found = gradient_relevance(weights, torch.autograd.grad(score, passed.weights))
            else:
                found = rollout(weights) if self.follow == "rollout" else weights[-1].mean(1)
            found = torch.einsum("nt,nts->ns", read, found.expand(len(read), -1, -1))
            return found, passed.logits.detach(), read.sum(1)

        found, logits, any_read = model.chunked(piece, len(batch.x))
        for uid, some in zip(batch.uids, any_read.tolist(), strict=True):
            if not some:
                raise SampleError(f"{uid}: the logits do not depend on what the last attention gives")
        check_same(model.module, logits, model.logits(batch.x))
        if batch.mask is None:
            return {"map": _on_image(model, batch.x, found)}
        if found.shape != batch.mask.shape:
            raise UserError(
                f"this method needs a token of the net for each token of the text; {type(model.module).__name__} "
                f"attends to {found.shape[1]} for texts of {batch.x.shape[1]}"
            )
        return {"map": found * batch.mask}


def _check_rows(model: Classifier, x: Tensor) -> None:
    """Raises UserError unless the matrices of a batch are those of its rows, one after the other."""
    whole, last = (Attentions(model.graph(rows))(rows, grad=False).weights for rows in (x[[0, -1]], x[-1:]))
    for both, one in zip(whole, last, strict=True):
        if not torch.allclose(both[1:], one, rtol=1e-3, atol=1e-4):
            raise UserError(
                "this method needs attention whose matrices hold the samples of a batch one after the other"
            )


def _on_image(model: Classifier, x: Tensor, found: Tensor) -> Tensor:
    """(N, T) -> (N, H, W): the tokens of the grid, upsampled."""

    def front(rows: Tensor) -> Tensor:
        return Attentions(model.original.graph(rows))(rows, grad=False).values

    reading = model.roles.read("attention", front, tuple(x.shape[1:]), ("tokens",))
    return resize(found[:, reading.prefix :].unflatten(1, reading.grid), image_size(x))
