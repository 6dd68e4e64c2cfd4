"""Readout IBA: one network, trained once, predicts the bottleneck of every sample.

Schulz, Sixt, Tombari & Landgraf, *Restricting the Flow: Information Bottlenecks for
Attribution*, ICLR 2020, section 3.3.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib.fit import FitData, Partial, State
from attrib.methods import Method
from attrib.methods.iba import Gaussian, Restricted, capacity, restrict
from attrib.methods.parts import layout
from attrib.methods.parts.layout import Layout
from attrib.methods.parts.statistics import Moments
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError

ALPHA_LIMIT = 5.0  # lambda stays within .0067 and .9933, so the capacity stays finite
SAVE_SECONDS = 300.0  # a killed training loses at most this much, and never more than an epoch


def part(state: State, prefix: str) -> State:
    """The entries ``prefix.*``, without the prefix."""
    return {k.removeprefix(prefix + "."): v for k, v in state.items() if k.startswith(prefix + ".")}


def initial_net(inputs: int, outputs: int, seed: int) -> State:
    """Three 1x1 convolutions that let everything pass: alpha is 5 for whatever they read.

    Drawn as ``torch.nn.Conv2d`` does, uniform within 1 / sqrt(fan in), but from a stream of their own.
    """
    net: State = {}
    widths = (inputs, inputs // 2, 2 * outputs, outputs)
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths), 1):
        for name, shape in ((f"conv{i}.weight", (fan_out, fan_in, 1, 1)), (f"conv{i}.bias", (fan_out,))):
            uniform = Noise([f"readout/{name}"], seed).uniform(*shape)[0]
            net[name] = (2 * uniform - 1) / math.sqrt(fan_in)
    net["conv3.weight"] *= 1e-3
    net["conv3.bias"].fill_(ALPHA_LIMIT)
    return net


def infer(net: State, features: Tensor) -> Tensor:
    """(B, inputs, h, w) -> alpha (B, outputs, h, w)."""
    hidden = F.conv2d(features, net["conv1.weight"], net["conv1.bias"]).relu()
    hidden = F.conv2d(hidden, net["conv2.weight"], net["conv2.bias"]).relu()
    return F.conv2d(hidden, net["conv3.weight"], net["conv3.bias"]).clamp(-ALPHA_LIMIT, ALPHA_LIMIT)


class Reading(NamedTuple):
    """What the first, unrestricted pass gives for a batch."""

    r: Tensor  # (B, *layer) the bottleneck layer's output
    features: Tensor  # (B, inputs, h, w) all readouts, normalised, on the bottleneck's grid
    prior: Gaussian
    places: Layout


class Predicted(NamedTuple):
    """The bottlenecks of a batch, each (B, *layer)."""

    alpha: Tensor
    lam: Tensor  # smoothed
    capacity: Tensor  # nats


class _Adam(torch.optim.Adam):
    """Adam over named weights, whose moments can be stored and put back."""

    def __init__(self, net: State, lr: float, moments: State, steps: int) -> None:
        super().__init__(net.values(), lr=lr)
        self.net = net
        for name, weight in net.items():
            if steps:
                kept = part(moments, name)
                self.state[weight] = {"step": torch.tensor(float(steps)), **kept}

    def moments(self) -> State:
        names = ("exp_avg", "exp_avg_sq")
        return {f"{n}.{m}": self.state[w][m] for n, w in self.net.items() if w in self.state for m in names}


@dataclass(frozen=True)
class ReadoutFit:
    """Statistics of the layers, then the readout network that is trained with them.

    The state is flat: ``<role>.mean`` (also std, active, n) of every layer, ``net.*`` the weights,
    ``curve`` (steps, 4) the loss, its cross-entropy, its mean capacity in nats, and the share of
    units whose alpha is at its lower limit.

    The batches of the training are a hyper-parameter (``train_batch``), so they do not depend on
    how a run is cut: their order and their noise come from streams named after the epoch.
    Samples that cannot be read are left out.
    """

    NAME: ClassVar[str] = "attrib.methods.readout.ReadoutFit"
    VERSION: ClassVar[int] = 1
    TARGETS: ClassVar[bool] = True

    layer: str
    readouts: tuple[str, ...]
    beta: float
    sigma: float | None
    min_std: float
    active_neurons_threshold: float
    relu: bool
    layout: layout.Name
    epochs: int
    train_batch: int
    lr: float
    draws: int
    train_seed: int

    def __post_init__(self) -> None:
        if not self.readouts:
            raise UserError("Readout IBA: readouts must name at least one role")
        for name, least in (("train_batch", 1), ("draws", 1), ("epochs", 0)):
            if getattr(self, name) < least:
                raise UserError(f"Readout IBA: {name} must be at least {least}, not {getattr(self, name)}")

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.layer, *self.readouts)))

    # ---- the bottlenecks of a batch -----------------------------------------------------------

    def read(self, model: Classifier, x: Tensor, state: State) -> Reading:
        """One pass through the net. Vectors are spread over the bottleneck's grid, maps resized to it."""
        found = model.record(self.roles, x)
        image = tuple(x.shape[-2:])
        r = found[self.layer]
        places = Layout.of(r, image, self.layout)
        grids = []
        for role in self.readouts:
            value, statistics = found[role], part(state, role)
            std = statistics["std"].to(value).clamp(min=self.min_std)
            normalised = (value - statistics["mean"].to(value)) / std
            # Layers of the bottleneck's rank are laid out as it is; a head's vector is not.
            lies = Layout.of(value, image, self.layout if value.ndim == r.ndim else "auto")
            grid = lies.to_grid(normalised)
            grids.append(F.interpolate(grid, size=places.grid, mode="bilinear", align_corners=True))
        prior = Gaussian.of(part(state, self.layer), 0, self.active_neurons_threshold, r)
        # The released code gives the readouts a least deviation, but not the bottleneck; where that
        # is zero, its capacity is NaN.
        prior = prior._replace(std=prior.std.masked_fill(prior.std == 0, self.min_std))
        return Reading(r, torch.cat(grids, dim=1), prior, places)

    def predict(self, reading: Reading, net: State) -> Predicted:
        """The readout network at work; differentiable in its weights.

        Tokens that stand in front of the grid (a class token) get the mean alpha of the places.
        """
        places, r = reading.places, reading.r
        grid = infer(net, reading.features)
        like = grid.mean((2, 3))[:, None].expand(r.shape) if places.name == "tokens" else r
        alpha = places.from_grid(grid, like)
        lam = places.smooth(alpha.sigmoid(), self.sigma)
        prior = reading.prior
        return Predicted(alpha, lam, capacity(r, lam, prior.mean, prior.std) * prior.active)

    # ---- training -----------------------------------------------------------------------------

    def run(self, model: Classifier, data: FitData, partial: Partial, report: Callable[[str], None]) -> State:
        """Raises UserError if the loss is not finite, or no unit is left that could still learn."""
        state = partial.load()
        if state is None:
            state = self._start(model, data, report)
            partial.save(state)
        trained = ("net.", "adam.")  # a job that goes on may have another device or precision
        state = {k: v.to(model.device, model.dtype if k.startswith(trained) else v.dtype) for k, v in state.items()}
        net = {name: weight.clone().requires_grad_() for name, weight in part(state, "net").items()}
        uids = [uid for uid, readable in zip(data.uids, state["readable"].tolist(), strict=True) if readable]
        curve: list[list[float]] = state["curve"].tolist()
        optimizer = _Adam(net, self.lr, part(state, "adam"), len(curve))
        steps = math.ceil(len(uids) / self.train_batch)
        known = {k: v for k, v in state.items() if k.split(".")[0] in self.roles}

        def now() -> State:
            weights = {f"net.{name}": weight.detach() for name, weight in net.items()}
            return {**known, **weights, "curve": torch.tensor(curve, dtype=torch.float64).reshape(-1, 4)}

        saved = time.monotonic()
        for epoch in range(len(curve) // steps, self.epochs):
            order = Noise([f"readout/order/epoch-{epoch}"], self.train_seed).permutation(len(uids))[0].tolist()
            for step in range(len(curve) % steps, steps):
                chosen = order[step * self.train_batch : (step + 1) * self.train_batch]
                losses = self._step(model, data.batch([uids[i] for i in chosen]), epoch, state, net, optimizer)
                where = f"readout of {model.path(self.layer)}: epoch {epoch + 1} of {self.epochs}"
                if not math.isfinite(losses[0]):
                    raise UserError(
                        f"{where}, step {step + 1} of {steps}: the loss is {losses[0]}; lower method.lr, or raise "
                        "method.min_std"
                    )
                curve.append(losses)
                last = step + 1 == steps
                if last and losses[-1] == 1:
                    raise UserError(
                        f"{where}: the bottleneck is closed everywhere, where it has no gradient; lower method.lr "
                        "or method.beta"
                    )
                if last or partial.wanted() or time.monotonic() - saved >= SAVE_SECONDS:
                    adam = {f"adam.{name}": value for name, value in optimizer.moments().items()}
                    partial.save({**now(), **adam, "readable": state["readable"]})
                    saved = time.monotonic()
                    so_far = curve[-step - 1 :]
                    total, cross_entropy, info, closed = (sum(column) / len(so_far) for column in zip(*so_far))
                    at = "" if last else f", step {step + 1} of {steps}"
                    parts = f"cross-entropy {cross_entropy:.4g}, {info:.4g} nats, {closed:.1%} of units closed"
                    report(f"{where}{at}: loss {total:.4g} ({parts})")
        return {name: value.float() if name.startswith("net.") else value for name, value in now().items()}

    def _start(self, model: Classifier, data: FitData, report: Callable[[str], None]) -> State:
        """Everything before the first step."""
        moments = {role: Moments() for role in self.roles}
        read: set[str] = set()
        for batch in data:
            for role, value in model.record(self.roles, batch.x).items():
                moments[role].add(value)
            read.update(batch.uids)
            report(f"statistics of {len(self.roles)} layers: {len(read)} / {len(data.uids)} samples")
        state = {f"{r}.{name}": v.contiguous() for r in self.roles for name, v in moments[r].state().items()}
        reading = self.read(model, batch.x[:1], state)
        outputs = reading.places.to_grid(reading.r).shape[1]
        net = initial_net(reading.features.shape[1], outputs, self.train_seed)
        state |= {f"net.{name}": weight.to(model.dtype) for name, weight in net.items()}
        state["readable"] = torch.tensor([uid in read for uid in data.uids])
        state["curve"] = torch.zeros(0, 4, dtype=torch.float64)
        return state

    def _step(
        self, model: Classifier, batch: Batch, epoch: int, state: State, net: State, optimizer: _Adam
    ) -> list[float]:
        """One step; returns its row of the curve, means over the batch.

        The step itself follows the sum over the samples divided by ``train_batch``, so a sample in
        a short last batch weighs what it weighs elsewhere.
        """
        reading = self.read(model, batch.x, state)
        front = model.until(self.layer, batch.x)
        noise = Noise([f"{uid}/epoch-{epoch}" for uid in batch.uids], self.train_seed, model.device, model.dtype)
        optimizer.zero_grad()
        with torch.enable_grad():
            predicted = self.predict(reading, net)
            info = predicted.capacity.flatten(1).mean(1)
        restricted = restrict(
            model, self.layer, front, predicted.lam, reading.prior, noise, self.draws, batch.target, self.relu
        )
        # The classifier's graph is gone already: its gradient at lambda goes on to the weights.
        torch.autograd.backward(
            [predicted.lam, info],
            [restricted.grad / self.train_batch, torch.full_like(info, self.beta / self.train_batch)],
        )
        cross_entropy, nats = restricted.loss.mean().item(), info.mean().item()
        loss = cross_entropy + self.beta * nats
        if math.isfinite(loss):
            optimizer.step()
        closed = (predicted.alpha <= -ALPHA_LIMIT).double().mean().item()
        return [loss, cross_entropy, nats, closed]


@dataclass(frozen=True)
class IBAReadout(Method):
    """Readout bottleneck (section 3.3).

    A first pass records the layers ``readouts``; a network of three 1x1 convolutions, trained on
    the estimation set, reads the noise level of the layer ``layer`` from them. Nothing is
    optimised for a sample, so a map costs one forward pass. It is the same for every target: which
    class is kept was settled by the targets of the training.

    beta, sigma, relu, active_neurons_threshold, layout   as in ``iba.IBA``
    min_std      least standard deviation of a readout; the bottleneck's own is replaced only if it
                 is zero
    epochs, train_batch, lr   of the training, by Adam
    draws        noise draws per sample and step
    train_seed   of the initial weights, the order of the samples and the noise of the training
    as_released  clamp the bottleneck's output at zero whatever ``relu`` says: in the released code
                 a module of the same name takes the option's place. It changes the logits under
                 restriction, and through them the training; not what given weights predict.

    20 epochs are the paper's; train_batch, lr and beta those of the authors' training notebook.
    That is for ImageNet's 1.2 million training images: a small set needs a larger lr, but one too
    large throws alpha to its lower limit, where it stays.
    """

    NAME: ClassVar[str] = "attrib.methods.readout.IBAReadout"
    VERSION: ClassVar[int] = 1
    MAPS: ClassVar[Mapping[str, str]] = {"map": "information in bits per pixel, >= 0, upsampled from the layer"}
    EXTRAS: ClassVar[Mapping[str, str]] = {"capacity": "bits per place of the layer, summed over channels, (h, w)"}

    layer: str = "bottleneck"
    readouts: tuple[str, ...] = ("readout_1", "readout_2", "readout_3")
    beta: float = 10.0
    sigma: float | None = 1.0
    min_std: float = 0.01
    active_neurons_threshold: float = 0.01
    relu: bool = False
    layout: layout.Name = "auto"
    epochs: int = 20
    train_batch: int = 32
    lr: float = 1e-5
    draws: int = 1
    train_seed: int = 0
    as_released: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "readouts", tuple(self.readouts))  # YAML has lists

    @property
    def roles(self) -> tuple[str, ...]:
        return self.fit.roles

    @property
    def fit(self) -> ReadoutFit:
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(ReadoutFit)}
        return ReadoutFit(**{**shared, "relu": self.relu or self.as_released})

    def predict(self, model: Classifier, batch: Batch, state: State) -> tuple[Predicted, Reading]:
        """The bottlenecks themselves, for those who want more than the map."""
        reading = self.fit.read(model, batch.x, state)
        net = {name: weight.to(reading.r) for name, weight in part(state, "net").items()}
        return self.fit.predict(reading, net), reading

    def restricted(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Restricted:
        """The target's loss when only what the map shows may pass, mean over ``draws``."""
        predicted, reading = self.predict(model, batch, state)
        front, clamp = model.until(self.layer, batch.x), self.fit.relu
        return restrict(model, self.layer, front, predicted.lam, reading.prior, noise, self.draws, batch.target, clamp)

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        predicted, reading = self.predict(model, batch, state)
        bits = reading.places.bits(predicted.capacity)
        return {"map": reading.places.spread(bits), "capacity": bits}
