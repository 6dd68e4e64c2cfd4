"""IROF against one image at a time, by the convention of quantus and by ours; the contract; an oracle; the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contracts import close, metric_contract
from nets import golden, small_cnn, small_cnn_images
from torch import Tensor, nn

from attrib.metrics import IROF
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError
from attrib.units import Units

H, W, K = 12, 14, 5


def small_net() -> nn.Module:
    """Weights without a random generator."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * H * W, K))
    for i, p in enumerate(net.parameters()):
        p.data = torch.arange(p.numel()).add(7.0 * i).mul(1.7).sin().mul(0.3).view_as(p)
    return net


def classifier(rows: int = 64, net: nn.Module | None = None) -> Classifier:
    return Classifier(net or small_net(), rows=rows, dtype=torch.float64)


def samples(n: int = 4) -> tuple[Batch, Tensor]:
    r = np.random.RandomState(0)
    x = nn.functional.avg_pool2d(torch.tensor(r.randn(n, 3, H, W)), 3, 1, 1) * 3
    return Batch(tuple(f"s{i}" for i in range(n)), x, torch.tensor(r.randint(0, K, n))), torch.tensor(r.randn(n, H, W))


def score(metric: IROF, batch: Batch, map: Tensor, model: Classifier | None = None) -> dict[str, Tensor]:
    return metric.score(model or classifier(), batch, map, Noise(batch.uids))


def curve(net: nn.Module, x: Tensor, target: int, map: Tensor, segments: np.ndarray, anew: bool) -> np.ndarray:
    """Share of the probability that is left after 0, 1, ... superpixels, one forward pass at a time.

    Removed is the mean colour of the image; with ``anew`` the mean of all channels of what is left so far.
    """
    segments = torch.tensor(segments.astype(int))
    count = int(segments.max()) + 1
    best = sorted(range(count), key=lambda k: -map[segments == k].mean().item())
    image, found = x.clone(), [net(x[None]).softmax(1)[0, target].item()]
    for k in best:
        colour = image.mean() if anew else x.mean((1, 2), keepdim=True)
        image = torch.where(segments == k, colour, image)
        found.append(net(image[None]).softmax(1)[0, target].item())
    return np.array(found) / found[0]


def test_quantus_and_ours_remove_the_same(monkeypatch):
    """Scores of quantus 0.6.0, each image alone, from the loop above; with our convention, it is our score."""
    data, (x, labels) = golden("quantus_irof"), small_cnn_images()
    monkeypatch.setattr(Units, "superpixels", lambda *_: Units.given(torch.tensor(data["segments"])))
    net, map = small_cnn(), torch.tensor(data["maps"])
    ours = score(IROF(), Batch(tuple("abcde"), x, labels), map, Classifier(small_cnn()))["irof"]
    for i, segments in enumerate(data["segments"]):
        left = curve(net, x[i], int(labels[i]), map[i], segments, anew=True)
        theirs = len(left) - 1 - np.trapezoid(left[1:])
        assert abs(theirs - data["scores_alone"][i]) < 1e-5
        left = curve(net, x[i], int(labels[i]), map[i], segments, anew=False)
        assert abs(1 - np.trapezoid(left) / (len(left) - 1) - ours[i].item()) < 1e-6
    assert np.abs(data["scores_batch"] - data["scores_alone"]).max() > 1  # theirs depend on the batch


@pytest.mark.parametrize("segments", [4, 12, 60])
def test_equals_one_image_at_a_time(segments):
    batch, map = samples()
    found, net = score(IROF(segments=segments), batch, map), small_net().double()
    for i in range(len(batch)):
        of = Units.superpixels(batch[[i]], segments, 10.0).of[0].numpy()
        left = curve(net, batch.x[i], int(batch.target[i]), map[i], of, anew=False)
        count = len(left) - 1
        assert abs(found["irof"][i].item() - (1 - np.trapezoid(left) / count)) < 1e-12
        stored = np.interp(np.linspace(0, 1, 101), np.arange(count + 1) / count, left)
        np.testing.assert_allclose(found["irof_curve"][i], stored, atol=1e-12)


@pytest.mark.parametrize("baseline", ["mean", "zero"])
def test_contract(baseline):
    batch, map = samples(5)
    map[1, 2, 3] = torch.nan
    map[2] = map[2].round()
    map[3] = 0.0  # all tied
    found = metric_contract(IROF(segments=9, baseline=baseline), classifier, batch, map)
    for name, value in found.items():
        assert value[1].isnan().all(), name
        assert value[[0, 2, 3, 4]].isfinite().all(), name


class Sum(nn.Module):
    """Logit 1 is a weighted sum of the pixels, logit 0 is zero."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        logit = (x * self.weight).sum((1, 2, 3))
        return torch.stack((torch.zeros_like(logit), logit), 1)


def test_true_importance_is_best_and_its_opposite_worst():
    batch, other = samples(6)
    batch = Batch(batch.uids, batch.x, torch.ones(6).long())
    weight = torch.tensor(np.random.RandomState(1).randn(3, H, W)) * 0.3
    gain = (weight * (batch.x - batch.x.mean((2, 3), keepdim=True))).sum(1)
    # Of superpixels it is their sum that counts, so the map is that, on every pixel.
    units = Units.superpixels(batch, 20, 10.0)
    best = units.paint(units.sum(gain))
    model, metric = classifier(net=Sum(weight)), IROF(segments=20)
    oracle, random, worst = (score(metric, batch, map, model)["irof"] for map in (best, other, -best))
    assert (oracle > random).all()
    assert (random > worst).all()


def test_only_the_order_of_the_superpixels_means_counts():
    batch, map = samples()
    close(score(IROF(segments=9), batch, map), score(IROF(segments=9), batch, map * 0.5 - 3), atol=0)


def test_ties_are_ordered_by_the_samples_own_stream():
    batch, map = samples(2)
    batch = Batch(batch.uids, batch.x[:1].expand(2, 3, H, W), batch.target[:1].expand(2))
    first, second = score(IROF(segments=12), batch, map * 0)["irof_curve"]
    assert (first - second).abs().max() > 1e-3


class Recorder(nn.Module):
    seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return x.flatten(1)[:, :K]


def test_full_blocks_of_at_most_rows_images():
    Recorder.seen.clear()
    batch, map = samples()
    score(IROF(segments=12), batch, map, classifier(rows=10, net=Recorder()))
    needed = int(Units.superpixels(batch, 12, 10.0).n.sum())
    assert Recorder.seen == [len(batch), *[10] * (needed // 10), *([needed % 10] if needed % 10 else [])]


def test_one_superpixel_and_a_class_without_probability():
    batch, map = samples(2)
    model = classifier()
    found = score(IROF(segments=1), batch, map, model)
    p = [model.logits(x).softmax(1) for x in (batch.x, batch.x.mean((2, 3), keepdim=True).expand_as(batch.x))]
    whole, gone = (q.gather(1, batch.target[:, None])[:, 0] for q in p)
    torch.testing.assert_close(found["irof"], (1 - gone / whole) / 2)
    never = nn.Sequential(nn.Flatten(), nn.Linear(3 * H * W, 2))
    never[1].weight.data.zero_()
    never[1].bias.data = torch.tensor([2000.0, 0.0])
    batch = Batch(batch.uids, batch.x, torch.ones(2).long())
    assert all(v.isnan().all() for v in score(IROF(), batch, map, classifier(net=never)).values())
    Recorder.seen.clear()
    assert all(v.isnan().all() for v in score(IROF(), batch, map * torch.nan, classifier(net=Recorder())).values())
    assert not Recorder.seen


def test_errors():
    batch, map = samples()
    with pytest.raises(ValueError, match="does not fit"):
        score(IROF(), batch, map[:, 1:])
    for wrong in ({"segments": 0}, {"compactness": 0.0}, {"baseline": "black"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            IROF(**wrong)
