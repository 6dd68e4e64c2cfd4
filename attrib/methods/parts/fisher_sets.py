"""Information of a set of features given all others: of words, tiles or superpixels, or of a hierarchy of them.

Gat, Calderon, Reichart & Hazan, *A Functional Information Perspective on Model Interpretation*, ICML 2022,
corollary on subsets: given all other features R, those of a set A are normal with the covariance S_A|R (the Schur
complement), and the log-Sobolev inequality holds for that distribution. The information of A given R is

    I(A | R) = E[ <S_A|R grad_A f, grad_A f> / f ]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    def _prepare(self, units: Units) -> list[tuple[list[int], list[tuple[int, Quadratic]]]]:
        """[(samples, [(unit, its quadratic form)])]: samples with the same covariance and units share the forms.

        Which places a unit has is found out on the CPU, so that a device is not waited for unit by unit.
        """
        of = units.of.flatten(1).cpu()
        same = bool((of == of[:1]).all())
        groups: dict[tuple[int, int], list[int]] = {}  # class, and a sample that has these units -> samples
        for i, k in enumerate(self.spread.index.tolist()):
            groups.setdefault((k, 0 if same else i), []).append(i)
        parts = [
            (key, unit, (of[key[1]] == unit).nonzero()[:, 0])
            for key in groups
            for unit in of[key[1]].unique().tolist()
            if unit >= 0
        ]
        sizes = [len(places) for *_, places in parts]
        moved = torch.cat([of.new_empty(0), *(places for *_, places in parts)]).to(units.of.device).split(sizes)
        forms: dict[tuple[int, int], list[tuple[int, Quadratic]]] = {key: [] for key in groups}
        for (key, unit, _), places in zip(parts, moved, strict=True):
            forms[key].append((unit, self.spread.operators[key[0]].conditional(places)))
        return [(members, forms[key]) for key, members in groups.items()]

    def of(self, score: Tensor, local: Tensor | None, at: Tensor) -> Tensor:
        """(b, d, L, *places): each unit's information, divided equally among its places; the sum over the levels.

        score   (b, d, L, *x), see ``Draws``, of the samples ``at`` (b,)
        local   (b, d, L, *places): score' S score place by place; where places are independent of each other it is
                all that is needed, otherwise None
        """
        first, *others = (self._of_level(level, score, local, at) for level in range(len(self.levels)))
        return sum(others, start=first)

    def _rows(self, level: int, at: Tensor) -> Iterator[tuple[slice | Tensor, list[tuple[int, Quadratic]]]]:
        """Which rows of ``at`` (b,) share quadratic forms, and those."""
        assert self._prepared is not None
        prepared = self._prepared[level]
        if len(prepared) == 1:
            yield slice(None), prepared[0][1]
            return
        place = {sample: row for row, sample in enumerate(at.tolist())}
        groups = [([place[i] for i in members if i in place], forms) for members, forms in prepared]
        rows = torch.tensor([row for some, _ in groups for row in some], device=at.device)
        for mine, (some, forms) in zip(rows.split([len(some) for some, _ in groups]), groups, strict=True):
            if some:
                yield mine, forms

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
            for rows, forms in self._rows(level, at):
                part = score[rows]
                for unit, form in forms:
                    values[rows, :, unit] = form(part).flatten(1)
        places = torch.zeros_like(values).scatter_add_(2, where, inside.to(values))
        return ((values / places.clamp(min=1)).gather(2, where) * inside).view(shape)
