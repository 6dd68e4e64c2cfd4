"""Layer-wise relevance propagation (Bach et al., 2015), for any net whose calls have a rule (``attrib.relevance``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor
from torch.nn import functional

from attrib.checks import require
from attrib.fit import State
from attrib.methods import Method
from attrib.methods.parts.inputs import EMBEDDING, Inputs, Reduce
from attrib.methods.parts.losses import target_score
from attrib.models import Classifier
from attrib.models.graph import Graph, check_same
from attrib.noise import Noise
from attrib.relevance.composites import Composite
from attrib.relevance.plan import Plan, output_of
from attrib.relevance.propagation import Propagation
from attrib.types import Batch, SampleError, UserError


def _numbers(given: float | Sequence[float] | None) -> Sequence[float]:
    return () if given is None else given if isinstance(given, Sequence) else (given,)


@dataclass(frozen=True)
class LRP(Method):
    """The target's logit is shared out among the units of each layer, from the last one back to the input.

    Every call of the net has a rule (``attrib.relevance``). A layer with weights (a convolution, a linear layer, a
    product with a constant matrix) has the one that the composite says, with the batch norm behind it merged into it.
    For the others: shares in proportion to the summands for sums, residuals, averages and interpolation, and for layer,
    group and batch norms, which are linear with a fixed scale; the identity rule for RMS norms and for activations, but
    for their value at zero, which keeps its share; all of it to the largest for max-poolings; in attention those of
    AttnLRP (Achtibat et al., 2024): half of it to each factor of a product, and the Taylor expansion of the softmax. On
    a transformer ``composite="epsilon"`` is therefore AttnLRP. In the
    cells of LSTM, GRU and plain recurrence what is gated takes all, and the gates get none (Arras et al., 2017). Of a
    net that returns log-probabilities the logit in front of its log_softmax is explained.

    composite  epsilon_plus_flat, epsilon_alpha2_beta1, epsilon_gamma_box, epsilon ...: as zennit's of these names
    rules      lines in front of the composite's, of which the first that fits a layer counts:
               {layer: "features.*", operation: "conv*", first: false, rule: gamma, gamma: 0.25}. ``layer`` is a pattern
               of the module's path or class; the rules are epsilon, gamma, zplus, alpha_beta, flat, w_square and zbox
    epsilon    what denominators of the epsilon rule, of sums, averages and products are moved away from zero by
    gamma      of epsilon_gamma_box
    low, high  of epsilon_gamma_box: the least and the largest value of a pixel after normalisation, one number or one
               for each channel

    The relevance of a text is that of the layer with the role "embedding". Relevance is conserved, but for what
    biases, constants (position embeddings, class tokens), the softmax's expansion, a log_softmax and stabilisers
    keep: ``bias_relevance`` is that part, and it is checked that it is no other. A net with a call that has no rule
    is refused by name.

    >>> import attrib, torch
    >>> net, x = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2)), torch.rand(1, 1, 4, 4)
    >>> attrib.explain(net, x, method=LRP()).map.shape
    torch.Size([1, 4, 4])
    """

    NAME: ClassVar[str] = "attrib.methods.lrp.LRP"
    VERSION: ClassVar[int] = 4  # 3 took a gate whose shape is changed, as in SENet, for one without a constant
    CONTRASTS: ClassVar[bool] = True
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    TEXT_ROLES: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    MAPS: ClassVar[Mapping[str, str]] = {"map": "logit units, signed; sums to the logit less bias_relevance"}
    EXTRAS: ClassVar[Mapping[str, str]] = {
        "bias_relevance": "part of the logit that biases and constants keep, logit units"
    }
    COLUMNS: ClassVar[Mapping[str, str]] = {"bias_relevance": "none"}
    composite: str = "epsilon_plus_flat"
    rules: Sequence[Mapping[str, Any]] = ()
    epsilon: float = 1e-6
    gamma: float = 0.25
    low: float | Sequence[float] | None = None
    high: float | Sequence[float] | None = None
    reduce: Reduce = "sum"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        require(self, "epsilon", "gamma", at_least=0)
        require(self, "reduce", one_of=get_args(Reduce))
        for name, given in (("low", self.low), ("high", self.high)):
            if not all(math.isfinite(value) for value in _numbers(given)):
                raise UserError(f"LRP.{name} is {given}, must be finite numbers")
        self._composite()

    def _composite(self) -> Composite:
        try:
            return Composite.of(
                self.composite, self.rules, epsilon=self.epsilon, gamma=self.gamma, low=self.low, high=self.high
            )
        except UserError as error:
            raise UserError(f"LRP: {error}") from error

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        composite = self._composite()
        if batch.lengths is not None and composite.of_zeros:
            relevance, logits = self._without_padding(model, batch, composite)
        else:
            relevance, logits = self._relevance(model, batch, composite)
        inputs = Inputs(relevance, batch.target, model.module, mask=batch.mask)
        kept = target_score(logits, batch.target) - inputs.real(relevance).flatten(1).sum(1)
        return {"map": inputs.reduce(relevance, self.reduce), "bias_relevance": kept}

    def _without_padding(self, model: Classifier, batch: Batch, composite: Composite) -> tuple[Tensor, Tensor]:
        """As ``_relevance``, of texts of equal length together: what their padding got would be missing elsewhere."""
        rows, relevance, logits = [], [], []
        for some, alike in batch.by_length():
            found = self._relevance(model, alike, composite)
            rows += some
            relevance.append(functional.pad(found[0], (0, 0, 0, batch.x.shape[1] - alike.x.shape[1])))
            logits.append(found[1])
        order = torch.tensor(rows, device=batch.x.device).argsort()
        return torch.cat(relevance)[order], torch.cat(logits)[order]

    def _relevance(self, model: Classifier, batch: Batch, composite: Composite) -> tuple[Tensor, Tensor]:
        """(B, *input) the relevance of the inputs, or of a text's embeddings (B, T, E), and (B, K) the logits."""
        whole = model.graph(batch.x)

        def propagation(graph: Graph) -> Propagation:
            start = graph.input if batch.mask is None else output_of(graph, model.roles.path(EMBEDDING))
            return Propagation(Plan(graph, start), composite, self.epsilon)

        for_all = propagation(whole)

        def piece(rows: slice) -> tuple[Tensor, ...]:
            x, target = batch.x[rows], batch.target[rows]
            by = for_all if whole.fits(x) else propagation(model.graph(x))
            found = by.relevance(x, lambda logits: _of_target(logits, target))
            score = target_score(found.logits, target)
            missing = score.sum(dtype=torch.float64) - found.relevance.sum(dtype=torch.float64) - found.ledger.kept
            # Rounding, of all rows of the piece together.
            limit = torch.finfo(score.dtype).eps ** 0.5 * found.ledger.size
            wrong = ~(missing.abs() <= limit)
            return found.relevance, found.logits, wrong.expand(len(score))

        relevance, logits, wrong = model.chunked(piece, len(batch.x))
        check_same(model.module, logits, model.logits(batch.x))
        for row in wrong.nonzero()[:, 0].tolist():
            again, _, still = piece(slice(row, row + 1))
            relevance[row] = again[0]
            if still:
                raise SampleError(
                    f"{batch.uids[row]}: LRP did not conserve the relevance: numbers in the net are too large, or "
                    f"their sums too close to zero, for {str(again.dtype).removeprefix('torch.')} and "
                    f"epsilon={self.epsilon}; try run.dtype=float64, or a larger method.epsilon"
                )
        return relevance, logits


def _of_target(logits: Tensor, target: Tensor) -> Tensor:
    """(N, K) the relevance of the logits: the target's is its logit, that of the others 0.

    Of a contrast: minus its logit that of the class that is subtracted.
    """
    if target.ndim == 1:
        return torch.zeros_like(logits).scatter(1, target[:, None], logits.gather(1, target[:, None]))
    return torch.where(target.bool(), logits * target.sign(), 0)
