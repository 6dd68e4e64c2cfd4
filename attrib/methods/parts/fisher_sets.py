"""Information of a set of features given all others: of words, tiles or superpixels, or of a hierarchy of them.

Gat, Calderon, Reichart & Hazan, *A Functional Information Perspective on Model Interpretation*, ICML 2022,
corollary on subsets: given all other features R, those of a set A are normal with the covariance S_A|R (the Schur
complement), and the log-Sobolev inequality holds for that distribution. The information of A given R is

    I(A | R) = E[ <S_A|R grad_A f, grad_A f> / f ]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attrib.methods.parts.covariance import Spread
from attrib.methods.parts.covariance_operators import Quadratic
from attrib.types import Batch, UserError
from attrib.units import Partition, Units


def hierarchy(partition: Partition, levels: int, batch: Batch) -> list[Units]:
    """The units of each level: those of ``partition``, then ever larger ones, half as many along every axis.

    Tiles: ``side`` is halved. Superpixels: a quarter as many are computed. Words, windows and given units: those
    numbered 2i and 2i + 1 are joined. Raises UserError for more levels than are possible.
    """
    found = [partition.of(batch)]
    image = batch.lengths is None and batch.x.ndim == 4
    kind = "tiles" if partition.kind == "auto" and image else partition.kind
    for level in range(1, levels):
        if kind == "tiles":
            if partition.side >> level < 1:
                raise UserError(f"levels={levels}: a grid of {partition.side} tiles a side has no more than {level}")
            found.append(replace(partition, side=partition.side >> level).of(batch))
        elif kind == "superpixels":
            if partition.segments >> 2 * level < 1:
                raise UserError(f"levels={levels}: {partition.segments} superpixels have no more than {level}")
            found.append(replace(partition, segments=partition.segments >> 2 * level).of(batch))
        else:
            below = found[0].of
            found.append(Units.given(torch.where(below < 0, below, below >> level)))
    return found


class Sets:
    """The information of every unit of B samples, on one or several levels."""

    def __init__(self, spread: Spread, levels: Sequence[Units]) -> None:
        self.spread, self.levels = spread, levels
        self._prepared = None if spread.independent else [self._prepare(units) for units in levels]

    def _prepare(self, units: Units) -> list[tuple[Tensor, list[tuple[int, Quadratic]]]]:
        """[(samples, [(unit, its quadratic form)])]: samples with the same covariance and units share the forms."""
        of, index = units.of.flatten(1), self.spread.index
        groups: list[tuple[Tensor, Tensor, int]] = []  # samples, their units, their class
        same = bool((of == of[:1]).all())
        for k in index.unique().tolist():
            members = (index == k).nonzero()[:, 0]
            groups += [(members, of[0], k)] if same else [(i[None], of[i], k) for i in members]
        found = []
        for members, row, k in groups:
            numbers = [int(u) for u in row.unique() if u >= 0]
            forms = [(u, self.spread.operators[k].conditional((row == u).nonzero()[:, 0])) for u in numbers]
            found.append((members, forms))
        return found

    def of(self, score: Tensor, local: Tensor | None, at: Tensor) -> Tensor:
        """(b, d, L, *places): each unit's information, divided equally among its places; the sum over the levels.

        score   (b, d, L, *x), see ``Draws``, of the samples ``at`` (b,)
        local   (b, d, L, *places): score' S score place by place; where places are independent of each other it is
                all that is needed, otherwise None
        """
        first, *others = (self._of_level(level, score, local, at) for level in range(len(self.levels)))
        return sum(others, start=first)

    def _of_level(self, level: int, score: Tensor, local: Tensor | None, at: Tensor) -> Tensor:
        units = self.levels[level]
        of = units.of[at]
        lead, shape = score.shape[:3], (*score.shape[:3], *of.shape[1:])
        flat = of.flatten(1)[:, None].expand(-1, lead[1] * lead[2], -1)
        inside, where = flat >= 0, flat.clamp(min=0)
        values = score.new_zeros(*flat.shape[:2], units.most)
        if self._prepared is None:
            assert local is not None
            values.scatter_add_(2, where, local.reshape(flat.shape) * inside)
        else:
            for members, forms in self._prepared[level]:
                rows = torch.isin(at, members)
                part = score[rows]
                for unit, form in forms if len(part) else ():
                    values[rows, :, unit] = form(part).flatten(1)
        places = torch.zeros_like(values).scatter_add_(2, where, inside.to(values))
        return ((values / places.clamp(min=1)).gather(2, where) * inside).view(shape)
