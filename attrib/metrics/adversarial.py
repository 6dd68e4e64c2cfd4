"""How much the maps of a sample agree with those of an adversarial copy of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from attrib.checks import require
from attrib.metrics.metric import Direction, Explain, Metric
from attrib.metrics.perturb import whole
from attrib.models import Classifier, probabilities
from attrib.noise import Noise
from attrib.types import Batch, UserError

Attack = Literal["saliency", "gradient", "fgsm", "boundary", "deepfool"]


@dataclass(frozen=True)
class AdversarialAgreement(Metric):
    """Correlation of the ranks of places between the map of a sample and that of its adversarial copy.

    Singh, Murdoch & Yu, *Hierarchical interpretations for neural network predictions*, ICLR 2019, section 4.3.2 and
    table 2, where a pixel's rank is its place in the order in which pixels join the hierarchy (``ACD.shows=order``).
    The maps of the target and of the class that the net takes the copy for are compared; the score is the mean of both:

        agreement   Spearman's correlation: ranks by the map's values, equal values sharing their mean rank
        distance    L2 norm of what the attack changed, in units of the normalised input

    attack          "saliency" (Papernot et al. 2016), "gradient" (a step along the gradient), "fgsm" (Goodfellow et al.
                    2015), "boundary" (Brendel et al. 2018), "deepfool" (Moosavi-Dezfooli et al. 2016): of the
                    Adversarial Robustness Toolbox, see ``attrib.metrics.attacks``
    settings        of that attack by the toolbox's names, in shares of the range of values it may use
    margin          that range is the sample's own, wider by so much at each end, in units of the normalised input
    min_confidence  a sample counts only if the target's probability is above this
    as_released     also gives ``released``, the correlation by the authors' ranks: inside a level (places whose value
                    has the same whole number) these are the result of argsort, which is not a rank but its inverse

    NaN for a sample that is not confident enough, or on which the attack does not succeed; the copy must make another
    class more probable than the target. Costs three maps and the attack.
    """

    NAME: ClassVar[str] = "attrib.metrics.adversarial.AdversarialAgreement"
    VERSION: ClassVar[int] = 1
    NEEDS_EXPLAIN: ClassVar[bool] = True
    NEEDS_PROBABILITIES: ClassVar[bool] = True
    NEEDS_LOGITS: ClassVar[tuple[str, ...]] = ("image",)
    MODALITIES: ClassVar[tuple[str, ...]] = ("image",)
    ABOUT: ClassVar[Mapping[str, str]] = {
        "agreement": "rank correlation between the map of a sample and that of its adversarial copy",
        "distance": "how far the attack moved the input (L2 norm)",
        "released": "the same correlation by the authors' ranks",
    }

    attack: Attack = "fgsm"
    settings: Mapping[str, Any] = field(default_factory=dict)
    margin: float = 0.0
    min_confidence: float = 0.0
    as_released: bool = False

    def __post_init__(self) -> None:
        require(self, "attack", one_of=get_args(Attack))
        require(self, "margin", at_least=0)
        require(self, "min_confidence", at_least=0, at_most=1)
        if not isinstance(self.settings, Mapping):
            raise UserError(f"AdversarialAgreement.settings is {self.settings!r}, must be names and values")
        object.__setattr__(self, "settings", dict(self.settings))
        if self.settings:  # without any, the toolbox need not be there yet
            _attacks().check(self.attack, self.settings)

    @property
    def COLUMNS(self) -> Mapping[str, Direction]:  # noqa: N802
        columns: dict[str, Direction] = {"agreement": "higher", "distance": "none"}
        return {**columns, "released": "higher"} if self.as_released else columns

    def score(self, model: Classifier, batch: Batch, map: Tensor, noise: Noise, explain: Explain) -> dict[str, Tensor]:
        """``map`` (B, H, W) -> the columns (B,), float64 on the CPU. Raises UserError for several labels a sample."""
        if batch.target.ndim != 1:
            raise UserError("AdversarialAgreement knows one class per sample, not several labels")
        batch = replace(batch, x=batch.x.to(model.device, model.dtype), target=batch.target.to(model.device))
        found = {name: torch.full((len(batch),), torch.nan, dtype=torch.float64) for name in self.COLUMNS}
        p = probabilities(whole(model, batch), link=model.link)
        sure = p.gather(1, batch.target[:, None])[:, 0] > self.min_confidence
        rows = (sure & map.isfinite().flatten(1).all(1).to(sure)).nonzero()[:, 0].tolist()
        if not rows:
            return found
        apart = Noise([batch.uids[i] for i in rows], noise.seed, noise.device, noise.dtype)
        twins = _attacks().twins(model, batch[rows], self.attack, self.settings, self.margin, apart)
        p = probabilities(model.logits(twins), link=model.link)
        own = batch.target[rows][:, None]
        best, other = p.scatter(1, own, -1.0).max(1)
        good = best > p.gather(1, own)[:, 0]
        rows, twins, other = [i for i, g in zip(rows, good.tolist(), strict=True) if g], twins[good], other[good]
        if not rows:
            return found
        here = batch[rows]
        there = replace(here, x=twins)
        pairs = [(map[rows], explain(there)), [explain(replace(b, target=other)) for b in (here, there)]]
        ranks = {"agreement": ranked, "released": released}
        for name in found.keys() & ranks.keys():
            both = [
                [
                    _correlation(*(ranks[name](m[i].double().cpu().numpy().ravel()) for m in pair))
                    for i in range(len(rows))
                ]
                for pair in pairs
            ]
            found[name][rows] = torch.tensor(np.mean(both, 0))
        found["distance"][rows] = (twins - here.x).flatten(1).norm(dim=1).double().cpu()
        return found


def _attacks() -> Any:
    """The module of the attacks. Raises UserError if the toolbox is not installed."""
    try:
        from attrib.metrics import attacks  # takes seconds to import
    except ModuleNotFoundError as error:
        raise UserError(
            f"AdversarialAgreement needs the Adversarial Robustness Toolbox: pip install attrib[attacks] ({error})"
        ) from error
    return attacks


def ranked(values: np.ndarray) -> np.ndarray:
    """(n,) -> (n,): 1 for the largest; equal values share their mean rank."""
    from scipy.stats import rankdata  # takes a second to import

    return rankdata(-values)


def released(values: np.ndarray) -> np.ndarray:
    """(n,) -> (n,) as the authors' ``compute_rankings``: level by level, argsort of the level's values, reversed."""
    levels, found, base = np.floor(values), np.zeros(len(values)), 0
    for level in np.unique(levels)[::-1]:
        places = np.flatnonzero(levels == level)
        found[places] = np.argsort(values[places], kind="stable")[::-1] + base
        base += len(places)
    return found


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; NaN where all values are the same."""
    if not (a.std() and b.std()):
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])
