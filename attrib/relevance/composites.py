"""Composites: which rule each layer with weights gets, as a list of lines of which the first that fits counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import fx

from attrib.models.calls import operation
from attrib.relevance.rules import OF_ZEROS, AlphaBeta, Epsilon, Flat, Gamma, Rule, ZBox, ZPlus, rule_of
from attrib.types import UserError, did_you_mean

Bound = float | Sequence[float]
_PATTERNS = {"layer": "a pattern such as features.*", "operation": "a pattern such as conv*", "first": "true or false"}


@dataclass(frozen=True)
class Line:
    """``rule`` for the layers that all of the others fit.

    layer      a pattern, with * and ?, of the module's path or of its class
    operation  a pattern of the operation's name in ATen: linear, conv2d, addmm, matmul ...
    first      True: only layers with no other layer with weights between them and the input
    """

    rule: Rule
    layer: str = "*"
    operation: str = "*"
    first: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Line:
        """Of a line of YAML: layer, operation, first, rule, and the rule's parameters. Raises UserError."""
        if not isinstance(given, Mapping) or "rule" not in given:
            raise UserError(f"a line of a composite needs a rule, such as {{layer: Conv*, rule: zplus}}: {given!r}")
        values = {key: value for key, value in given.items() if key != "rule"}
        patterns = {key: values.pop(key) for key in _PATTERNS if key in values}
        for key, value in patterns.items():
            if not isinstance(value, bool if key == "first" else str):
                raise UserError(f"a line of a composite: {key} is {value!r}, must be {_PATTERNS[key]}")
        return cls(rule_of(str(given["rule"]), values), **patterns)

    def fits(self, node: fx.Node, first: bool) -> bool:
        path, kind = node.meta["module"]
        named = self.layer == "*" or fnmatchcase(path, self.layer) or fnmatchcase(kind, self.layer)
        return named and fnmatchcase(operation(node), self.operation) and (first or not self.first)


def _box(low: Bound | None, high: Bound | None) -> ZBox:
    if low is None or high is None:
        raise UserError(
            "the composite epsilon_gamma_box needs low and high, the least and the largest value that a pixel can have "
            "after normalisation"
        )
    return ZBox(low, high)


def _convolutions(*rules: Rule) -> tuple[Line, ...]:
    return tuple(Line(rule, operation="conv*") for rule in rules)


_FLAT = (Line(Flat(), first=True),)

# (gamma, low, high) -> lines; see zennit's composites of the same names. What no line fits gets epsilon.
COMPOSITES: Mapping[str, Callable[[float, Bound | None, Bound | None], tuple[Line, ...]]] = {
    "epsilon": lambda gamma, low, high: (),
    "epsilon_plus": lambda gamma, low, high: _convolutions(ZPlus()),
    "epsilon_plus_flat": lambda gamma, low, high: (*_FLAT, *_convolutions(ZPlus())),
    "epsilon_alpha2_beta1": lambda gamma, low, high: _convolutions(AlphaBeta(2.0, 1.0)),
    "epsilon_alpha2_beta1_flat": lambda gamma, low, high: (*_FLAT, *_convolutions(AlphaBeta(2.0, 1.0))),
    "epsilon_gamma_box": lambda gamma, low, high: (
        Line(_box(low, high), operation="conv*", first=True),
        *_convolutions(Gamma(gamma)),
    ),
}


@dataclass(frozen=True)
class Composite:
    """Lines, of which the first that fits a layer says its rule; else epsilon."""

    lines: tuple[Line, ...]
    otherwise: Epsilon

    @classmethod
    def of(
        cls,
        name: str,
        own: Sequence[Mapping[str, Any]] = (),
        *,
        epsilon: float = 1e-6,
        gamma: float = 0.25,
        low: Bound | None = None,
        high: Bound | None = None,
    ) -> Composite:
        """The composite of that name, behind lines of one's own (see ``Line.of``).

        Raises UserError for a name, line, rule or parameter that is not known, or is wrong.
        """
        if name not in COMPOSITES:
            raise UserError(f"no composite {name!r}{did_you_mean(name, COMPOSITES)} ({', '.join(COMPOSITES)})")
        return cls((*map(Line.of, own), *COMPOSITES[name](gamma, low, high)), Epsilon(epsilon))

    @property
    def of_zeros(self) -> bool:
        """Whether inputs that are zero may get relevance: then padding changes what the others get."""
        return any(isinstance(line.rule, OF_ZEROS) for line in self.lines)

    def rule(self, node: fx.Node, first: bool) -> Rule:
        return next((line.rule for line in self.lines if line.fits(node, first)), self.otherwise)
