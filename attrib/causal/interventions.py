"""Interventions on edges without touching a weight: what a net would say if w were u for one cause.

A weighted layer is linear in its input, so setting the edges from candidate c to the effects E to u changes
the layer's output by (u - w)[E, c] applied to channel c alone. One pass of the net up to the layer is kept,
and all candidates of all samples go through the rest of the net together, in pieces of ``Classifier.rows``.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attrib.causal.structure import Layer, Structure
from attrib.models import Classifier
from attrib.models.split import Split, hooked, split
from attrib.types import UserError


class Site(NamedTuple):
    """A weighted layer as n samples see it."""

    layer: Layer
    module: nn.Module
    x: Tensor  # (n, *in), the layer's input
    z: Tensor  # (n, *out), its output
    rest: tuple[Tensor, ...]  # see ``Front``
    cut: Split

    @property
    def axis(self) -> int:
        """Of the channels in x and in z."""
        return self.z.ndim - 1 if isinstance(self.module, nn.Linear) else 1


class Sites:
    """Cuts a net at its weighted layers; each cut is made once."""

    def __init__(self, model: Classifier, structure: Structure) -> None:
        self.model, self.structure = model, structure
        self._cuts: dict[str, Split] = {}

    @torch.no_grad()
    def at(self, path: str, x: Tensor) -> Site:
        """x (n, *input). Computes nothing behind the layer, unless the net cannot be cut there."""
        layer, module = self.structure.layer(path), self.model.module.get_submodule(path)
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


def twin(module: nn.Module, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> nn.Module:
    """A layer of the same kind, stride and padding with other weights; the given one is left alone."""
    made = copy.copy(module)
    parameters = {"weight": nn.Parameter(weight, False), "bias": None if bias is None else nn.Parameter(bias, False)}
    made.__dict__ |= {"_parameters": parameters, "_forward_hooks": OrderedDict(), "_forward_pre_hooks": OrderedDict()}
    if not isinstance(module, nn.Linear):
        made.__dict__["groups"] = groups
    return made


def _check(path: str, module: nn.Module, x: Tensor, z: Tensor) -> None:
    """Raises UserError for a layer that is not linear in its weight, such as one that standardises it first."""
    groups = getattr(module, "groups", 1)
    once, twice = (twin(module, k * module.weight, None, groups)(x) for k in (1, 2))
    bias = 0.0 if module.bias is None else module.bias
    if module.bias is not None and not isinstance(module, nn.Linear):
        bias = bias.reshape(-1, *(1 for _ in z.shape[2:]))
    if not torch.allclose(once + bias, z, rtol=1e-3, atol=1e-3 * z.abs().max().item()) or not torch.allclose(
        twice, 2 * once, rtol=1e-3, atol=1e-3 * z.abs().max().item()
    ):
        raise UserError(f"layer {path} ({type(module).__name__}) is not linear in its weight; no edge of it can be set")


class Edges(NamedTuple):
    """From one candidate to some outputs of a layer."""

    effects: Tensor  # (E,) int64, those of the wanted outputs that the candidate is connected with
    weight: Tensor  # (E, span, *kernel)


def edges(module: nn.Module, unit: tuple[int, int], effects: Tensor) -> Edges:
    """``effects`` (E,) int64, output channels. In a grouped convolution a channel reaches its own group only."""
    (start, stop), groups = unit, getattr(module, "groups", 1)
    if groups > 1:
        inputs, outputs = module.in_channels // groups, module.out_channels // groups
        group = start // inputs
        if (stop - 1) // inputs != group:
            raise UserError(f"the inputs {start} to {stop - 1} are one candidate, but belong to two groups")
        effects = effects[effects // outputs == group]
        start, stop = start - group * inputs, stop - group * inputs
    return Edges(effects, module.weight[effects, start:stop])


def change(site: Site, unit: tuple[int, int], found: Edges, u: float, rows: slice) -> Tensor:
    """How the layer's output at ``found.effects`` changes for some of the samples, (rows, E, *places)."""
    x = site.x.narrow(site.axis, unit[0], unit[1] - unit[0])[rows]
    return twin(site.module, u - found.weight)(x)


@torch.no_grad()
def intervene(
    model: Classifier, site: Site, units: Sequence[int], effects: Tensor, target: int, u: float = 0.0
) -> Tensor:
    """The target's logit (len(units), n) after an intervention on each of these candidates, for every sample.

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
    """(U,) mean change of the target's logit that an intervention on each candidate has to first order.

    The gradient of the logit with respect to the layer's weights times (u - w): one pass forth and back
    for all candidates. What ``candidates`` of a graph screens by.
    """
    module, n = site.module, len(site.z)
    weight = module.weight

    def piece(rows: slice) -> Tensor:
        with torch.enable_grad():
            leaf = site.z[rows].detach().requires_grad_()
            logits = site.cut.rear(leaf.clone(), tuple(t[rows] for t in site.rest))
            (at_z,) = torch.autograd.grad(logits[:, target].sum(), leaf)
            free = weight.detach().clone().requires_grad_()
            layer = twin(module, weight, None, getattr(module, "groups", 1))
            layer.__dict__["_parameters"] = {"weight": free, "bias": None}
            (grad,) = torch.autograd.grad((layer(site.x[rows]) * at_z).sum(), free)
        return grad[None]

    total = model.chunked(piece, n).sum(0) / n
    effect = total * (u - weight)
    found = []
    for unit in site.layer.units:
        chosen = edges(module, unit, effects)
        index, groups = chosen.effects, getattr(module, "groups", 1)
        start = unit[0] % (module.in_channels // groups) if groups > 1 else unit[0]
        found.append(effect[index, start : start + unit[1] - unit[0]].sum())
    return torch.stack(found)
