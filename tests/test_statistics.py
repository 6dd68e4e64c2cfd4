"""Moments and FeatureStatistics: parity with the released code, numpy, any cut into batches, the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import golden
from torch import Tensor, nn

from attrib.methods.iba import Gaussian
from attrib.methods.parts.statistics import FeatureStatistics, Moments
from attrib.models import Classifier
from attrib.types import Batch, UserError


def moments(pieces: list[Tensor]) -> Moments:
    found = Moments()
    for piece in pieces:
        found.add(piece)
    return found


def exact(found: Moments) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """mean, std and share of non-zero values in float64, before they are rounded for the state."""
    nonzero = found._nonzero.double() / found.n
    return found._mean.numpy(), (found._m2 / (found.n - 1)).sqrt().numpy(), nonzero.numpy()


def test_equals_the_released_code():
    data = golden("iba_pieces")
    state = moments(list(torch.tensor(data["welford_x"]).split(10))).state()
    assert state["n"] == data["welford_n"] == 40
    for name in ("mean", "std"):
        np.testing.assert_allclose(state[name], data[f"welford_{name}"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state[name], data[f"welford_numpy_{name}"], rtol=1e-6, atol=1e-7)
    for key, threshold in (("welford_active", 0.01), ("welford_active_p5", 0.5)):
        found = Gaussian.of(state, 0.01, threshold, state["mean"]).active
        assert np.array_equal(found.bool().numpy(), data[key])
    assert not data["welford_active_p5"].all()


@st.composite
def samples_in_pieces(draw):
    """(n, 2, 3) of some scale and offset, with zeros, cut anywhere."""
    n = draw(st.integers(2, 40))
    r = np.random.RandomState(draw(st.integers(0, 2**32 - 1)))
    x = r.randn(n, 2, 3) * 10.0 ** draw(st.integers(-4, 4)) + draw(st.sampled_from([0.0, 1.0, -1e3]))
    x[r.rand(n, 2, 3) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = 0.0
    cuts = sorted(draw(st.sets(st.integers(1, n - 1))))
    return x, [torch.tensor(piece) for piece in np.split(x, cuts)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(samples_in_pieces())
def test_any_cut_equals_numpy(case):
    x, pieces = case
    mean, std, active = exact(moments(pieces))
    scale = np.abs(x).max() or 1.0
    np.testing.assert_allclose(mean, x.mean(0), rtol=0, atol=1e-13 * scale)
    np.testing.assert_allclose(std, x.std(0, ddof=1), rtol=0, atol=1e-12 * scale)
    assert np.array_equal(active, (x != 0).mean(0))


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_large_offset_costs_nothing(size):
    """mean(x^2) - mean(x)^2 would be wrong in every digit. The numbers themselves are exact to 1e-8."""
    spread = np.random.RandomState(0).randn(100, 5) * 1e-2
    x = torch.tensor(spread + 1e8)
    mean, std, _ = exact(moments(list(x.split(size))))
    np.testing.assert_allclose(std, x.numpy().std(0, ddof=1), rtol=2e-6)
    np.testing.assert_allclose(mean - 1e8, x.numpy().mean(0) - 1e8, rtol=0, atol=1e-7)


def test_float32_samples_are_summed_in_float64():
    x = torch.tensor(np.random.RandomState(0).randn(4000, 3) + 300).float()
    state = moments(list(x.split(1))).state()
    np.testing.assert_allclose(state["std"], x.double().std(0), rtol=1e-6)
    assert {state[name].dtype for name in ("mean", "std", "active")} == {torch.float32}


def test_units_that_never_vary_have_no_spread():
    x = torch.tensor([[0.1, 0.0, 1.0]]).repeat(30, 1)
    x[::2, 2] = 0.0
    for size in (1, 4, 30):
        state = moments(list(x.split(size))).state()
        assert state["std"][:2].tolist() == [0.0, 0.0]
        assert state["active"].tolist() == [1.0, 0.0, 0.5]


def test_the_state_has_the_shape_of_the_layer():
    for shape in ((), (4,), (5, 4), (3, 2, 4)):
        state = moments([torch.ones(2, *shape), torch.ones(1, *shape)]).state()
        assert {name: tuple(state[name].shape) for name in ("mean", "std", "active", "n")} == {
            "mean": shape, "std": shape, "active": shape, "n": ()
        }  # fmt: skip


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_samples_are_an_error(n):
    with pytest.raises(UserError, match=f"at least 2 samples, the estimation set has {n}"):
        moments([torch.ones(1, 3)] * n).state()


class Data:
    """Three samples, one of them alone."""

    uids = ("a", "b", "c")

    def batch(self, uids):
        index = [self.uids.index(uid) for uid in uids]
        x = torch.arange(36.0).double().sin().reshape(3, 3, 2, 2)[index]
        return Batch(tuple(uids), x, torch.zeros(len(uids)).long())

    def __iter__(self):
        return iter((self.batch("ab"), self.batch("c")))


def test_a_fit_reads_its_layer_of_every_sample_and_says_how_far_it_is():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    model = Classifier(net, {"bottleneck": "0", "other": "2"}, dtype=torch.float64)
    for role, path in (("bottleneck", "0"), ("other", "2")):
        fit, lines = FeatureStatistics(role), []
        assert fit.roles == (role,)
        state = fit.run(model, Data(), None, lines.append)
        x = Data().batch("abc").x
        z = model.module[:1](x) if path == "0" else model.module[:3](x)
        np.testing.assert_allclose(state["mean"], z.mean(0), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(state["std"], z.std(0), rtol=1e-6, atol=1e-7)
        assert lines == [f"feature statistics of {path}: {n} / 3 samples" for n in (2, 3)]
