"""Interventions on edges that leave the net's weights alone: its logits if the weights w of one cause were u.

A weighted layer is linear in its input, so setting the edges from candidate c to the effects E to u changes the layer's
output by (u - w)[E, c] applied to channel c alone. The net runs once up to the layer; from there all candidates of all
samples go through the rest of the net together, ``Classifier.rows`` at a time.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from attrib.causal.structure import Structure, WeightedLayer, WeightedModule, groups, weighted_module
from attrib.models import Classifier
from attrib.models.split import Split, hooked, split
from attrib.types import UserError

M = TypeVar("M", bound=nn.Module)


class Site(NamedTuple):
    """A weighted layer with its input and output for n samples."""

    layer: WeightedLayer
    module: WeightedModule
    x: Tensor  # (n, *in), the layer's input
    z: Tensor  # (n, *out), its output
    rest: tuple[Tensor, ...]  # see ``Front``
    cut: Split

    @property
    def axis(self) -> int:
        """The dimension of the channels in x and in z."""
        return self.z.ndim - 1 if isinstance(self.module, nn.Linear) else 1


class Sites:
    """A net cut at its weighted layers; each cut is made once."""

    def __init__(self, model: Classifier, structure: Structure) -> None:
        self.model, self.structure = model, structure
        self._cuts: dict[str, Split] = {}

    @torch.no_grad()
    def at(self, path: str, x: Tensor) -> Site:
        """The layer for inputs x (n, *input); computes nothing behind it, unless the net cannot be cut there.

        Raises UserError for a layer that is not linear in its weight.
        """
        layer, module = self.structure.layer(path), weighted_module(self.model.module, path)
        if path not in self._cuts:
            self._cuts[path] = split(self.model.module, path, x)
        cut = self._cuts[path]

        def piece(rows: slice) -> tuple[Tensor, ...]:
            read: list[Tensor] = []
            with hooked(module, lambda _module, inputs, _output: read.append(inputs[0].clone())):
                z, rest = cut.front(x[rows].clone())
            return (read[0], z, *rest)

        read, z, *rest = self.model.chunked(piece, len(x))
        _check(path, module, read[:1], z[:1])
        return Site(layer, module, read, z, tuple(rest), cut)


def reweighted(module: M, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> M:
    """A copy of a layer, with its stride and padding, that has these weights and none of its hooks."""
    made = copy.copy(module)
    parameters = {"weight": nn.Parameter(weight, False), "bias": None if bias is None else nn.Parameter(bias, False)}
    made.__dict__ |= {"_parameters": parameters, "_forward_hooks": OrderedDict(), "_forward_pre_hooks": OrderedDict()}
    if not isinstance(module, nn.Linear):
        made.__dict__["groups"] = groups
    return made


def _check(path: str, module: WeightedModule, x: Tensor, z: Tensor) -> None:
    """Raises UserError for a layer that is not linear in its weight, such as one that standardises it first."""
    once, twice = (reweighted(module, k * module.weight, None, groups(module))(x) for k in (1, 2))
    own = once
    if module.bias is not None:
        bias = module.bias if isinstance(module, nn.Linear) else module.bias.reshape(-1, *(1 for _ in z.shape[2:]))
        own = once + bias
    if not torch.allclose(own, z, rtol=1e-3, atol=1e-3 * z.abs().max().item()) or not torch.allclose(
        twice, 2 * once, rtol=1e-3, atol=1e-3 * z.abs().max().item()
    ):
        raise UserError(
            f"layer {path} ({type(module).__name__}) is not linear in its weight, so no edge of it can be set; "
            "search only the layers behind it (layers: the last so many)"
        )


class Edges(NamedTuple):
    """From one candidate to some outputs of a layer."""

    effects: Tensor  # (E,) int64, those of the given outputs that the candidate is connected with
    weight: Tensor  # (E, span, *kernel)


def edges(module: WeightedModule, unit: tuple[int, int], effects: Tensor) -> Edges:
    """The edges from a candidate to the output channels ``effects`` (E,) int64.

    In a grouped convolution a channel reaches its own group only. Raises UserError for a candidate in two groups.
    """
    start, stop = unit
    if not isinstance(module, nn.Linear) and module.groups > 1:
        inputs, outputs = module.in_channels // module.groups, module.out_channels // module.groups
        group = start // inputs
        if (stop - 1) // inputs != group:
            raise UserError(
                f"the inputs {start} to {stop - 1} of a grouped convolution are one candidate, but belong to two "
                "groups; search only the layers behind it (layers: the last so many)"
            )
        effects = effects[effects // outputs == group]
        start, stop = start - group * inputs, stop - group * inputs
    return Edges(effects, module.weight[effects, start:stop])


def change(site: Site, unit: tuple[int, int], found: Edges, u: float, rows: slice) -> Tensor:
    """How the layer's output at ``found.effects`` changes for some of the samples, (rows, E, *places)."""
    x = site.x.narrow(site.axis, unit[0], unit[1] - unit[0])[rows]
    return reweighted(site.module, u - found.weight)(x)


@torch.no_grad()
def intervene(
    model: Classifier, site: Site, units: Sequence[int], effects: Tensor, target: int, u: float = 0.0
) -> Tensor:
    """The target's logit (len(units), n) for every sample under an intervention on each of these candidates.

    units     candidates, by their number in the layer
    effects   (E,) int64, output channels of the layer; the edges from a candidate to all of them become u
    """
    n, axis = len(site.z), site.axis

    def piece(rows: slice) -> Tensor:
        index = torch.arange(rows.start, rows.stop, device=site.z.device)
        sample = index % n
        z = site.z[sample]
        for number in range(rows.start // n, (rows.stop - 1) // n + 1):
            start, stop = max(rows.start, number * n), min(rows.stop, (number + 1) * n)
            unit = site.layer.units[units[number]]
            found = edges(site.module, unit, effects)
            if not len(found.effects):
                continue
            delta = change(site, unit, found, u, slice(start - number * n, stop - number * n))
            z[start - rows.start : stop - rows.start].index_add_(axis, found.effects, delta)
        logits = site.cut.rear(z, tuple(t[sample] for t in site.rest))
        return logits[:, target].clone()

    return model.chunked(piece, len(units) * n).reshape(len(units), n)


def estimate(model: Classifier, site: Site, effects: Tensor, target: int, u: float = 0.0) -> Tensor:
    """(U,) mean change of the target's logit under an intervention on each of U candidates, to first order.

    The gradient of the logit with respect to the layer's weights, times (u - w): one forward and backward pass for
    all candidates. ``Search.candidates`` are chosen by it.
    """
    module, n = site.module, len(site.z)
    weight = module.weight

    def piece(rows: slice) -> Tensor:
        with torch.enable_grad():
            leaf = site.z[rows].detach().requires_grad_()
            logits = site.cut.rear(leaf.clone(), tuple(t[rows] for t in site.rest))
            (at_z,) = torch.autograd.grad(logits[:, target].sum(), leaf)
            free = weight.detach().clone().requires_grad_()
            layer = reweighted(module, weight, None, groups(module))
            layer.__dict__["_parameters"] = {"weight": free, "bias": None}
            (grad,) = torch.autograd.grad((layer(site.x[rows]) * at_z).sum(), free)
        return grad[None]

    total = model.chunked(piece, n).sum(0) / n
    effect = total * (u - weight)
    found = []
    for unit in site.layer.units:
        chosen = edges(module, unit, effects)
        start = unit[0] % weight.shape[1]  # a grouped convolution's weight has the channels of one group
        found.append(effect[chosen.effects, start : start + unit[1] - unit[0]].sum())
    return torch.stack(found)
