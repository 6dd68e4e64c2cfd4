"""Noise: numbers that belong to samples, against an independent SplitMix64 and against statistics."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from contracts import forbid_global_rng
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from attrib.noise import Noise

MASK = 2**64 - 1
UIDS = tuple(f"val/{i:03d}" for i in range(7))
SHAPES = ((), (1,), (3,), (5,), (2, 0), (3, 7, 5), (3, 17, 19))


def words(seed: int, uid: str, n: int) -> list[int]:
    """SplitMix64 as its paper writes it: unsigned, one word at a time."""
    key = hashlib.sha256(f"{seed}/{uid}".encode()).digest()
    state, gamma = int.from_bytes(key[:8], "big"), int.from_bytes(key[8:16], "big") | 1
    found = []
    for _ in range(n):
        x = state
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
        found.append(x ^ (x >> 31))
        state = (state + gamma) & MASK
    return found


def draw(noise: Noise) -> list[torch.Tensor]:
    """Everything there is, in one order."""
    found = []
    for shape in SHAPES:
        found += [noise.normal(*shape), noise.uniform(*shape), noise.integers(10, *shape)]
    return [*found, noise.permutation(11)]


# The generator ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(-(2**70), 2**70), st.text(max_size=20), st.integers(0, 9))
def test_bits_are_splitmix64(seed, uid, n):
    noise = Noise([uid, "other"], seed)
    got = torch.cat((noise.bits(3), noise.bits(n)), dim=1)[0].tolist()
    assert [g & MASK for g in got] == words(seed, uid, 3 + n)


def test_the_numbers_are_made_of_the_bits():
    w = words(5, "a", 6)
    noise = Noise(["a"], 5)
    u, k = noise.uniform(2)[0], noise.integers(1000, 2)[0]
    assert u.tolist() == [(v >> 40) / 2**24 for v in w[:2]]
    assert k.tolist() == [(v >> 1) % 1000 for v in w[2:4]]
    radius = [math.sqrt(-2 * math.log(((v >> 32) + 0.5) / 2**32)) for v in w[4:]]
    angle = [2 * math.pi * (v & 0xFFFFFFFF) / 2**32 for v in w[4:]]
    expected = [r * math.cos(a) for r, a in zip(radius, angle)] + [radius[0] * math.sin(angle[0])]
    np.testing.assert_allclose(noise.normal(3)[0], expected, rtol=0, atol=2e-6)
    order = Noise(["a"], 5).permutation(6)[0].tolist()
    signed = [v - 2**64 if v >> 63 else v for v in w]
    assert order == sorted(range(6), key=lambda i: signed[i])


def test_pinned():
    """If this fails, stored results no longer belong to their keys: raise every VERSION."""
    noise = Noise(["val/n01440764/000293", "ü/∑"], seed=7)
    assert noise.bits(2).tolist() == [
        [-8997826489043154828, 6835933276638825910],
        [5639878954930962915, 7471729845346601449],
    ]
    assert noise.uniform(2).tolist() == [
        [0.7654061317443848, 0.2995225787162781],
        [0.13932716846466064, 0.8017609119415283],
    ]
    np.testing.assert_allclose(
        noise.normal(3), [[-0.5175122, 0.1664504, 2.0006113], [-0.3599708, -1.9064143, 0.7370111]], rtol=0, atol=1e-6
    )
    assert noise.integers(1000, 2).tolist() == [[649, 932], [955, 243]]
    assert noise.permutation(5).tolist() == [[3, 0, 4, 1, 2], [1, 2, 0, 4, 3]]
    assert noise.child("fit").integers(1000, 2).tolist() == [[4, 593], [478, 13]]


# Samples do not see each other ------------------------------------------------------------------


def test_batch_is_singles_in_any_order():
    whole = draw(Noise(UIDS, 3))
    for i, uid in enumerate(UIDS):
        for got, row in zip(draw(Noise([uid], 3)), whole):
            assert torch.equal(got[0], row[i])
    order = [4, 0, 6, 2, 1, 5, 3]
    for got, row in zip(draw(Noise([UIDS[i] for i in order], 3)), whole):
        assert torch.equal(got, row[order])


def test_a_large_draw_does_not_depend_on_the_batch():
    """torch's vectorised log and cos must not treat the ends of a block in another way."""
    whole = Noise(UIDS, 3).normal(3, 61, 67)
    for i, uid in enumerate(UIDS):
        assert torch.equal(Noise([uid], 3).normal(3, 61, 67)[0], whole[i])


def test_float64_sees_the_numbers_of_float32():
    for a, b in zip(draw(Noise(UIDS, 3)), draw(Noise(UIDS, 3, dtype=torch.float64))):
        assert b.dtype == (torch.float64 if a.is_floating_point() else torch.int64)
        assert torch.equal(a.to(b.dtype), b)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from(["normal", "uniform", "integers", "permutation", "bits"]), max_size=6), st.data())
def test_streams_go_on_where_they_were(kinds, data):
    """Whatever is drawn: the words used are counted, and no word is used twice."""
    noise, used = Noise(["a"], 1), 0
    for kind in kinds:
        n = data.draw(st.integers(0, 5))
        getattr(noise, kind)(*((7, n) if kind == "integers" else (n,)))
        used += (n + 1) // 2 if kind == "normal" else n
    assert noise.bits(1).item() & MASK == words(1, "a", used + 1)[-1]


def test_names_seeds_and_children_differ():
    noises = [Noise([uid], seed) for uid in ("a", "b", "a/fit", "fit", "") for seed in (0, 1, -1)]
    noises += [n.child(name) for n in noises for name in ("fit", "ties", "fit/ties")]
    noises += [n.child("fit").child("ties") for n in noises[:15]]
    drawn = [n.bits(1).item() for n in noises]
    assert len(set(drawn)) == len(drawn)


def test_a_child_starts_at_its_own_beginning_and_keeps_dtype():
    parent = Noise(UIDS, 3, dtype=torch.float64)
    before = parent.child("fit").normal(4)
    parent.normal(100)
    assert torch.equal(parent.child("fit").normal(4), before)
    assert before.dtype == torch.float64


def test_shapes():
    noise = Noise(UIDS, 3)
    assert noise.normal().shape == noise.uniform().shape == noise.integers(3).shape == (7,)
    assert noise.normal(3, 0).shape == noise.uniform(3, 0).shape == noise.integers(3, 3, 0).shape == (7, 3, 0)
    assert noise.permutation(0).shape == (7, 0)
    assert noise.permutation(1).tolist() == [[0]] * 7
    nobody = Noise([])
    assert nobody.normal(2, 3).shape == nobody.uniform(2, 3).shape == (0, 2, 3)
    assert nobody.permutation(4).shape == (0, 4)


def test_no_global_rng():
    with forbid_global_rng():
        draw(Noise(UIDS).child("x"))


# Statistics; all streams are fixed, so these either always pass or never --------------------------


def flat(*, n: int, kind: str = "normal") -> np.ndarray:
    return getattr(Noise([f"s{i}" for i in range(100)], 11), kind)(n).double().numpy()


def test_normal():
    x = flat(n=2001)
    assert stats.kstest(x.ravel(), "norm").pvalue > 0.01
    assert abs(stats.kurtosis(x.ravel())) < 0.03
    assert (np.abs(x) < 6.77).all()
    # The two numbers of one word lie half a draw apart.
    assert abs(np.corrcoef(x[:, :1001].ravel()[: 100 * 1000], x[:, 1001:].ravel()[: 100 * 1000])[0, 1]) < 0.01


def test_uniform():
    x = flat(n=2001, kind="uniform")
    assert stats.kstest(x.ravel(), "uniform").pvalue > 0.01
    assert x.min() >= 0
    assert x.max() < 1


@pytest.mark.parametrize("high", [1, 2, 10, 1000, 2**31])
def test_integers(high):
    x = Noise([f"s{i}" for i in range(100)], 11).integers(high, 1000).numpy().ravel()
    assert x.min() >= 0
    assert x.max() < high
    if high <= 1000:
        assert stats.chisquare(np.bincount(x, minlength=high)).pvalue > 0.01 or high == 1


def test_neighbours_are_not_correlated():
    x = flat(n=4000, kind="uniform") - 0.5
    x /= x.std()
    bound = 4.5 / math.sqrt(4000)  # 4.5 standard errors
    across = (x @ x.T) / 4000
    assert np.abs(across - np.diag(np.diag(across))).max() < bound
    for lag in (1, 2, 3, 64, 224):
        assert abs((x[:, lag:] * x[:, :-lag]).mean()) < 4.5 / math.sqrt(400_000 - 100 * lag)
    # The same position under neighbouring seeds.
    seeds = np.stack([Noise(["a"], s).uniform(4000)[0].numpy() for s in range(20)])
    assert np.abs(np.corrcoef(seeds) - np.eye(20)).max() < bound


def test_every_bit_is_fair():
    bits = Noise([f"s{i}" for i in range(100)], 2).bits(1000).numpy().ravel().view(np.uint64)
    ones = np.array([int(((bits >> np.uint64(k)) & np.uint64(1)).sum()) for k in range(64)])
    assert np.abs(ones - 50_000).max() < 4.5 * math.sqrt(25_000)


def test_permutations_are_permutations_and_uniform():
    orders = Noise([f"s{i}" for i in range(6000)], 4).permutation(4)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(4).expand(6000, 4))
    codes = (orders * torch.tensor([64, 16, 4, 1])).sum(1)
    counts = torch.unique(codes, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts.numpy()).pvalue > 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same():
    for a, b in zip(draw(Noise(UIDS, 3)), draw(Noise(UIDS, 3, device="cuda"))):
        torch.testing.assert_close(b.cpu(), a, rtol=0, atol=1e-6 if a.is_floating_point() else 0)


# ---- texts ---------------------------------------------------------------------------------------


def test_ragged_numbers_do_not_depend_on_the_length():
    def draws(length: int) -> list[torch.Tensor]:
        noise = Noise(UIDS, 7)
        return [
            noise.normal(3, length, 4, ragged=1),
            noise.uniform(length, ragged=0),
            noise.normal(5, length, ragged=1),
            noise.normal(2, 2),  # not ragged, and the same after draws of any length
            noise.permutation(length, ragged=True),
        ]

    short, long = draws(5), draws(9)
    torch.testing.assert_close(long[0][:, :, :5], short[0], rtol=0, atol=0)
    torch.testing.assert_close(long[1][:, :5], short[1], rtol=0, atol=0)
    torch.testing.assert_close(long[2][:, :, :5], short[2], rtol=0, atol=0)
    torch.testing.assert_close(long[3], short[3], rtol=0, atol=0)
    for one, other in zip(long[4].tolist(), short[4].tolist()):
        assert [n for n in one if n < 5] == other


def test_ragged_numbers_are_as_random_as_others():
    noise = Noise(["a", "b"], 1)
    normal, uniform = noise.normal(10, 2000, ragged=1), noise.uniform(2000, 10, ragged=0)
    assert abs(normal.mean()) < 0.02
    assert abs(normal.std() - 1) < 0.02
    assert abs(uniform.mean() - 0.5) < 0.01
    others = [noise.normal(10, 2000, ragged=1), noise.normal(10, 2000), Noise(["a", "b"], 2).normal(10, 2000, ragged=1)]
    for other in others:  # every draw is another one
        assert abs(torch.corrcoef(torch.stack((normal.flatten(), other.flatten())))[0, 1]) < 0.03
    assert abs(torch.corrcoef(normal.flatten(1))[0, 1]) < 0.03
    neighbours = torch.corrcoef(torch.stack((normal[:, :, 1:].flatten(), normal[:, :, :-1].flatten())))[0, 1]
    assert abs(neighbours) < 0.03
