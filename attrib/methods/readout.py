"""Readout IBA: a network that is trained once predicts the bottleneck of every sample.

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

from attrib.checks import require
from attrib.fit import Fit, FitData, Partial, Progress, State
from attrib.methods import Method
from attrib.methods.iba import Gaussian, Restricted, capacity, restrict
from attrib.methods.parts.layout import Layout, on_image
from attrib.methods.parts.statistics import Moments
from attrib.models import Classifier
from attrib.models.reading import check_layout
from attrib.noise import Noise
from attrib.types import Batch, UserError

ALPHA_LIMIT = 5.0  # lambda stays within .0067 and .9933, so the capacity stays finite
SAVE_SECONDS = 300.0  # a training that is killed loses at most this much, and never more than an epoch


def part(state: State, prefix: str) -> State:
    """The entries of ``state`` named ``prefix.*``, without the prefix."""
    return {k.removeprefix(prefix + "."): v for k, v in state.items() if k.startswith(prefix + ".")}


def initial_net(inputs: int, outputs: int, seed: int) -> State:
    """Weights of three 1x1 convolutions, such that alpha is about 5 at first, where nearly everything passes.

    Drawn as by ``torch.nn.Conv2d``, uniform within 1 / sqrt(fan in), but from a stream of their own.
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
    """The network: features (B, inputs, h, w) -> alpha (B, outputs, h, w)."""
    hidden = F.conv2d(features, net["conv1.weight"], net["conv1.bias"]).relu()
    hidden = F.conv2d(hidden, net["conv2.weight"], net["conv2.bias"]).relu()
    return F.conv2d(hidden, net["conv3.weight"], net["conv3.bias"]).clamp(-ALPHA_LIMIT, ALPHA_LIMIT)


class Reading(NamedTuple):
    """What the first pass through the net, without noise, gives for a batch."""

    r: Tensor  # (B, *layer) the bottleneck layer's output
    features: Tensor  # (B, inputs, h, w) the outputs of all ``readouts``, normalised, on the bottleneck's grid
    prior: Gaussian
    places: Layout


class Predicted(NamedTuple):
    """The bottlenecks of a batch; all are (B, *layer)."""

    alpha: Tensor
    lam: Tensor  # smoothed
    capacity: Tensor  # nats


class _Adam(torch.optim.Adam):
    """Adam over named weights, with moments that can be stored and restored."""

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


def _check(owner: ReadoutFit | IBAReadout) -> None:
    """Check the fields that both have. Raises UserError."""
    if not owner.readouts:
        raise UserError(f"{type(owner).__name__}.readouts is empty, must name at least one role")
    require(owner, "train_batch", "draws", at_least=1)
    require(owner, "epochs", "beta", at_least=0)
    require(owner, "lr", "min_std", above=0)
    require(owner, "sigma", at_least=0, or_none=True)
    require(owner, "active_neurons_threshold", at_least=0, below=1)
    check_layout(type(owner).__name__, owner.layout)


@dataclass(frozen=True)
class ReadoutFit(Fit):
    """Fits the statistics of the layers, then trains the readout network on them.

    The state is flat: ``<role>.mean`` (also std, active, n) of every layer, ``net.*`` the weights,
    ``curve`` (steps, 4) the loss, its cross-entropy, its mean capacity in nats, and the share of
    units whose alpha is at its lower limit.

    The size of the training's batches is a hyper-parameter (``train_batch``), and their order and noise
    come from streams named after the epoch, so they do not depend on how the run is divided into jobs.
    Samples that cannot be read are left out. For the fields see ``IBAReadout``.
    """

    NAME: ClassVar[str] = "attrib.methods.readout.ReadoutFit"
    VERSION: ClassVar[int] = 2
    TARGETS: ClassVar[bool] = True

    layer: str
    readouts: tuple[str, ...]
    beta: float
    sigma: float | None
    min_std: float
    active_neurons_threshold: float
    relu: bool
    layout: str
    epochs: int
    train_batch: int
    lr: float
    draws: int
    train_seed: int

    def __post_init__(self) -> None:
        _check(self)

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.layer, *self.readouts)))

    @property
    def laid(self) -> Mapping[str, str]:
        return dict.fromkeys(self.roles, self.layout)

    # ---- the bottlenecks of a batch -----------------------------------------------------------

    def read(self, model: Classifier, x: Tensor, state: State) -> Reading:
        """One pass through the net. Vectors are repeated over the bottleneck's grid, maps are resized to it."""
        found = model.record(self.roles, x)
        r = found[self.layer]
        places = on_image(model, self.layer, x, r, self.layout)
        grids = []
        for role in self.readouts:
            value, statistics = found[role], part(state, role)
            std = statistics["std"].to(value).clamp(min=self.min_std)
            normalised = (value - statistics["mean"].to(value)) / std
            # Layers with as many dimensions as the bottleneck have its layout; a vector (of the head) has not.
            own = on_image(model, role, x, value, self.layout if value.ndim == r.ndim else "auto")
            grid = own.to_grid(normalised)
            grids.append(F.interpolate(grid, size=places.grid, mode="bilinear", align_corners=True))
        prior = Gaussian.of(part(state, self.layer), 0, self.active_neurons_threshold, r)
        # The released code applies min_std to the readouts, but not to the bottleneck, whose capacity is
        # therefore NaN where its deviation is zero.
        prior = prior._replace(std=prior.std.masked_fill(prior.std == 0, self.min_std))
        return Reading(r, torch.cat(grids, dim=1), prior, places)

    def predict(self, reading: Reading, net: State) -> Predicted:
        """What the readout network predicts for these samples; differentiable in its weights.

        Tokens before the grid (a class token) get the mean alpha of the places.
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
        """Raises UserError if the loss is not finite, or if no unit is left that could still learn."""
        state = partial.load()
        if state is None:
            state = self._start(model, data, report)
            partial.save(state)
        trained = ("net.", "adam.")  # a job that continues may have another device or precision
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
                where = f"readout of {model.roles.path(self.layer)}: epoch {epoch + 1} of {self.epochs}"
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
                    parts = f"cross-entropy {cross_entropy:.4g}, {info:.4g} nats, {closed:.1%} of units closed"
                    what = f"readout of {model.roles.path(self.layer)}"
                    more = f", epoch {epoch + 1}: loss {total:.4g} ({parts})"
                    report(Progress(what, len(curve), steps * self.epochs, "steps", more))
        return {name: value.float() if name.startswith("net.") else value for name, value in now().items()}

    def _start(self, model: Classifier, data: FitData, report: Callable[[str], None]) -> State:
        """The state before the first step: the statistics, the initial network, which samples are readable."""
        moments = {role: Moments() for role in self.roles}
        read: set[str] = set()
        for batch in data:
            for role, value in model.record(self.roles, batch.x).items():
                moments[role].add(value)
            read.update(batch.uids)
            report(Progress(f"statistics of {len(self.roles)} layers", len(read), len(data.uids), "samples"))
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
        """Train one step. Returns its row of the curve, means over the batch.

        The gradient is that of the sum over the samples divided by ``train_batch``, so that a sample has
        the same weight in a shorter last batch.
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
        # ``restrict`` went through the classifier; from lambda its gradient is passed on to the weights.
        torch.autograd.backward(
            [predicted.lam, info],
            [restricted.grad / self.train_batch, torch.full_like(info, self.beta / self.train_batch)],
        )
        closed = (predicted.alpha <= -ALPHA_LIMIT).double().mean()
        means = torch.stack([restricted.loss.mean().double(), info.detach().mean().double(), closed])
        cross_entropy, nats, closed_share = means.tolist()
        loss = cross_entropy + self.beta * nats
        if math.isfinite(loss):
            optimizer.step()
        return [loss, cross_entropy, nats, closed_share]


@dataclass(frozen=True)
class IBAReadout(Method):
    """The readout bottleneck (section 3.3).

    A network of three 1x1 convolutions, trained on the estimation set, predicts the noise level at the layer
    ``layer`` from the outputs of the layers ``readouts``. Nothing is optimised for a sample, so a map costs
    one forward pass. It does not depend on the sample's target: the network has learnt to keep the information
    about the targets of the training.

    layer, readouts   roles of these layers
    beta, sigma, relu, active_neurons_threshold, layout   as in ``iba.IBA``
    min_std      smaller standard deviations of the readouts are raised to this; that of the bottleneck is
                 only where it is zero
    epochs, train_batch, lr   of the training, by Adam
    draws        noise draws per sample and step
    train_seed   of the initial weights, the order of the samples and the noise of the training
    as_released  clamp the bottleneck's output at zero whatever ``relu`` says, because in the released code a
                 module of the same name hides that option. This changes the logits under noise, and so the
                 training, but not what given weights predict

    The 20 epochs are the paper's; train_batch, lr and beta are those of the authors' training notebook. They are
    for ImageNet's 1.2 million training images. A small set needs a larger lr; but one too large drives
    alpha to its lower limit, where it stays.

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> given = {"layers": {"bottleneck": "conv2", "readout_1": "conv1"}, "fit": torch.rand(8, 1, 32, 32)}
    >>> attrib.explain(net, x, method=IBAReadout(readouts=("readout_1",), epochs=1), **given).map.shape
    torch.Size([1, 32, 32])
    """

    NAME: ClassVar[str] = "attrib.methods.readout.IBAReadout"
    VERSION: ClassVar[int] = 1
    NEEDS_PROBABILITIES: ClassVar[bool] = True
    MAPS: ClassVar[Mapping[str, str]] = {"map": "information in bits per pixel, >= 0, upsampled from the layer"}
    EXTRAS: ClassVar[Mapping[str, str]] = {"capacity": "bits per place of the layer, summed over channels, (h, w)"}

    layer: str = "bottleneck"
    readouts: tuple[str, ...] = ("readout_1", "readout_2", "readout_3")
    beta: float = 10.0
    sigma: float | None = 1.0
    min_std: float = 0.01
    active_neurons_threshold: float = 0.01
    relu: bool = False
    layout: str = "auto"
    epochs: int = 20
    train_batch: int = 32
    lr: float = 1e-5
    draws: int = 1
    train_seed: int = 0
    as_released: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "readouts", tuple(self.readouts))  # YAML has lists
        _check(self)

    @property
    def roles(self) -> tuple[str, ...]:
        return self.fit.roles

    @property
    def laid(self) -> Mapping[str, str]:
        return self.fit.laid

    @property
    def fit(self) -> ReadoutFit:
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(ReadoutFit)}
        return ReadoutFit(**{**shared, "relu": self.relu or self.as_released})

    def predict(self, model: Classifier, batch: Batch, state: State) -> tuple[Predicted, Reading]:
        """The predicted bottlenecks, from which ``attribute`` makes the map, and what they were predicted from."""
        reading = self.fit.read(model, batch.x, state)
        net = {name: weight.to(reading.r) for name, weight in part(state, "net").items()}
        return self.fit.predict(reading, net), reading

    def restricted(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Restricted:
        """The target's loss when only the information that the map shows passes, mean over ``draws``."""
        predicted, reading = self.predict(model, batch, state)
        front, clamp = model.until(self.layer, batch.x), self.fit.relu
        return restrict(model, self.layer, front, predicted.lam, reading.prior, noise, self.draws, batch.target, clamp)

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        predicted, reading = self.predict(model, batch, state)
        bits = reading.places.bits(predicted.capacity)
        return {"map": reading.places.spread(bits), "capacity": bits}
