"""Which layers of a net get new random weights, and how a net with such layers is described."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attrib.types import UserError, did_you_mean

ROOT = "(net)"  # shown for parameters of the net itself, such as the class token of a transformer


@dataclass(frozen=True)
class WeightedLayer:
    """A module with weights, and the normalisations that follow it, which are randomised with it.

    path      of the module; "" is the net itself
    modules   the paths of all modules that get new weights, ``path`` first
    """

    path: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Randomise:
    """Which layers get new weights.

    layers   a number n, counted from the output: in mode "cascade" the last n layers, in mode "independent" only the
             n-th from the output. Or the path of a layer, or of a module that holds layers: "cascade" takes everything
             from the output to there, "independent" only what is there. Or "all". null or 0: none
    seed     of the new weights. Those of a layer depend on nothing but its path and the seed
    """

    layers: int | str | None = None
    mode: Literal["cascade", "independent"] = "cascade"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("cascade", "independent"):
            raise UserError(f"randomise.mode must be cascade or independent, not {self.mode!r}")

    def chosen(self, found: list[WeightedLayer]) -> list[WeightedLayer]:
        """Of all layers of a net, output first, those that get new weights. Raises UserError if there are none such."""
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
                raise UserError(
                    f"randomise.layers: the net has no layer with weights at {self.layers!r}"
                    f"{did_you_mean(self.layers, names)} (from the output: {', '.join(names)})"
                )
            if self.mode == "independent":
                return [found[i] for i in inside]
            last = inside[-1]
        return found[first : last + 1] if self.mode == "independent" else found[: last + 1]


@dataclass(frozen=True)
class Variant:
    """How a randomised classifier differs from its original.

    layers        the paths of the layers with new weights, output first
    total         how many layers with weights the net has
    place         the position of the last of ``layers``, counted from 1 at the output
    how           the choice that led to them
    """

    layers: tuple[str, ...]
    total: int
    place: int
    how: Randomise

    @property
    def name(self) -> str:
        """For messages and folders: in ``random-3`` the last three layers are random, in ``random-only-fc`` one."""
        if self.how.mode == "cascade":
            return f"random-{self.place}"
        what = self.how.layers if isinstance(self.how.layers, str) else self.layers[-1] or ROOT
        return f"random-only-{what}"
