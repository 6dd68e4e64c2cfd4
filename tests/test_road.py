"""ROAD: quantus' imputation, a dense system, one image at a time, the contract, an oracle, the edges."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from contracts import metric_contract, seeded
from test_irof import K, Recorder, Sum, classifier, samples, small_net
from torch import Tensor, nn

from attrib.metrics import ROAD
from attrib.metrics.road import Imputer
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError

H, W = 12, 14


def score(metric: ROAD, batch: Batch, map: Tensor, model: Classifier | None = None) -> dict[str, Tensor]:
    return metric.score(model or classifier(), batch, map, Noise(batch.uids))


def dense(x: np.ndarray, gone: np.ndarray) -> np.ndarray:
    """Every unknown pixel is the weighted mean of the neighbours that it has: written out, a matrix of H W rows."""
    height, width = gone.shape
    matrix, right = np.eye(gone.size), x.reshape(len(x), -1).T.copy()
    for r, c in zip(*np.nonzero(gone), strict=True):
        weights = {
            (a, b): 1 / 6 if a == r or b == c else 1 / 12
            for a in range(max(0, r - 1), min(height, r + 2))
            for b in range(max(0, c - 1), min(width, c + 2))
            if (a, b) != (r, c)
        }
        right[r * width + c] = 0
        for (a, b), weight in weights.items():
            matrix[r * width + c, a * width + b] = -weight / sum(weights.values())
    return np.linalg.solve(matrix, right).T.reshape(x.shape)


def masks(height: int, width: int) -> dict[str, np.ndarray]:
    r = np.random.RandomState(0)
    found = {f"{share}": r.rand(height, width) < share for share in (0.05, 0.5, 0.9)}
    found["one known"] = np.ones((height, width), bool)
    found["one known"][height // 2, 0] = False
    found["one gone"] = np.zeros((height, width), bool)
    found["one gone"][0, 0] = True
    found["block"] = np.zeros((height, width), bool)
    found["block"][: height // 2 + 1, 1:] = True
    return found


# ---- imputation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(9, 7), (3, 12), (1, 6), (2, 2)])
def test_imputation_equals_a_dense_system(size):
    x, imputer = np.random.RandomState(1).randn(3, *size), Imputer(*size)
    for name, gone in masks(*size).items():
        before = x.copy()
        found = imputer(x, gone)
        np.testing.assert_allclose(found, dense(x, gone), atol=1e-12, err_msg=name)
        assert np.array_equal(found[:, ~gone], x[:, ~gone])
        assert np.array_equal(x, before)


@pytest.mark.parametrize("size", [(9, 7), (20, 31)])
def test_imputation_equals_quantus(size):
    """Its noisy_linear_imputation (0.6.0), which is the authors' program, without the noise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        perturb = pytest.importorskip("quantus.functions.perturb_func")
        x, imputer = np.random.RandomState(1).randn(3, *size), Imputer(*size)
        for name, gone in masks(*size).items():
            theirs = perturb.noisy_linear_imputation(x, np.flatnonzero(gone), noise=0.0)
            np.testing.assert_allclose(imputer(x, gone), theirs, atol=1e-10, err_msg=name)


def test_a_ramp_is_imputed_as_it_was():
    """In the interior: the weights are symmetric, so any linear function is the mean of its neighbours."""
    rows, columns = np.mgrid[:20, :30]
    ramp = np.stack((2.0 * rows - 0.5 * columns + 3, 0.1 * columns - rows))
    gone = np.random.RandomState(0).rand(20, 30) < 0.8
    gone[[0, -1]] = gone[:, [0, -1]] = False
    np.testing.assert_allclose(Imputer(20, 30)(ramp, gone), ramp, atol=1e-10)


def test_imputed_values_lie_between_the_known_ones_and_any_unit_will_do():
    x, gone = np.random.RandomState(1).randn(2, 15, 16), np.random.RandomState(2).rand(15, 16) < 0.7
    imputer = Imputer(15, 16)
    found = imputer(x, gone)
    for channel, values in zip(x, found, strict=True):
        assert channel[~gone].min() <= values.min()
        assert values.max() <= channel[~gone].max()
    np.testing.assert_allclose(imputer(3 * x - 7, gone), 3 * found - 7, atol=1e-10)  # so normalisation does not matter


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (17, 5), (64, 33)])
def test_every_pixel_is_dissected_once(size):
    assert sorted(Imputer(*size)._order.tolist()) == list(range(size[0] * size[1]))


# ---- the score -------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_equals_one_image_at_a_time(noise):
    batch, map = samples(2)
    metric, net = ROAD(shares=(0.03, 0.29, 0.5, 0.9), noise=noise), small_net().double()
    found = score(metric, batch, map)
    for i, (uid, x) in enumerate(zip(batch.uids, batch.x, strict=True)):
        field = noise * (x.max() - x.min()) * Noise([uid]).normal(3, H, W)[0].double()
        order = np.argsort(-map[i].numpy().ravel())
        means = {}
        for name, ordered in (("morf", order), ("lerf", order[::-1])):
            hits, probabilities = [], []
            for share in metric.shares:
                gone = np.zeros(H * W, bool)
                gone[ordered[: int(share * H * W + 1e-9)]] = True
                gone = gone.reshape(H, W)
                image = torch.tensor(dense(x.numpy(), gone)) + field * torch.tensor(gone)
                probability = net(image[None]).softmax(1)[0]
                hits.append(float(probability.argmax() == batch.target[i]))
                probabilities.append(probability[batch.target[i]].item())
            for what, values in (("accuracy", hits), ("probability", probabilities)):
                np.testing.assert_allclose(found[f"{name}_{what}_curve"][i], values, atol=1e-9)
                means[name, what] = np.mean(values)
                assert found[f"{name}_{what}"][i].item() == pytest.approx(means[name, what], abs=1e-9)
        for column, what in (("road", "accuracy"), ("road_probability", "probability")):
            assert found[column][i].item() == pytest.approx(means["lerf", what] - means["morf", what], abs=1e-9)


def test_equals_quantus_on_the_same_shares():
    """quantus 0.6.0 gives the accuracy of MoRF, of images of one channel (it ranks numbers, not pixels, of others)."""
    batch, map = samples(8)
    batch = dataclasses.replace(batch, x=batch.x[:, :1])
    net = seeded(nn.Sequential(nn.Flatten(), nn.Linear(H * W, K))).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantus = pytest.importorskip("quantus")
        metric = quantus.ROAD(percentages=[10, 30, 60, 90], noise=0.0, normalise=False, disable_warnings=True)
        inputs = batch.x.float().numpy(), batch.target.numpy(), map[:, None].float().numpy()
        theirs = metric(net, *inputs, device="cpu", softmax=True, channel_first=True)
    found = score(ROAD(shares=(0.1, 0.3, 0.6, 0.9), noise=0.0), batch, map, Classifier(net))
    np.testing.assert_allclose(found["morf_accuracy_curve"].mean(0), [theirs[p] for p in (10, 30, 60, 90)])
    assert len(set(theirs.values())) > 1


def test_contract():
    batch, map = samples(5)
    map[1, 2, 3] = torch.nan
    map[2] = map[2].round()
    map[3] = 0.0
    found = metric_contract(ROAD(shares=(0.1, 0.5, 0.9)), classifier, batch, map, atol=1e-9)
    for name, value in found.items():
        assert value[1].isnan().all(), name
        assert value[[0, 2, 3, 4]].isfinite().all(), name
        assert value.nan_to_num().abs().max() <= 1, name


def test_nothing_to_score():
    batch, map = samples(2)
    assert all(value.isnan().all() for value in score(ROAD(), batch, map * torch.nan).values())


def test_true_importance_is_best_and_its_opposite_worst():
    batch, other = samples(6)
    weight = torch.tensor(np.random.RandomState(1).randn(3, H, W))
    batch = Batch(batch.uids, batch.x + weight, torch.ones(6).long())
    gain = (weight * batch.x).sum(1)

    class Half(Sum):
        """Needs half of the evidence."""

        def forward(self, x: Tensor) -> Tensor:
            return 0.05 * (super().forward(x) - torch.tensor([0.0, gain.sum((1, 2)).mean() / 2]))

    model = classifier(net=Half(weight))
    oracle, random, worst = (score(ROAD(), batch, map, model) for map in (gain, other, -gain))
    for column, direction in ROAD.COLUMNS.items():
        sign = 1 if direction == "higher" else -1
        better, middle, lesser = (sign * found[column].mean() for found in (oracle, random, worst))
        assert better > middle > lesser, column
    for what in ("accuracy", "probability"):  # of the opposite order
        torch.testing.assert_close(oracle[f"morf_{what}"], worst[f"lerf_{what}"])


def test_lerf_is_the_reverse_also_of_ties():
    batch, _ = samples(2)
    map = torch.zeros(2, H, W, dtype=torch.float64)
    found = score(ROAD(shares=(0.5,)), batch, map)  # every pixel goes in one of the two
    again = score(ROAD(shares=(0.5,)), batch, map + 1)
    for name in found:
        assert torch.equal(found[name], again[name])
    assert (found["morf_probability"] != found["lerf_probability"]).all()


def test_numbers_of_pixels():
    assert ROAD(shares=(0.29, 0.5)).counts(100) == [29, 50]
    assert ROAD(shares=(0.01, 0.99)).counts(10) == [1, 9]
    assert ROAD(shares=(0.999,)).counts(2) == [1]
    assert len(ROAD().counts(224**2)) == 9


def test_several_labels():
    class Labels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.new_tensor([1.0, -1.0, 2.0]).expand(len(x), -1)

    batch, map = samples(2)
    batch = Batch(batch.uids, batch.x, torch.tensor([[1, 1, 0], [0, 0, 1]]))
    found = score(ROAD(shares=(0.2,)), batch, map, classifier(net=Labels()))
    assert found["morf_accuracy"].tolist() == [0.5, 1.0]
    torch.testing.assert_close(
        found["lerf_probability"], torch.tensor([[1.0, -1.0], [2.0, 2.0]]).double().sigmoid().mean(1)
    )


def test_full_blocks_of_whole_samples():
    Recorder.seen.clear()
    batch, map = samples(4)
    score(ROAD(shares=(0.2, 0.3, 0.4, 0.5)), batch, map, classifier(20, Recorder()))  # 8 images a sample
    assert Recorder.seen == [16, 16]


def test_a_block_without_memory_is_made_again_of_unspoilt_images():
    """Also where the net writes into its input before memory runs out."""

    class Spoiling(nn.Module):
        fails = 0

        def forward(self, x: Tensor) -> Tensor:
            logits = net(x.clone())
            x.zero_()
            if self.fails:
                self.fails -= 1
                raise torch.OutOfMemoryError("out of memory")
            return logits

    (batch, map), net = samples(2), small_net().double()
    expected = score(ROAD(shares=(0.2, 0.5)), batch, map)
    model = classifier(4, Spoiling())
    model.module.fails = 1
    found = score(ROAD(shares=(0.2, 0.5)), batch, map, model)
    assert model.rows == 2
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12)


def test_errors():
    batch, map = samples()
    with pytest.raises(ValueError, match="does not fit"):
        score(ROAD(), batch, map[:, 1:])
    with pytest.raises(ValueError, match="does not fit"):
        score(ROAD(), Batch(("a",), torch.zeros(1, 1, 1, 1), torch.zeros(1).long()), torch.zeros(1, 1, 1))
    for wrong in ({"shares": ()}, {"shares": (0.5, 1.0)}, {"shares": (0.0,)}, {"noise": -0.1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            ROAD(**wrong)
