"""Functional information: closed forms, a slow reference, sets of features."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from contracts import close
from fisher_nets import Exponential, Linear, conv, inputs, low_rank_state, spd
from torch import Tensor

from attrib.methods.fisher import ABOUT, FunctionalInformation
from attrib.methods.parts.covariance import Covariance
from attrib.methods.parts.inputs import Inputs
from attrib.methods.parts.perturbed import Outputs, Perturbations
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, SampleError, UserError
from attrib.units import Partition

# ---- closed forms -------------------------------------------------------------------------------------


SHAPES = {"image": (2, 3, 2), "sound": (2, 6), "vector": (12,)}


def exponential(shape: tuple[int, ...], n: int, scale: float = 0.25) -> tuple[Classifier, Batch, Tensor]:
    r = np.random.RandomState(1)
    w = torch.tensor(r.randn(math.prod(shape))) * scale
    x = torch.tensor(r.randn(1, *shape)).expand(n, *shape)
    batch = Batch(tuple(map(str, range(n))), x, torch.zeros(n, dtype=torch.long))
    return Classifier(Exponential(w), rows=4096, dtype=torch.float64), batch, w


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_exponential_has_its_known_information(shape):
    """f = exp(w x): grad f = w f, so I = w (S w) E f, and E f = exp(w x + s w S w / 2) for the noise s S.

    The error falls as 1 / sqrt(n), and the standard error says how large it is.
    """
    model, batch, w = exponential(shape, n=64)
    sigma, spread = spd(12), 0.3
    covariance = Covariance("full", jitter=0.0)
    mean = (batch.x[0].flatten() @ w + spread * w @ sigma @ w / 2).exp()
    over = (lambda v: v.view(shape)) if len(shape) == 1 else (lambda v: v.view(shape).sum(0))
    truth = {
        "functional_information": over(w * w) * mean,
        "covariance_functional_information": over(w * (sigma @ w)) * mean,
        "covariance_gradients": over(sigma @ w) * mean,
        "smooth_grad": over(w) * mean,
        "smooth_grad_sq": over(w * w) * (batch.x[0].flatten() @ w * 2 + 2 * spread * w @ sigma @ w).exp(),
        # var(f) = E[f]^2 (exp(s w S w) - 1)
        "var_grad": over(w * w) * mean**2 * torch.expm1(spread * w @ sigma @ w),
    }
    size = {}
    for samples in (64, 1024):
        method = FunctionalInformation(
            tuple(truth), samples, spread, covariance, activation="none", units=Partition(segments=3, side=2)
        )
        found = method.attribute(model, batch, covariance.given(sigma), Noise(batch.uids, dtype=torch.float64))
        for name, value in truth.items():
            wrong = found[name] - value
            size[name, samples] = wrong.square().mean().sqrt()
            expected = found[f"stderr_{name}"].square().mean().sqrt()
            assert 0.7 < size[name, samples] / expected < 1.45, (name, samples)
    for name in truth:
        assert 2.9 < size[name, 64] / size[name, 1024] < 5.5, name  # 4 = sqrt(16)


def test_entropy_is_half_the_information_of_an_exponential_and_less_than_that_of_others():
    """The log-Sobolev inequality, with the noise's own covariance s S; exponentials are its extremals."""
    spread, sigma = 0.8, 1.7
    points, weights = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(80))
    weights = weights / weights.sum()
    covariance = Covariance("scalar", jitter=0.0)
    for net, activation, equal in ((Exponential, "none", True), (Linear, "softmax", False)):
        model = Classifier(net(torch.tensor([0.9], dtype=torch.float64)), rows=4096, dtype=torch.float64)
        batch = Batch(("a",), torch.tensor([[0.3]], dtype=torch.float64), torch.zeros(1, dtype=torch.long))
        method = FunctionalInformation(
            ("covariance_functional_information",), 80, spread, covariance, activation=activation
        )

        class Nodes:  # a quadrature in the place of noise: weights are applied below
            def __init__(self) -> None:
                self.each = iter(points)

            def normal(self, *shape: int, ragged: int | None = None) -> Tensor:
                return next(self.each).reshape(1, 1)

        inputs = Inputs.of(model, batch)
        outputs = Outputs(activation, batch.target, torch.empty(1, 0).long())
        operator = covariance.of(batch, inputs, covariance.given(torch.tensor(sigma, dtype=torch.float64)))
        source = Perturbations(model, inputs, outputs, operator, method.var_spread, Nodes())
        draws = source.draw(torch.tensor([0]), len(points))
        information = (weights * spread * sigma * draws.score.square().flatten()).sum()
        z = 0.3 + (spread * sigma) ** 0.5 * points
        f = (0.9 * z).exp() if net is Exponential else torch.sigmoid(0.9 * z)
        mean = (weights * f).sum()
        entropy = (weights * f * f.log()).sum() - mean * mean.log()
        assert entropy > 0
        if equal:
            torch.testing.assert_close(entropy, information / 2, rtol=1e-9, atol=0)
        else:
            assert entropy < 0.99 * information / 2


def test_information_does_not_depend_on_the_coordinates():
    """y = A x with covariance A S A': the sum of the map is that of x, draw by draw for a triangular A."""
    model, batch, w = exponential((12,), n=2)
    sigma, a = spd(12), torch.eye(12).double() + torch.tensor(np.random.RandomState(3).rand(12, 12)).tril(-1)
    covariance = Covariance("full", jitter=0.0)
    method = FunctionalInformation(
        ("covariance_functional_information", "functional_information"), 20, covariance=covariance, activation="none"
    )
    found = method.attribute(model, batch, covariance.given(sigma), Noise(batch.uids, dtype=torch.float64))
    other = Classifier(Exponential(torch.linalg.solve(a.T, w)), dtype=torch.float64)
    moved = Batch(batch.uids, batch.x @ a.T, batch.target)
    again = method.attribute(other, moved, covariance.given(a @ sigma @ a.T), Noise(batch.uids, dtype=torch.float64))
    name = "covariance_functional_information"
    torch.testing.assert_close(found[name].sum(1), again[name].sum(1), rtol=1e-9, atol=0)
    name = "functional_information"
    assert (found[name].sum(1) / again[name].sum(1) - 1).abs().min() > 0.05  # without covariance it does depend


# ---- a slow and obvious reference -----------------------------------------------------------------------


def slow(method, model, batch, sigma: Tensor, root: Tensor, units: Tensor, label: int | None = None) -> dict:
    """One sample, one draw at a time, with matrices over all features. sigma, root (D, D); units (*places)."""
    noise = Noise(batch.uids, seed=3, dtype=torch.float64)
    shape, places = batch.x.shape[1:], batch.x[0, 0].numel()
    label = int(batch.target[0]) if label is None else label
    g, q, c, h = [], [], [], []
    sets = torch.zeros(places).double()
    conditional = {}
    for u in units.unique().tolist():
        a = (units.flatten() == u).repeat(shape[0])
        inner, outer, cross = sigma[a][:, a], sigma[~a][:, ~a], sigma[a][:, ~a]
        conditional[u] = a, inner - cross @ torch.linalg.solve(outer, cross.T)
    for _ in range(method.samples):
        eps = noise.normal(*shape).flatten()
        x = (batch.x.flatten() + method.var_spread**0.5 * root @ eps).view(1, *shape).requires_grad_()
        logits = model.module(x)
        f = logits.softmax(1)[0, label]
        (grad,) = torch.autograd.grad(f, x)
        grad, f = grad.flatten().detach(), f.detach()
        g.append(grad), q.append(grad**2), c.append(sigma @ grad * grad / f), h.append(grad**2 / f)
        for u, (a, s) in conditional.items():
            sets[units.flatten() == u] += grad[a] @ s @ grad[a] / f / (a.sum() / shape[0]) / method.samples
    g = torch.stack(g)

    def over(v: Tensor) -> Tensor:
        return v.view(shape).sum(0)

    return {
        "functional_information": over(torch.stack(h).mean(0)),
        "covariance_functional_information": over(torch.stack(c).mean(0)),
        "set_information": sets.view(shape[1:]),
        "covariance_gradients": over(sigma @ g.mean(0)),
        "smooth_grad": over(g.mean(0)),
        "smooth_grad_sq": over(torch.stack(q).mean(0)),
        "var_grad": over(g.var(0)),
    }


@pytest.mark.parametrize("kind", ["scalar", "channels", "diagonal", "matrix", "stack", "full", "low_rank"])
def test_the_slow_reference(kind):
    batch, places, features = inputs(3), 20, 60
    one = torch.eye(3).double()
    covariance = Covariance(kind, jitter=1e-6 if kind == "low_rank" else 0.0)
    if kind == "low_rank":
        state, sigma, root = low_rank_state(features)
    else:
        given = {
            "scalar": torch.tensor(1.3).double(), "channels": torch.tensor([0.5, 1.0, 2.0]),
            "diagonal": torch.tensor(np.random.RandomState(2).rand(3, 4, 5)) + 0.1,
            "matrix": spd(places), "stack": torch.stack([spd(places, i) for i in range(3)]), "full": spd(features),
        }[kind]  # fmt: skip
        state = covariance.given(given)
        sigma = {
            "scalar": lambda: given.double() * torch.eye(features).double(),
            "channels": lambda: torch.diag(given.double().repeat_interleave(places)),
            "diagonal": lambda: torch.diag(given.flatten()), "matrix": lambda: torch.kron(one, given),
            "stack": lambda: torch.block_diag(*given), "full": lambda: given,
        }[kind]()  # fmt: skip
        root = torch.linalg.cholesky(sigma)
    partition = Partition(kind="tiles", side=2)
    method = FunctionalInformation(tuple(ABOUT), 7, 0.2, covariance, units=partition, labels=(2, 0))
    found = method.attribute(conv(rows=5), batch, state, Noise(batch.uids, 3, dtype=torch.float64))
    units = partition.of(batch).of[0]
    for i in range(len(batch)):
        expected = slow(method, conv(), batch[[i]], sigma, root, units)
        close({name: found[name][i] for name in ABOUT}, expected, 1e-12)
    expected = slow(method, conv(), batch[[0]], sigma, root, units, label=2)
    close({name: found[f"{name}_by_label"][0, ..., 0] for name in ABOUT}, expected, 1e-12)


def test_a_covariance_per_class():
    batch = inputs(4)
    covariance = Covariance("matrix", per_class=True, jitter=0.0)
    states = [Covariance("matrix", jitter=0.0).given(spd(20, i)) for i in range(4)]
    state = {name: torch.cat([s[name] for s in states]) for name in states[0]} | {"classes": torch.arange(4)}
    names = ("covariance_functional_information", "set_information")
    fields = {"samples": 5, "units": Partition("superpixels", segments=4)}
    found = FunctionalInformation(names, covariance=covariance, **fields).attribute(
        conv(), batch, state, Noise(batch.uids, 3, dtype=torch.float64)
    )
    for i, target in enumerate(batch.target.tolist()):
        alone = FunctionalInformation(names, covariance=Covariance("matrix", jitter=0.0), **fields).attribute(
            conv(), batch[[i]], states[target], Noise([batch.uids[i]], 3, dtype=torch.float64)
        )
        close({name: found[name][i] for name in names}, {name: alone[name][0] for name in names}, 1e-12)
    state["classes"] = state["classes"] + 10
    with pytest.raises(SampleError, match="0/0: the estimation set has no class"):
        FunctionalInformation(names, covariance=covariance).attribute(conv(), batch, state, Noise(batch.uids))


# ---- sets -----------------------------------------------------------------------------------------------


def test_sets_from_single_places_to_everything():
    """A unit that is everything has the whole information; independent places add up; and a hierarchy is a sum."""
    batch, covariance = inputs(3), Covariance("full", jitter=0.0)
    state = covariance.given(spd(60))
    names = ("set_information", "covariance_functional_information")

    def explain(covariance, state, **fields):
        method = FunctionalInformation(names, 6, covariance=covariance, **fields)
        return method.attribute(conv(), batch, state, Noise(batch.uids, 3, dtype=torch.float64))

    whole = explain(covariance, state, units=Partition("tiles", side=1))
    total = whole["covariance_functional_information"].sum((1, 2))
    torch.testing.assert_close(whole["set_information"], (total / 20)[:, None, None].expand(-1, 4, 5))
    places = explain(covariance, state, units=Partition("tiles", side=5))
    assert (places["set_information"] >= 0).all()
    assert (places["set_information"].sum((1, 2)) < total).all()  # what places share is nobody's, given the rest
    independent = explain(Covariance(), {}, units=Partition("tiles", side=5))
    torch.testing.assert_close(independent["set_information"], independent["covariance_functional_information"])
    low = explain(Covariance("low_rank"), low_rank_state(60)[0], units=Partition("tiles", side=1))
    total = low["covariance_functional_information"].sum((1, 2))
    torch.testing.assert_close(low["set_information"].sum((1, 2)), total)

    levels = [explain(covariance, state, units=Partition("tiles", side=side))["set_information"] for side in (4, 2, 1)]
    found = explain(covariance, state, units=Partition("tiles", side=4), levels=3)["set_information"]
    torch.testing.assert_close(found, sum(levels))
    found = explain(covariance, state, units=Partition("superpixels", segments=8), levels=2)["set_information"]
    assert (found > 0).all()
    with pytest.raises(UserError, match="levels=4: a grid of 4 tiles"):
        explain(covariance, state, units=Partition("tiles", side=4), levels=4)


def test_pairs_of_windows_of_sounds():
    batch = inputs(2, (3, 8))
    covariance = Covariance("matrix", jitter=0.0)
    names, state = ("set_information",), covariance.given(spd(8))

    def explain(segments, levels=1):
        method = FunctionalInformation(
            names, 5, covariance=covariance, units=Partition(segments=segments), levels=levels
        )
        return method.attribute(conv(dims=1), batch, state, Noise(batch.uids, dtype=torch.float64))["set_information"]

    torch.testing.assert_close(explain(8, 3), explain(8) + explain(4) + explain(2))
    # Units that a person has drawn: what belongs to none has no information, and is part of the rest.
    drawn = torch.tensor([[-1, 0, 0, 1, 1, 1, -1, -1], [0, 0, 0, 0, -1, -1, -1, 1]])
    given = Batch(batch.uids, batch.x, batch.target, units=drawn)
    method = FunctionalInformation(names, 5, covariance=covariance, units=Partition("given"))
    found = method.attribute(conv(dims=1), given, state, Noise(batch.uids, dtype=torch.float64))["set_information"]
    assert ((found == 0) == (drawn < 0)).all()
