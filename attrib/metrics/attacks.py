"""Adversarial copies of inputs, by the attacks of the Adversarial Robustness Toolbox (ART).

ART works here in units of the range that an attack may use, so that 0 and 1 are its ends: its DeepFool takes steps of
the wrong length in any other, and settings mean what they meant in Foolbox in 2018. It is given one sample at a time,
because every sample has a range of its own, and its draws come from the sample's stream.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from art.attacks.evasion import BoundaryAttack, DeepFool, FastGradientMethod, SaliencyMapMethod
from art.estimators import BaseEstimator, LossGradientsMixin
from art.estimators.classification.classifier import ClassGradientsMixin, ClassifierMixin
from torch import Tensor

from attrib.models import Classifier
from attrib.noise import Noise, global_states
from attrib.types import Batch, UserError

KINDS: Mapping[str, Any] = {
    "saliency": SaliencyMapMethod,
    "gradient": FastGradientMethod,
    "fgsm": FastGradientMethod,
    "boundary": BoundaryAttack,
    "deepfool": DeepFool,
}
_FIXED: Mapping[str, Mapping[str, Any]] = {
    "gradient": {"norm": 2},
    "fgsm": {"norm": np.inf},
    "boundary": {"targeted": False},
}
_BLENDS, _DRAWS = 100, 20  # to begin the boundary attack: how finely noise is blended in, and how much noise is tried

logging.getLogger("art").setLevel(logging.ERROR)  # it warns of every sample on which an attack does not succeed


class _Net(ClassGradientsMixin, ClassifierMixin, LossGradientsMixin, BaseEstimator):
    """A net as ART sees it: inputs (n, *x) in units of the range ``low`` .. ``high``, logits, gradients of logits."""

    def __init__(self, net: Classifier, x: Tensor, low: float, high: float, classes: int) -> None:
        super().__init__(model=net, clip_values=(0.0, 1.0))
        self._net, self._like, self._low, self._span = net, x, low, high - low
        self.nb_classes = classes

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self._like.shape[1:])

    def inputs(self, u: np.ndarray) -> Tensor:
        return torch.as_tensor(u).to(self._like) * self._span + self._low

    def units(self, x: Tensor) -> np.ndarray:
        return ((x - self._low) / self._span).cpu().numpy().astype(np.float32)

    def predict(self, x: np.ndarray, **_: Any) -> np.ndarray:
        found: np.ndarray = self._net.logits(self.inputs(x)).float().cpu().numpy()
        return found

    def fit(self, x: np.ndarray, y: np.ndarray, **_: Any) -> None:
        raise NotImplementedError("attacks train nothing")

    def _gradient(self, x: np.ndarray, score: Callable[[Tensor, slice], Tensor]) -> np.ndarray:
        found: np.ndarray = (self._net.gradient(self.inputs(x), score)[1] * self._span).float().cpu().numpy()
        return found

    def loss_gradient(self, x: np.ndarray, y: np.ndarray, **_: Any) -> np.ndarray:
        target = torch.as_tensor(y.argmax(1)).to(self._like.device)

        def loss(logits: Tensor, rows: slice) -> Tensor:
            return torch.nn.functional.cross_entropy(logits, target[rows], reduction="none")

        return self._gradient(x, loss)

    def class_gradient(self, x: np.ndarray, label: Any = None, **_: Any) -> np.ndarray:
        """(n, 1 or K, *x): of one class for each sample, or of all."""
        wanted = range(self.nb_classes) if label is None else [label]
        found = []
        for one in wanted:
            target = torch.as_tensor(np.broadcast_to(one, len(x)).copy()).to(self._like.device)

            def score(logits: Tensor, rows: slice, target: Tensor = target) -> Tensor:
                return logits.gather(1, target[rows, None])[:, 0]

            found.append(self._gradient(x, score))
        return np.stack(found, 1)


def check(kind: str, settings: Mapping[str, Any]) -> None:
    """Raises UserError unless ART's attack has these settings."""
    known = [*inspect.signature(KINDS[kind].__init__).parameters][2:]
    free = [name for name in known if name not in (*_FIXED.get(kind, {}), "batch_size", "verbose", "summary_writer")]
    for name in settings:
        if name not in free:
            raise UserError(f"the attack {kind} has no setting {name!r} (it has: {', '.join(free)})")
    try:
        _made(kind, settings, _Net(None, torch.zeros(1, 1), 0.0, 1.0, 3))  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise UserError(f"the attack {kind} refuses {dict(settings)}: {error}") from error


def _made(kind: str, settings: Mapping[str, Any], net: _Net) -> Any:
    quiet = {"verbose": False} if "verbose" in inspect.signature(KINDS[kind].__init__).parameters else {}
    return KINDS[kind](net, **settings, **_FIXED.get(kind, {}), **quiet)


def twins(
    model: Classifier, batch: Batch, kind: str, settings: Mapping[str, Any], margin: float, noise: Noise
) -> Tensor:
    """(B, *input): what an attack on the target's class makes of each sample, or the sample itself if it finds nothing.

    settings  of ART's attack, in shares of the range that it may use
    margin    by how much that range is wider than the sample's, at each end

    The saliency map attack needs a class to aim at: that which the gradient attack, in steps of a thousandth of the
    range, reaches first. The boundary attack begins at the sample with as little uniform noise blended in as is needed.
    """
    seeds, found = noise.child("attack").bits(1)[:, 0].tolist(), []
    classes = model.outputs(batch.x)
    for x, target, seed in zip(batch.x.split(1), batch.target.tolist(), seeds, strict=True):
        net = _Net(model, x, x.min().item() - margin, x.max().item() + margin, classes)
        with global_states(seed, x.device):
            found.append(_twin(net, x, target, kind, settings))
    return torch.cat(found)


def _twin(net: _Net, x: Tensor, target: int, kind: str, settings: Mapping[str, Any]) -> Tensor:
    u, more, y = net.units(x), {}, np.eye(net.nb_classes)[[target]]
    if kind == "saliency":
        step = 1e-3 * u.size**0.5  # a root mean square of a thousandth of the range
        near = _made("gradient", {"minimal": True, "eps": 1000 * step, "eps_step": step}, net).generate(u, y=y)
        logits = net.predict(near)[0]
        if logits.argmax() == target:
            return x
        y = np.eye(net.nb_classes)[[logits.argmax()]]
    elif kind == "boundary":
        start = _blended(net, u, target)
        if start is None:
            return x
        more["x_adv_init"] = start[None]
    made = _made(kind, settings, net).generate(u, y=y, **more)
    return x if np.array_equal(made, u) else net.inputs(made)


def _blended(net: _Net, u: np.ndarray, target: int) -> np.ndarray | None:
    """(*x) with as little uniform noise as makes the net decide for another class; None if none does."""
    drawn = np.random.uniform(size=(_DRAWS, *u.shape[1:])).astype(np.float32)
    for share in np.linspace(0, 1, _BLENDS + 1, dtype=np.float32)[1:]:
        mixed = (1 - share) * u + share * drawn
        other = net.predict(mixed).argmax(1) != target
        if other.any():
            return np.asarray(mixed[other.argmax()])
    return None
