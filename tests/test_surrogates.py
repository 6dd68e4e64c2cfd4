"""LIME and Kernel SHAP against captum's own, the Shapley formula and least squares written out."""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch
from captum.attr import KernelShap as CaptumKernelShap
from captum.attr import Lime as CaptumLime
from captum.attr._core.lime import get_exp_kernel_similarity_function
from contracts import seeded
from text_nets import K, text_classifier, text_net, texts
from torch import Tensor, nn

from attrib.methods.parts.losses import target_score
from attrib.methods.surrogates import KernelShap, Lime, Units
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError

H, W = 8, 10
NETS = ["lstm", "around", "untraceable"]


def streams(batch: Batch) -> Noise:
    return Noise(batch.uids, seed=5, dtype=torch.float64)


def explain(method: Lime | KernelShap, net: str, batch: Batch, rows: int = 7) -> Tensor:
    return method.attribute(text_classifier(net)(rows, torch.float64), batch, {}, streams(batch))["map"]


def same(found: Tensor, expected: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=atol)


def without(net: nn.Module, batch: Batch, i: int, kept: set[int], baseline: str) -> float:
    """The target's score of one sentence, alone, of which only some words are there."""
    length = int(batch.lengths[i])
    ids, words = batch.x[i, :length], batch.words[i, :length]
    gone = torch.tensor([w >= 0 and w not in kept for w in words.tolist()])
    z = net.embedding(torch.where(gone, net.mask_id, ids)) if baseline == "mask" else net.embedding(ids)
    z = z * ~gone[:, None] if baseline == "zero" else z
    handle = net.embedding.register_forward_hook(lambda *_: z[None])
    logits = net(ids[None])
    handle.remove()
    return target_score(logits, batch.target[i : i + 1]).item()


def per_word(row: Tensor, words: Tensor) -> list[float]:
    """The map's sum over the tokens of each word; tokens of a word must have equal shares, others none."""
    assert (row[words < 0] == 0).all()
    parts = [row[words == w] for w in range(int(words.max()) + 1)]
    assert all(len(part) > 0 and (part == part[0]).all() for part in parts)
    return [part.sum().item() for part in parts]


def shapley_values(score, n: int) -> list[float]:
    """The definition: mean marginal contribution, over subsets with their weights."""
    known = cache(lambda kept: score(set(kept)))
    values = []
    for i in range(n):
        others, total = [j for j in range(n) if j != i], 0.0
        for size in range(n):
            weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
            for subset in itertools.combinations(others, size):
                total += weight * (known(frozenset({*subset, i})) - known(frozenset(subset)))
        values.append(total)
    return values


# ---- Kernel SHAP -----------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("baseline", ["zero", "mask"])
def test_all_masks_give_shapley_values(net, baseline):
    batch, module = texts(4), text_net(net)
    found = explain(KernelShap(samples=128, baseline=baseline), net, batch, rows=100)
    counts = [int(words.max()) + 1 for words in batch.words]
    assert min(counts) == 1
    assert 4 <= max(counts) <= 7  # 2^7 masks
    for i, n in enumerate(counts):
        expected = shapley_values(lambda kept, i=i: without(module, batch, i, kept, baseline), n)
        same(torch.tensor(per_word(found[i], batch.words[i])), torch.tensor(expected))
        assert max(map(abs, expected)) > 1e-3


@pytest.mark.parametrize("samples", [2, 3, 4, 5, 6, 9, 20, 127, 128, 300])
@pytest.mark.parametrize("baseline", ["zero", "mask"])
def test_kernel_shap_is_efficient_however_many_masks(samples, baseline):
    """Sum of the map = score of the sentence minus that of the sentence without words."""
    batch, module = texts(4), text_net("lstm")
    found = explain(KernelShap(samples=samples, baseline=baseline), "lstm", batch)
    for i in range(4):
        ends = [without(module, batch, i, set(kept), baseline) for kept in (range(99), ())]
        assert abs(found[i].sum().item() - (ends[0] - ends[1])) < 1e-6
        assert abs(ends[0] - ends[1]) > 1e-3


def test_sampled_masks_come_near_the_shapley_values():
    batch = texts(4)
    exact = explain(KernelShap(samples=128), "around", batch)
    errors = [
        (explain(KernelShap(samples=samples), "around", batch) - exact).norm().item() / exact.norm().item()
        for samples in (3, 10, 60)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.1


def test_without_interactions_few_masks_are_enough():
    """A net that is linear in the words: any n masks of full rank give its coefficients."""
    batch = long_text(20)
    found = explain_linear(KernelShap(samples=60), batch)
    same(found, linear_values(batch))


def test_masks_are_of_the_kernel_sizes_in_pairs_of_complements():
    units = Units(torch.arange(12).expand(3, 12), torch.tensor([12, 9, 10]))
    masks = KernelShap(samples=400).masks(units, Noise(("a", "b", "c"), 1))
    for i, n in enumerate(units.n.tolist()):
        keep = masks.keep[masks.owner == i]
        assert not keep[:, n:].any()
        keep = keep[:, :n]
        assert len(keep) == 400
        assert keep[0].all()
        assert not keep[1].any()
        assert torch.equal(keep[2:201], ~keep[201:400][:, :n])
        sizes = torch.bincount(keep[2:201].sum(1), minlength=n + 1)[1:n].double()
        expected = torch.tensor([1 / (k * (n - k)) for k in range(1, n)]).double()
        expected *= 199 / expected.sum()
        assert ((sizes - expected) ** 2 / expected).sum() < 30  # chi-squared of 8 to 10 degrees of freedom
        assert (keep[2:].double().mean(0) - 0.5).abs().max() < 1e-9 + 1 / 398  # complements
        assert len(keep.unique(dim=0)) > 50


# ---- LIME ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("alpha", "width", "baseline"), [(1.0, 0.25, "zero"), (0.01, 1.0, "mask"), (0.0, 0.5, "zero")])
def test_lime_is_a_weighted_ridge_regression(net, alpha, width, baseline):
    batch, module = texts(4), text_net(net)
    method = Lime(samples=40, kernel_width=width, alpha=alpha, baseline=baseline)
    masks = method.masks(Units.words(batch), streams(batch))
    found = explain(method, net, batch)
    for i in range(3):
        n = int(batch.words[i].max()) + 1
        keep = masks.keep[masks.owner == i][:, :n].double()
        scores = [without(module, batch, i, set(k.nonzero().flatten().tolist()), baseline) for k in keep.bool()]
        d = 1 - keep.sum(1) / (keep.norm(dim=1).clamp(min=1e-9) * n**0.5)
        weight = torch.exp(-(d**2) / (2 * width**2))
        # Normal equations with a column of ones, which is not penalised.
        x, y = torch.cat((torch.ones(len(keep), 1).double(), keep), 1), torch.tensor(scores).double()
        penalty = alpha * torch.eye(n + 1).double()
        penalty[0, 0] = 0
        expected = torch.linalg.solve(x.T @ (weight[:, None] * x) + penalty, x.T @ (weight * y))[1:]
        same(torch.tensor(per_word(found[i], batch.words[i])), expected)


def test_lime_removes_a_uniform_number_of_units():
    units = Units(torch.arange(10).expand(2, 10), torch.tensor([10, 4]))
    masks = Lime(samples=801).masks(units, Noise(("a", "b"), 1))
    for i, n in enumerate((10, 4)):
        keep = masks.keep[masks.owner == i]
        assert keep[0, :n].all()
        assert not keep[:, n:].any()
        removed = torch.bincount(n - keep[1:].sum(1), minlength=n + 1)
        assert removed[0] == 0
        assert ((removed[1:] - 800 / n) ** 2 / (800 / n)).sum() < 25
        assert (keep[1:, :n].double().mean(0) - (n - 1) / (2 * n)).abs().max() < 0.06


def test_a_linear_net_gets_its_own_weights():
    batch = long_text(20)
    same(explain_linear(Lime(samples=60, alpha=0.0), batch), linear_values(batch))


# ---- against captum --------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * H * W, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).flatten(1))


def pictures(n: int = 3) -> Batch:
    r = np.random.RandomState(0)
    return Batch(tuple(f"s{i}" for i in range(n)), torch.tensor(r.randn(n, 3, H, W)), torch.tensor(r.randint(0, K, n)))


def picture_map(method: Lime | KernelShap, batch: Batch, rows: int = 7) -> Tensor:
    return method.attribute(Classifier(seeded(Net()), rows=rows, dtype=torch.float64), batch, {}, streams(batch))["map"]


def by_captum(method: Lime | KernelShap, batch: Batch, tiles: int) -> Tensor:
    """captum's own class with its sklearn surrogate, handed the same masks."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    assert linear_model is not None
    from captum._utils.models.linear_model import SkLearnRidge

    units, net = Units.tiles(batch, tiles), seeded(Net()).float()
    masks, maps = method.masks(units, streams(batch)), []
    for i in range(len(batch)):
        keep = masks.keep[masks.owner == i].long()

        def handed(*_, keep=keep, **kwargs):
            yield from keep.split(1)

        if isinstance(method, Lime):
            kernel = get_exp_kernel_similarity_function("cosine", method.kernel_width)

            def similarity(_, __, z, kernel=kernel, **kwargs):
                return kernel(torch.ones_like(z), z, z)

            lime = CaptumLime(net, SkLearnRidge(alpha=method.alpha), similarity, handed)
        else:
            lime = CaptumKernelShap(net)
            lime.perturb_func = handed
        values = lime.attribute(
            batch.x[i : i + 1].float(),
            target=int(batch.target[i]),
            feature_mask=units.of[i : i + 1].unsqueeze(1),
            n_samples=len(keep),
            return_input_shape=False,
        ).flatten()
        maps.append(units.spread(values.expand(len(batch), -1).double())[i])
    return torch.stack(maps)


@pytest.mark.parametrize(
    "method",
    [
        Lime(samples=60, tiles=2),
        Lime(samples=60, tiles=3, kernel_width=1.0, alpha=0.1),
        KernelShap(samples=60, tiles=3),  # fewer than 2^9, so that they are drawn: captum does not weight all of them
    ],
    ids=lambda m: f"{type(m).__name__}-{m.tiles}",
)
def test_captum_finds_the_same_with_the_same_masks(method):
    batch = pictures()
    found = picture_map(method, batch)
    same(found, by_captum(method, batch, method.tiles), 1e-4 * found.abs().max().item())


# ---- images ----------------------------------------------------------------------------------------


def test_tiles_are_a_grid_whose_values_are_shared_by_its_pixels():
    batch = pictures()
    found = picture_map(KernelShap(samples=512, tiles=3), batch)
    tiles = Units.tiles(batch, 3).of[0]
    assert tiles.unique().tolist() == list(range(9))
    assert torch.equal(tiles[0], torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2]))
    assert torch.equal(tiles[:, 0], torch.tensor([0, 0, 0, 3, 3, 3, 6, 6]))
    net = seeded(Net())

    def score(i: int, kept: set[int]) -> float:
        there = torch.tensor([t in kept for t in tiles.flatten().tolist()]).view(H, W)
        return target_score(net((batch.x[i] * there)[None]), batch.target[i : i + 1]).item()

    for i in range(3):
        same(
            torch.tensor(per_word(found[i].flatten(), tiles.flatten())),
            torch.tensor(shapley_values(lambda kept, i=i: score(i, kept), 9)),
        )


def test_more_tiles_than_pixels_are_pixels():
    units = Units.tiles(pictures(), 9)
    assert units.n.tolist() == [8 * 9] * 3
    assert Units.tiles(pictures(), 100).of.flatten(1).sort(1).values.equal(torch.arange(80).expand(3, 80))


# ---- texts: edges, rows, errors --------------------------------------------------------------------


class LinearInWords(nn.Module):
    """The logit of class k is k + 1 times the sum of the tokens' values."""

    pad_id, mask_id = 1, 0

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 1)

    def forward(self, x: Tensor) -> Tensor:
        total = (self.embedding(x) * (x != 1).unsqueeze(-1)).sum(1)
        return total * torch.arange(1, K + 1)


def long_text(n: int) -> Batch:
    x = torch.cat((torch.arange(2, n + 2)[None], torch.full((1, n), 1)))
    x[1, :3] = torch.tensor([5, 6, 7])
    words = torch.where(x == 1, -1, torch.arange(n))
    return Batch(("a", "b"), x, torch.tensor([1, 2]), lengths=torch.tensor([n, 3]), words=words)


def explain_linear(method: Lime | KernelShap, batch: Batch) -> Tensor:
    model = Classifier(seeded(LinearInWords()), {"embedding": "embedding"}, dtype=torch.float64)
    return method.attribute(model, batch, {}, streams(batch))["map"]


def linear_values(batch: Batch) -> Tensor:
    values = seeded(LinearInWords()).embedding(batch.x)[..., 0] * (batch.target + 1)[:, None]
    return values.masked_fill(~batch.mask, 0)


@pytest.mark.parametrize("method", [Lime(samples=5), KernelShap(samples=5)], ids=lambda m: type(m).__name__)
def test_a_text_without_words_has_an_empty_map(method):
    batch = texts(4)
    words = batch.words.clone()
    words[1] = -1
    expected = explain(method, "lstm", batch)
    expected[1] = 0
    same(explain(method, "lstm", dataclasses.replace(batch, words=words)), expected, 1e-9)
    nothing = dataclasses.replace(batch, words=torch.full_like(words, -1))
    assert (explain(method, "lstm", nothing) == 0).all()


@pytest.mark.parametrize("rows", [1, 4, 10])
@pytest.mark.parametrize("method", [Lime(samples=9), KernelShap(samples=9)], ids=lambda m: type(m).__name__)
def test_never_more_rows_than_the_limit_and_samples_share_passes(method, rows):
    batch, seen = texts(4), []
    model = text_classifier("lstm")(rows, torch.float64)
    model.until("embedding", batch.x)
    model.passed = 0
    model.module.fc.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    method.attribute(model, batch, {}, streams(batch))
    words = (batch.words.amax(1) + 1).tolist()
    count = 4 * 9 if isinstance(method, Lime) else sum(min(9, 2**n) for n in words)
    assert seen == [rows] * (count // rows) + [count % rows] * (count % rows > 0)
    assert model.passed == sum(seen) + len(batch)


def test_several_labels_are_the_sum_of_their_logits():
    batch = texts(4)
    several = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0], [1, 1, 1, 0, 1], [0, 0, 0, 0, 1]])
    found = explain(KernelShap(samples=128), "lstm", dataclasses.replace(batch, target=several))
    parts = [
        explain(KernelShap(samples=128), "lstm", dataclasses.replace(batch, target=torch.full((4,), k)))
        for k in range(K)
    ]
    same(found, sum(part * several[:, k : k + 1] for k, part in enumerate(parts)))


class Shifted(nn.Module):
    """A net whose input is moved by a constant."""

    def __init__(self, net: nn.Module, by: Tensor) -> None:
        super().__init__()
        self.net, self.by = net, by

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.by)


@pytest.mark.parametrize("method", [Lime(samples=20, tiles=3), KernelShap(samples=20, tiles=3)])
def test_the_mean_as_baseline_is_zero_of_an_image_without_its_mean(method):
    batch = dataclasses.replace(pictures(), x=pictures().x + torch.tensor([2.0, -1.0, 0.5]).view(1, 3, 1, 1))
    found = picture_map(dataclasses.replace(method, baseline="mean"), batch)
    for i in range(len(batch)):
        one, mean = batch[[i]], batch.x[i : i + 1].mean((2, 3), keepdim=True)
        net = Classifier(Shifted(seeded(Net()), mean), rows=7, dtype=torch.float64)
        around = dataclasses.replace(one, x=one.x - mean)
        same(found[i : i + 1], method.attribute(net, around, {}, streams(one))["map"])


def test_fields_that_make_no_sense_are_errors():
    for method in (Lime, KernelShap):
        with pytest.raises(UserError, match=rf"{method.__name__}.baseline is 'blur', must be one of zero, mask"):
            method(baseline="blur")
        with pytest.raises(UserError, match=rf"{method.__name__}.samples is 1, must be at least 2"):
            method(samples=1)
        with pytest.raises(UserError, match=rf"{method.__name__}.tiles is 0, must be at least 1"):
            method(tiles=0)
        with pytest.raises(UserError, match=rf"{method.__name__}.baseline is 'mask', a token of texts"):
            picture_map(method(samples=4, baseline="mask"), pictures())
    with pytest.raises(UserError, match="kernel_width is 0, must be above 0"):
        Lime(kernel_width=0)
    with pytest.raises(UserError, match=r"alpha is -0.1, must be at least 0"):
        Lime(alpha=-0.1)
