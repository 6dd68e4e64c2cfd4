"""Which layers of a net get new weights, and what a net with such layers is a copy of."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from attrib.types import UserError

ROOT = "(net)"  # shown for parameters that belong to the net itself, as the class token of a transformer


@dataclass(frozen=True)
class Layer:
    """A module with weights, and the normalisations that follow it, which become new with it."""

    path: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Randomise:
    """Which layers get new weights.

    layers   n: counted from the output, ``cascade`` all of the last n, ``independent`` the n-th from the output
             alone; or the path of a layer, or of a module that holds layers: ``cascade`` everything from the output
             to there, ``independent`` what is there alone; "all"; null or 0: none
    seed     of the new weights. Those of a layer depend on its path and the seed alone
    """

    layers: int | str | None = None
    mode: Literal["cascade", "independent"] = "cascade"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("cascade", "independent"):
            raise UserError(f"mode must be cascade or independent, not {self.mode!r}")

    def chosen(self, found: list[Layer]) -> list[Layer]:
        """Of all layers, from the output, those that get new weights. Raises UserError if there are no such ones."""
        names, first = [layer.path or ROOT for layer in found], 0
        if not self.layers or self.layers == "all":
            return list(found) if self.layers else []
        if isinstance(self.layers, int):
            if not 0 < self.layers <= len(found):
                raise UserError(
                    f"randomise.layers is {self.layers}, but the net has {len(found)} layers with weights; "
                    f"from the output: {', '.join(names)}"
                )
            first = last = self.layers - 1
        else:
            inside = [i for i, name in enumerate(names) if f"{name}.".startswith(f"{self.layers}.")]
            if not inside:
                near = difflib.get_close_matches(self.layers, names, n=5, cutoff=0.3)
                raise UserError(
                    f"randomise.layers: the net has no layer with weights at {self.layers!r}; near names: "
                    f"{', '.join(near) or 'none'} (from the output: {', '.join(names)})"
                )
            if self.mode == "independent":
                return [found[i] for i in inside]
            last = inside[-1]
        return found[first : last + 1] if self.mode == "independent" else found[: last + 1]


@dataclass(frozen=True)
class Variant:
    """How a randomised classifier differs from its original.

    layers     the layers with new weights, from the output
    total      how many layers with weights the net has
    place      the furthest of ``layers`` from the output, counted from 1
    """

    layers: tuple[str, ...]
    total: int
    place: int
    how: Randomise

    @property
    def name(self) -> str:
        """For people and folders: ``random-3`` are the last three, ``random-only-conv1`` is one."""
        if self.how.mode == "cascade":
            return f"random-{self.place}"
        what = self.how.layers if isinstance(self.how.layers, str) else self.layers[-1] or ROOT
        return f"random-only-{what}"
