"""Gradients at noisy copies of inputs, and streaming means over them: what functional information is computed from.

Draws come from the samples' own streams one by one, and go through the net as many at a time as the model's row
limit allows: neither that number nor the rest of the batch changes them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from attrib.methods.parts.covariance import Spread
from attrib.methods.parts.inputs import EMBEDDING, Inputs
from attrib.models import Classifier, log_probabilities
from attrib.models.device_memory import of_the_device
from attrib.models.output_kind import Link
from attrib.noise import Noise

Activation = Literal["softmax", "log_softmax", "none"]
ACTIVATIONS = get_args(Activation)


class Draws(NamedTuple):
    """d draws of b samples, for L labels of which the target is the first; f is the output for a label.

    grad    (b, d, L, *x) gradient of f, zero on padding
    score   (b, d, L, *x) gradient of f divided by the root of \\|f\\|: its square is the information of one draw
    sign    (b, d, L) sign of f
    """

    grad: Tensor
    score: Tensor
    sign: Tensor


@dataclass(frozen=True)
class Outputs:
    """The functions f of the input that are explained: one for the target, and one for each further label.

    activation   what f is: a probability ("softmax"), its logarithm, or a logit ("none")
    target       (B,) or (B, K) as in ``Batch``; with several labels f is the sum of their outputs, minus those of -1
    labels       (B, L - 1) further labels, each with an f of its own
    link         of the model
    """

    activation: Activation
    target: Tensor
    labels: Tensor
    link: Link | None = "softmax"

    @property
    def count(self) -> int:
        """L"""
        return 1 + self.labels.shape[1]

    def values(self, logits: Tensor, at: Tensor) -> Tensor:
        """Logits (N, K) of the samples ``at`` (N,) -> (N, L) f; for softmax log f, which cannot underflow."""
        out = logits if self.activation == "none" else log_probabilities(logits, link=self.link)
        target = self.target[at]
        if target.ndim == 1:
            first = out.gather(1, target[:, None])
        elif self.activation == "softmax":
            first = out.masked_fill(~target.bool(), -torch.inf).logsumexp(1, keepdim=True)
        else:
            first = (out * target.sign()).sum(1, keepdim=True)
        return torch.cat((first, out.gather(1, self.labels[at])), 1)

    def draws(self, values: Tensor, grad: Tensor) -> Draws:
        """From ``values`` (b, d, L) and their gradients (b, d, L, *x)."""

        def wide(v: Tensor) -> Tensor:
            return v.view(*v.shape, *[1] * (grad.ndim - 3))

        if self.activation == "softmax":  # f = exp(value); with h its gradient, grad f = f h, and grad f^2 / f = f h^2
            f = values.exp()
            return Draws(wide(f) * grad, wide(f.sqrt()) * grad, torch.ones_like(f))
        size = values.abs()
        if self.activation == "log_softmax":  # where the probability is 1, f and its gradient are both zero
            size = size.clamp(min=torch.finfo(size.dtype).eps)
        return Draws(grad, grad / wide(size.sqrt()), values.sign())


class Perturbations:
    """Draws around B samples.

    size   the covariance of the noise is ``size`` times that of ``spread``
    """

    def __init__(
        self, model: Classifier, inputs: Inputs, outputs: Outputs, spread: Spread, size: float, noise: Noise
    ) -> None:
        self.model, self.inputs, self.outputs, self.spread, self.noise = model, inputs, outputs, spread, noise
        self.size = size
        self.role = None if inputs.mask is None else EMBEDDING

    def most(self, samples: int) -> int:
        """How many draws of each of ``samples`` samples go through the net at a time."""
        return max(1, self.model.rows // (samples * self.outputs.count))

    def noisy(self, at: Tensor, count: int) -> Tensor:
        """The next ``count`` noisy inputs of the samples ``at`` (b,): (b, count, *x). The streams of all B advance."""
        eps = torch.stack([self.inputs.normal(self.noise)[at] for _ in range(count)], 1)
        x = self.inputs.x[at].unsqueeze(1) + self.size**0.5 * self.spread.sample(eps, at)
        if self.inputs.mask is None:
            return x
        return torch.where(self.inputs.mask[at][:, None, :, None], x, self.inputs.x[at].unsqueeze(1))

    def draw(self, at: Tensor, count: int) -> Draws:
        """The next ``count`` draws of the samples ``at`` (b,)."""
        z = self.noisy(at, count).flatten(0, 1)
        rest, rows = tuple(t[at] for t in self.inputs.rest), at.repeat_interleave(count)

        def objective(logits: Tensor, piece: slice) -> Tensor:
            return self.outputs.values(logits, rows[piece])

        if self.outputs.count == 1:
            values, grad = self.model.gradient(z, lambda out, piece: objective(out, piece)[:, 0], self.role, rest)
            values, grad = values[:, None], grad[:, None]
        else:
            again = tuple(t.repeat_interleave(count, 0) for t in rest)
            values, grad = gradients(self.model, self.inputs.net, z, again, objective, self.outputs.count)
        values, grad = values.unflatten(0, (-1, count)), grad.unflatten(0, (-1, count))
        if self.inputs.mask is not None:
            grad = grad * self.inputs.mask[at][:, None, None, :, None]
        return self.outputs.draws(values, grad)


def gradients(
    model: Classifier,
    net: Callable[..., Tensor],
    z: Tensor,
    rest: tuple[Tensor, ...],
    objective: Callable[[Tensor, slice], Tensor],
    count: int,
    together: bool = True,
) -> tuple[Tensor, Tensor]:
    """Several numbers per row (N, L), and the gradient of each (N, L, *x), from one forward pass.

    net, z, rest   see ``Inputs``
    objective      (logits, rows) -> the L numbers of each of these rows
    count          L
    together       one backward pass for all L where torch can vectorise it; otherwise one after another, which
                   gives the same numbers

    So that rows times L keeps to the model's row limit, a piece has at most ``model.rows`` / L rows; if L alone is
    above the limit, a backward pass takes only as many labels as it allows.
    """

    def piece(rows: slice) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = z[rows].detach().requires_grad_()
            values = objective(net(leaf.clone(), *(t[rows] for t in rest)), rows)
            total = values.sum(0)
        return values.detach(), _jacobian(total, leaf, max(1, model.rows // len(leaf)) if together else 0).movedim(0, 1)

    return model.chunked(piece, len(z), count, least=1)


def _jacobian(total: Tensor, leaf: Tensor, together: int) -> Tensor:
    """(L,) numbers, leaf (N, *x) -> gradients (L, N, *x), ``together`` of them in one backward pass; 0: one by one."""
    if together:
        try:
            with warnings.catch_warnings():  # torch warns where it has to loop instead of vectorising
                warnings.simplefilter("ignore")
                each = torch.eye(len(total), dtype=total.dtype, device=total.device)
                found = [
                    torch.autograd.grad(total, leaf, part, retain_graph=True, is_grads_batched=True)[0]
                    for part in each.split(together)
                ]
                return torch.cat(found)
        except (RuntimeError, NotImplementedError) as error:
            if of_the_device(error):
                raise
    found = [torch.autograd.grad(total[k], leaf, retain_graph=k + 1 < len(total))[0] for k in range(len(total))]
    return torch.stack(found)


class Mean:
    """Streaming mean of terms, with its standard error; samples may have different numbers of terms.

    mean   (B, *shape)
    m2     (B, *shape) sum of squared deviations from the mean
    n      (B,) terms so far
    """

    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        """``shape`` includes B; ``like`` gives the device and dtype."""
        self.mean, self.m2 = like.new_zeros(shape), like.new_zeros(shape)
        self.n = torch.zeros(shape[0], dtype=torch.long, device=like.device)

    def add(self, at: Tensor, terms: Tensor) -> None:
        """Add d terms (b, d, *shape) to each of the samples ``at`` (b,), by Chan, Golub & LeVeque (1979)."""
        d = terms.shape[1]
        if not d:
            return
        one = [-1] + [1] * (terms.ndim - 2)
        n = self.n[at].to(terms.dtype).view(one)
        mean = terms.mean(1)
        m2, delta = (terms - mean.unsqueeze(1)).square_().sum(1), mean - self.mean[at]
        self.mean[at] += delta * (d / (n + d))
        self.m2[at] += m2 + delta.square() * (n * d / (n + d))
        self.n[at] += d

    @property
    def error(self) -> Tensor:
        """(B, *shape) the standard error of the mean; 0 for a single term."""
        n = self.n.to(self.m2.dtype).view(-1, *[1] * (self.m2.ndim - 1))
        return (self.m2 / ((n - 1).clamp(min=1) * n.clamp(min=1))).sqrt()
