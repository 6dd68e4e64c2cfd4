"""Agglomerative contextual decomposition: a hierarchy of the units that a network uses together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import numpy as np
import torch

from attrib.agglomeration import Agglomeration, agglomerate, drive
from attrib.agglomeration import Rules as MergeRules
from attrib.agglomeration.trees import Tree, grow
from attrib.checks import require
from attrib.fit import State
from attrib.keys import ADDED
from attrib.methods import Explanation, Method
from attrib.methods.parts.inputs import EMBEDDING
from attrib.methods.parts.unit_scores import COMPLETENESS, Baseline, Part, Rules, Scale, UnitScores, check_scores
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, SampleError, UserError
from attrib.units import Partition

MOST_CLASSES = 20  # for a net with more, a tree keeps the scores of the sample's top classes and those explained
TOP = 5  # how many top classes


@dataclass(frozen=True)
class ACD(Method):
    """Merges units into a tree, at each step those that gain most (Singh, Murdoch & Yu, ICLR 2019, algorithm 1).

    The document ``tree`` is the hierarchy (``attrib.agglomeration.trees``). The map is one of its levels, so that
    metrics can judge it: the score of every component, divided equally among its units and their places.

    score        of a set of units: "cd", "occlusion" or "build_up", see ``CD``
    units        words, windows or tiles. Words and windows have two neighbours in a line, tiles four on a grid
    percentile, steps, absolute, smooth   see ``attrib.agglomeration.Rules``
    against      the class whose score is subtracted: its number; "other", the most probable class beside the
                 target; or None
    shows        what the map shows: "scores", of the components of a level; or "order", when each unit joined
                 (``Agglomeration.order``), by which Singh et al. compare hierarchies (section 4.3.2)
    level        of "scores": the level, 0 for the single units, k for what has been merged up to level k
    output, baseline, output_bias, rules   see ``CD``
    as_released  for "cd": round as the authors' code does, 2 to 3 times slower. On a flat background a pooling
                 window has several equal maxima. The first is taken; in the authors' code, which adds up the parts
                 anew under every mask, rounding picks one. That is no rule that could be the default: in float64 the
                 same sums pick others. It changes scores of background units, and trees where these are chosen

    >>> import attrib, torch
    >>> net, x = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2)), torch.rand(1, 1, 4, 4)
    >>> tree = attrib.explain(net, x, method=ACD(units=Partition(side=2))).documents["tree"][0]
    >>> tuple(tree["shape"])
    (2, 2)
    """

    NAME: ClassVar[str] = "attrib.methods.acd.ACD"
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    TEXT_ROLES: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    DOCUMENTS: ClassVar[Mapping[str, str]] = {"tree": "the hierarchy, see attrib.agglomeration.trees"}
    score: Part = "cd"
    units: Partition = field(default_factory=lambda: Partition(side=14))
    percentile: float = 95.0
    steps: int | None = 5
    absolute: bool = False
    smooth: bool = True
    against: int | Literal["other"] | None = None
    level: int = 0
    output: Scale = "logit"
    baseline: Baseline = "zero"
    output_bias: bool = True
    as_released: bool = False
    rules: Rules = field(default="singh", metadata=ADDED)
    shows: Literal["scores", "order"] = field(default="scores", metadata=ADDED)

    def __post_init__(self) -> None:
        require(self, "score", one_of=get_args(Part))
        require(self, "shows", one_of=("scores", "order"))
        if self.shows == "order" and self.level:
            raise UserError(f"ACD.level is {self.level}, but shows=order has no level")
        if self.units.kind in ("superpixels", "given"):
            raise UserError(
                f"ACD.units.kind is {self.units.kind!r}, which have no grid or line: take tiles, words or windows"
            )
        require(self, "percentile", at_least=0, at_most=100)
        require(self, "steps", at_least=1, or_none=True)  # None: as many as it takes
        require(self, "level", at_least=0)
        known = isinstance(self.against, int) and not isinstance(self.against, bool) and self.against >= 0
        if not known and self.against not in (None, "other"):
            raise UserError(f"ACD.against is {self.against!r}, must be the number of a class, other or null")
        check_scores(self)

    @property
    def VERSION(self) -> int:  # noqa: N802
        return 3 if self.score == "cd" else 2  # as of ``CD``

    @property
    def MAPS(self) -> Mapping[str, str]:  # noqa: N802
        if self.shows == "order":
            return {
                "map": "when a unit joined, first ones highest: its step, counted from the last, >= 0, below 1 if never"
            }
        return {"map": "logit units (or of a probability), signed; the sum over a component is its score"}

    @property
    def EXTRAS(self) -> Mapping[str, str]:  # noqa: N802
        return COMPLETENESS if self.score == "cd" else {}

    @property
    def COLUMNS(self) -> Mapping[str, str]:  # noqa: N802
        return dict.fromkeys(self.EXTRAS, "none")

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Explanation:
        units = self.units.of(batch)
        scores = UnitScores(
            model,
            batch,
            units,
            self.score,
            baseline=self.baseline,
            output=self.output,
            output_bias=self.output_bias,
            as_released=self.as_released,
            rules=self.rules,
            name="ACD",
        )
        logits = scores.logits.double().cpu().numpy()
        targets = batch.target.tolist()
        asked = [self._asked(batch.uids[i], targets[i], own) for i, own in enumerate(logits)]
        shapes = [self._shape(batch, n) for n in units.n.tolist()]
        rules = MergeRules(self.percentile, self.steps, self.absolute, self.smooth)
        some = [i for i, shape in enumerate(shapes) if shape != (0,)]  # a text may have no word at all
        device = batch.x.device

        def answer(walk: np.ndarray, sets: np.ndarray) -> np.ndarray:
            owner = torch.tensor(some)[torch.from_numpy(walk)].to(device)
            found = scores(owner, torch.from_numpy(sets).to(device)).double().cpu().numpy()
            bad = ~np.isfinite(found).all(1)
            if bad.any():  # there is nothing to choose by
                raise SampleError(f"{batch.uids[some[walk[bad.argmax()]]]}: the net's scores are NaN or infinite")
            return found

        sizes = np.abs(scores.whole.double().cpu().numpy())
        if self.output == "log_probability":  # a logit less what normalises it: small where both are large
            sizes = np.maximum(sizes, np.abs(logits).max(1, keepdims=True))
        scales = [float(size @ np.abs(asked[i][0])) for i, size in enumerate(sizes)]
        walks = drive([agglomerate(shapes[i], asked[i][0], rules, scales[i]) for i in some], answer)
        trees = {i: self._tree(shapes[i], *asked[i], logits[i], walk) for i, walk in zip(some, walks, strict=True)}
        values = torch.zeros(len(batch), units.most, dtype=model.dtype)
        for (i, tree), walk in zip(trees.items(), walks, strict=True):
            nodes = tree.cut(self.level)
            scores_there = tree.paint(nodes, (node.score / node.size for node in nodes))
            shown = walk.order(self.absolute) if self.shows == "order" else scores_there
            values[i, : tree.n] = torch.from_numpy(shown.ravel()).to(values)
        documents = [
            trees[i].to_json() if i in trees else Tree((0,), *asked[i][1:], (), ()).to_json() for i in range(len(batch))
        ]
        error = {"completeness_error": scores.error} if self.EXTRAS else {}
        values = values.to(device)
        spread = units.paint(values) if self.shows == "order" else units.spread(values)
        return {"map": spread, "tree": documents, **error}

    @property
    def NEEDS_PROBABILITIES(self) -> bool:  # noqa: N802
        return self.output != "logit" or self.against == "other"

    def _shape(self, batch: Batch, n: int) -> tuple[int, ...]:
        """The units as a line, (n,), or as a grid, (rows, columns)."""
        if batch.mask is not None or batch.x.ndim == 3:
            return (n,)
        return tuple(min(self.units.side, size) for size in batch.x.shape[-2:])

    def _asked(
        self, uid: str, target: int | list[int], logits: np.ndarray
    ) -> tuple[np.ndarray, int | list[int], int | None]:
        """What the sample is asked for: weights (K,) of the classes in a set's score, the target, the class against."""
        weights = np.zeros(len(logits))
        if isinstance(target, list):
            weights += np.array(target)
        else:
            weights[target] = 1.0
        against = self.against
        if against == "other":
            against = int(np.argmax(np.where(weights > 0, -np.inf, logits)))
        if against is not None:
            if not 0 <= against < len(logits):
                raise UserError(f"ACD.against is {against}, but the model has classes 0 to {len(logits) - 1}")
            if weights[against] > 0:
                raise SampleError(f"{uid}: ACD.against is class {against}, which is the one to explain")
            weights[against] = -1.0
        return weights, target, against

    @staticmethod
    def _tree(
        shape: tuple[int, ...],
        weights: np.ndarray,
        target: int | list[int],
        against: int | None,
        logits: np.ndarray,
        found: Agglomeration,
    ) -> Tree:
        classes = np.arange(len(logits))
        if len(classes) > MOST_CLASSES:
            classes = np.union1d(np.argsort(-logits, kind="stable")[:TOP], np.flatnonzero(weights))
        return grow(shape, found.units, found.levels, found.whole, weights, classes.tolist(), target, against)
