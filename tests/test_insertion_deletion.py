"""Insertion and deletion: parity with the released code, a slow re-derivation, the contract, every documented edge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contracts import close, metric_contract
from nets import golden, small_cnn, small_cnn_images
from torch import Tensor, nn

from attrib.metrics import InsertionDeletion
from attrib.metrics.perturb import baseline, blur_kernel, ranks, target_score
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError

SIZE = 6


def small_net(channels: int = 3) -> nn.Module:
    """Weights without a random generator; any shape will do."""
    net = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * SIZE**2, 5))
    for i, p in enumerate(net.parameters()):
        p.data = torch.arange(p.numel()).add(7.0 * i).mul(1.7).sin().mul(0.3).view_as(p)
    return net


def classifier(rows: int = 64, net: nn.Module | None = None) -> Classifier:
    return Classifier(net or small_net(), rows=rows, dtype=torch.float64)


def samples(n: int = 4, channels: int = 3, seed: int = 0) -> tuple[Batch, Tensor]:
    r = np.random.RandomState(seed)
    uids = tuple(f"s{i}" for i in range(n))
    x = torch.tensor(r.randn(n, channels, SIZE, SIZE))
    return Batch(uids, x, torch.tensor(r.randint(0, 5, n))), torch.tensor(r.randn(n, SIZE, SIZE))


def score(metric: InsertionDeletion, batch: Batch, map: Tensor, model: Classifier | None = None) -> dict[str, Tensor]:
    return metric.score(model or classifier(), batch, map, Noise(batch.uids))


def test_small_cnn_is_the_net_of_the_goldens():
    x, _ = small_cnn_images()
    logits = Classifier(small_cnn()).logits(x).numpy()
    np.testing.assert_allclose(logits, golden("smallcnn_fashion")["logits"], atol=1e-4)


@pytest.mark.parametrize("step", [10, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_released_code(step, dtype):
    data = golden("metric_insertion_deletion")
    x, labels = small_cnn_images()
    index = torch.tensor(data["image_index"])
    batch = Batch(tuple("abc"), x[index], labels[index])
    metric = InsertionDeletion(steps=None, step=step, sigma=5.0, as_released=True)
    found = score(metric, batch, torch.tensor(data["heatmaps"]), Classifier(small_cnn(), dtype=dtype))
    compared = 0
    for i in range(len(batch)):
        for short, long in (("ins", "insertion"), ("del", "deletion")):
            key = f"pb{step}_im{i}_{short}"
            if f"{key}_scores" in data:
                np.testing.assert_allclose(found[f"{long}_curve"][i], data[f"{key}_scores"], atol=1e-5)
                compared += 1
            if f"{key}_auc" in data:
                assert abs(found[long][i].item() - data[f"{key}_auc"]) < 1e-5
                compared += 1
    assert compared >= 4


def test_default_convention_starts_at_the_unperturbed_score():
    data = golden("metric_insertion_deletion")
    x, labels = small_cnn_images()
    batch = Batch(tuple("abc"), x[:3], labels[:3])
    model, map = Classifier(small_cnn()), torch.tensor(data["heatmaps"])
    ours = score(InsertionDeletion(steps=None, step=10), batch, map, model)
    released = score(InsertionDeletion(steps=None, step=10, as_released=True), batch, map, model)
    np.testing.assert_allclose(ours["insertion_curve"][:, 0], data["start_scores_ins"], atol=1e-5)
    np.testing.assert_allclose(ours["deletion_curve"][:, 0], data["start_scores_del"], atol=1e-5)
    for name in InsertionDeletion.CURVES:
        torch.testing.assert_close(ours[name][:, 1:], released[name], rtol=0, atol=1e-6)


def test_blur_is_that_of_the_released_code():
    x, _ = small_cnn_images()
    np.testing.assert_allclose(
        baseline(x[:1], "blur", 5.0)[0], golden("metric_insertion_deletion")["blurred_im0"], atol=1e-6
    )
    assert [blur_kernel(s) for s in (0.4, 1.0, 2.5, 5.0, 15.0)] == [1, 1, 5, 9, 29]


def reference(
    net: nn.Module, x: Tensor, target: int, map: Tensor, start: Tensor, end: Tensor, counts: list[int]
) -> list[float]:
    """Algorithm 1 of RISE: one pixel and one image at a time."""
    width = map.shape[1]
    order = sorted(range(map.numel()), key=lambda p: -map[p // width, p % width].item())
    image, scores, done = start.clone(), [], 0
    for count in counts:
        while done < count:
            row, column = divmod(order[done], width)
            for channel in range(len(x)):
                image[channel, row, column] = end[channel, row, column]
            done += 1
        logits = net(image[None]).detach()[0]
        scores.append((logits[target].exp() / sum(v.exp() for v in logits)).item())
    return scores


@pytest.mark.parametrize(
    ("metric", "counts"),
    [
        (InsertionDeletion(steps=4, sigma=2.0), [0, 9, 18, 27, 36]),
        (InsertionDeletion(steps=7, sigma=2.0), [0, 5, 10, 15, 20, 25, 30, 36]),
        (InsertionDeletion(steps=None, step=10, sigma=2.0, deletion_baseline="mean"), [0, 10, 20, 30, 36]),
        (InsertionDeletion(steps=None, step=50, sigma=1.5, kernel=5, insertion_baseline="mean"), [0, 36]),
        (InsertionDeletion(steps=None, step=16, insertion_baseline="zero", as_released=True), [16, 32, 36]),
    ],
)
def test_equals_the_algorithm_of_the_paper(metric, counts):
    batch, map = samples()
    assert metric.replaced(SIZE**2) == counts
    found, net = score(metric, batch, map), small_net().double()
    for i, (x, target) in enumerate(zip(batch.x, batch.target.tolist(), strict=True)):
        bases = {
            "zero": torch.zeros_like(x),
            "mean": torch.stack([channel.mean().expand(SIZE, SIZE) for channel in x]),
            "blur": slow_blur(x, metric.sigma, metric.kernel or blur_kernel(metric.sigma)),
        }
        expected = {
            "insertion": reference(net, x, target, map[i], bases[metric.insertion_baseline], x, counts),
            "deletion": reference(net, x, target, map[i], x, bases[metric.deletion_baseline], counts),
        }
        for name, curve in expected.items():
            np.testing.assert_allclose(found[f"{name}_curve"][i], curve, atol=1e-12)
            area = 0.0
            for k in range(1, len(counts)):
                width = 1 / len(counts) if metric.as_released else (counts[k] - counts[k - 1]) / SIZE**2
                area += width * (curve[k] + curve[k - 1]) / 2
            assert abs(found[name][i].item() - area) < 1e-12
        assert found["insertion_deletion"][i] == found["insertion"][i] - found["deletion"][i]


def slow_blur(x: Tensor, sigma: float, kernel: int) -> Tensor:
    half = kernel // 2
    weight = {d: np.exp(-(d**2) / (2 * sigma**2)) for d in range(-half, half + 1)}
    total = sum(weight.values())

    def mirror(i: int) -> int:
        return -i if i < 0 else 2 * (SIZE - 1) - i if i >= SIZE else i

    out = torch.zeros_like(x)
    for row in range(SIZE):
        for column in range(SIZE):
            for dy, wy in weight.items():
                for dx, wx in weight.items():
                    out[:, row, column] += wy * wx / total**2 * x[:, mirror(row + dy), mirror(column + dx)]
    return out


def test_contract():
    batch, map = samples()
    map[1, 2, 3] = torch.nan
    map[2] = map[2].round()  # ties
    map[3] = 0.0
    found = metric_contract(InsertionDeletion(steps=5, sigma=2.0), classifier, batch, map)
    for name, value in found.items():
        assert value[1].isnan().all(), name
        assert value[[0, 2, 3]].isfinite().all(), name
    assert found["insertion_curve"].shape == found["deletion_curve"].shape == (4, 6)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_channels(channels):
    batch, map = samples(channels=channels)
    found = score(InsertionDeletion(steps=3, sigma=2.0), batch, map, classifier(net=small_net(channels)))
    assert found["deletion_curve"].shape == (4, 4)


def test_only_the_order_of_the_map_counts():
    batch, map = samples()
    metric = InsertionDeletion(steps=9, sigma=2.0)
    close(score(metric, batch, map), score(metric, batch, (map * 1e-6).exp() - 1), atol=0)


class Sum(nn.Module):
    """A linear net: logit k is the weighted sum of all pixels."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


def test_true_importance_is_optimal_on_a_linear_net():
    batch, map = samples()
    weight = torch.tensor(np.random.RandomState(5).randn(5, 3 * SIZE**2))
    model = classifier(net=Sum(weight))
    contribution = (weight[batch.target].view_as(batch.x) * batch.x).sum(1)
    metric = InsertionDeletion(steps=None, step=1, insertion_baseline="zero", output="logit")
    oracle, other, worst = (score(metric, batch, m, model) for m in (contribution, map, -contribution))
    # The curves are known: partial sums of the sorted contributions.
    partial = contribution.flatten(1).sort(descending=True).values.cumsum(1)
    torch.testing.assert_close(oracle["insertion_curve"][:, 1:], partial, rtol=0, atol=1e-12)
    total = partial[:, -1:]
    torch.testing.assert_close(oracle["deletion_curve"][:, 1:], total - partial, rtol=0, atol=1e-12)
    for better, lesser in ((oracle, other), (other, worst)):
        assert (better["insertion"] > lesser["insertion"]).all()
        assert (better["deletion"] < lesser["deletion"]).all()
        assert (better["insertion_deletion"] > lesser["insertion_deletion"]).all()


def test_probability_areas_lie_between_0_and_1():
    batch, map = samples()
    found = score(InsertionDeletion(steps=6, sigma=2.0), batch, map)
    assert all(((found[name] >= 0) & (found[name] <= 1)).all() for name in ("insertion", "deletion"))


@pytest.mark.parametrize("as_released", [False, True])
def test_area_of_a_constant_score(as_released):
    """One class has probability 1 throughout."""
    batch, map = samples()
    batch = Batch(batch.uids, batch.x, torch.zeros(4).long())
    metric = InsertionDeletion(steps=7, sigma=2.0, as_released=as_released)
    found = score(metric, batch, map, classifier(net=Sum(torch.zeros(1, 3 * SIZE**2))))
    expected = 6 / 7 if as_released else 1.0
    for name in ("insertion", "deletion"):
        np.testing.assert_allclose(found[name], expected, atol=1e-12)


def test_multi_label_targets_are_the_mean_over_positive_labels():
    logits = torch.tensor([[0.0, 2.0, -1.0], [1.0, 3.0, 5.0]]).double()
    labels = torch.tensor([[1, 1, 0], [0, 0, 0]])
    found = target_score(logits, labels, "probability")
    assert found[0].item() == pytest.approx((0.5 + 1 / (1 + np.exp(-2))) / 2)
    assert found[1].isnan()
    assert target_score(logits, labels, "logit")[0].item() == 1.0
    assert target_score(logits, torch.tensor([1, 0]), "logit").tolist() == [2.0, 1.0]


class Recorder(nn.Module):
    """Notes how many rows come in at a time (on the class: a Classifier copies its module)."""

    seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return x.flatten(1)[:, :5]


def test_never_more_than_rows_images_at_once_and_full_blocks():
    Recorder.seen.clear()
    batch, map = samples()
    score(InsertionDeletion(steps=8, sigma=2.0), batch, map, classifier(rows=10, net=Recorder()))
    assert Recorder.seen == [4, *2 * [10, 10, 10, 2]]  # 4 samples as they are, and 8 points of each, twice


def test_a_batch_of_nan_maps_costs_nothing():
    Recorder.seen.clear()
    batch, map = samples()
    found = score(InsertionDeletion(steps=8, sigma=2.0), batch, map * torch.nan, classifier(net=Recorder()))
    assert not Recorder.seen
    assert all(value.isnan().all() for value in found.values())


def test_ranks_order_values_and_leave_ties_to_the_samples_own_stream():
    r = np.random.RandomState(0)
    map = torch.tensor(r.randint(0, 4, (3, 8, 9))).float()
    uids = tuple("abc")
    rank = ranks(map, Noise(uids)).flatten(1)
    assert (rank.sort(dim=1).values == torch.arange(72)).all()
    assert (map.flatten(1).gather(1, rank.argsort(dim=1)).diff(dim=1) <= 0).all()
    for i, uid in enumerate(uids):
        assert torch.equal(ranks(map[i : i + 1], Noise([uid])).flatten(1)[0], rank[i])


def test_ties_favour_no_position():
    uids = [f"s{i}" for i in range(400)]
    rank = ranks(torch.zeros(400, 5, 5), Noise(uids)).double()
    # The mean of 400 uniform ranks 0 .. 24 is 12 with a standard error of 0.36.
    assert (rank.mean(0) - 12).abs().max() < 5 * 0.36
    assert len({tuple(r.flatten().tolist()) for r in rank}) == 400


def test_errors():
    batch, map = samples()
    for wrong in (map[:, 1:], map[:3], map[:, None]):
        with pytest.raises(ValueError, match="does not fit"):
            score(InsertionDeletion(), batch, wrong)
    with pytest.raises(ValueError, match="blur window of 13 pixels"):
        score(InsertionDeletion(kernel=13), batch, map)
    with pytest.raises(UserError, match="exactly one"):
        InsertionDeletion(step=3)
    with pytest.raises(UserError, match="exactly one"):
        InsertionDeletion(steps=None)
    for wrong in (
        {"steps": 0},
        {"sigma": 0.0},
        {"kernel": 4},
        {"output": "loss"},
        {"deletion_baseline": "black"},
        {"insertion_baseline": "noise"},
    ):
        with pytest.raises(UserError, match=next(iter(wrong))):
            InsertionDeletion(**wrong)
