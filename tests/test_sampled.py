"""GradientSHAP and RISE against captum with the same random numbers, and against loops written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import GradientShap as CaptumGradientShap
from contracts import seeded
from skimage.transform import resize
from text_nets import text_classifier, text_net, texts
from torch import Tensor, nn

from attrib.methods.sampled import GradientShap, Rise
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError

H, W, K = 8, 10, 5
SEVERAL = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0], [1, 1, 1, 0, 1]])


def pictures(several: bool = False) -> Batch:
    r = np.random.RandomState(0)
    target = SEVERAL if several else torch.tensor(r.randint(0, K, 3))
    return Batch(("s0", "s1", "s2"), torch.tensor(r.randn(3, 3, H, W)), target)


def net() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    return seeded(nn.Sequential(*layers, nn.Linear(80, K)), 0.5)


def explain(method, model: nn.Module, batch: Batch, rows: int = 7) -> Tensor:
    classifier = Classifier(model, rows=rows, dtype=torch.float64)
    return method.attribute(classifier, batch, {}, Noise(batch.uids, 5, dtype=torch.float64))["map"]


def same(found: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def score(logits: Tensor, target: Tensor) -> Tensor:
    """(K,) -> the logit of the target, or the sum of several."""
    return logits[target] if target.ndim == 0 else sum(logits[k] for k in range(K) if target[k])


# ---- GradientSHAP --------------------------------------------------------------------------------


def draws(uid: str, x: Tensor, samples: int, sigma: float, spread: float) -> list[tuple[Tensor, Tensor, float]]:
    """Noisy inputs, baselines and places of one sample, from its own stream."""
    stream, span, found = Noise([uid], 5, dtype=torch.float64), x.max() - x.min(), []
    for _ in range(samples):
        baseline = spread * span * stream.normal(*x.shape)[0]
        noisy = x + sigma * span * stream.normal(*x.shape)[0]
        found.append((noisy, baseline, stream.uniform(1)[0, 0].item()))
    return found


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("reduce", ["sum", "abs_sum"])
def test_gradient_shap_equals_its_definition(reduce, several):
    batch, model = pictures(several), net()
    expected = []
    for uid, x, target in zip(batch.uids, batch.x, batch.target, strict=True):
        total = torch.zeros_like(x)
        for noisy, baseline, a in draws(uid, x, 6, 0.2, 0.3):
            at = (a * noisy + (1 - a) * baseline).requires_grad_()
            score(model(at[None])[0], target).backward()
            total += (noisy - baseline) * at.grad / 6
        expected.append(total.sum(0) if reduce == "sum" else total.abs().sum(0))
    same(explain(GradientShap(6, 0.2, 0.3, reduce), model, batch), torch.stack(expected))


def test_gradient_shap_equals_captums_with_the_same_numbers(monkeypatch):
    batch, model = pictures(), net()
    places = [[a for *_, a in draws(uid, x, 9, 0.0, 0.0)] for uid, x in zip(batch.uids, batch.x, strict=True)]
    monkeypatch.setattr(np.random, "uniform", lambda low, high, size: np.array(places).reshape(size))
    expected = CaptumGradientShap(model).attribute(
        batch.x, torch.zeros(1, 3, H, W).double(), n_samples=9, stdevs=0.0, target=batch.target
    )
    same(explain(GradientShap(9, 0.0, 0.0), model, batch), expected.sum(1))


def test_gradient_shap_of_a_linear_net_sums_to_the_change_of_the_logit():
    batch, model = pictures(), nn.Sequential(nn.Flatten(), seeded(nn.Linear(3 * H * W, K)))
    found = explain(GradientShap(4, 0.3, 0.2), model, batch)
    for i, (uid, x) in enumerate(zip(batch.uids, batch.x, strict=True)):
        ends = [model(noisy[None]) - model(base[None]) for noisy, base, _ in draws(uid, x, 4, 0.3, 0.2)]
        same(found[i].sum(), torch.cat(ends)[:, batch.target[i]].mean())


def test_gradient_shap_comes_close_to_completeness():
    batch, model = pictures(), net()
    found = explain(GradientShap(600, 0.0, 0.0), model, batch, rows=500).sum((1, 2))
    change = (model(batch.x) - model(torch.zeros_like(batch.x))).gather(1, batch.target[:, None])[:, 0]
    assert change.abs().min() > 0.1
    torch.testing.assert_close(found, change, rtol=0.1, atol=0.02)


def test_gradient_shap_of_texts_equals_its_definition():
    batch, model = texts(3), text_net("mean")
    found = GradientShap(5, 0.2, 0.3).attribute(
        text_classifier("mean")(64, torch.float64), batch, {}, Noise(batch.uids, 5, dtype=torch.float64)
    )["map"]
    for i, uid in enumerate(batch.uids):
        z = model.embedding(batch.x[i, : batch.lengths[i]])
        stream, span, total = Noise([uid], 5, dtype=torch.float64), z.max() - z.min(), torch.zeros_like(z)
        for _ in range(5):
            baseline = 0.3 * span * stream.normal(*z.shape, ragged=0)[0]
            noisy = z + 0.2 * span * stream.normal(*z.shape, ragged=0)[0]
            a = stream.uniform(1)[0]
            at = (baseline + a * (noisy - baseline)).requires_grad_()
            model.head(torch.tanh(model.hidden(torch.tanh(at).mean(0))))[batch.target[i]].backward()
            total += (noisy - baseline) * at.grad / 5
        same(found[i, : len(z)], total.sum(1))


# ---- RISE ----------------------------------------------------------------------------------------


def masks(uid: str, samples: int, cells: int, keep: float, size: tuple[int, int]) -> list[Tensor]:
    """Enlarged by scikit-image and cut out at the shift, one at a time."""
    drawn, found = Noise([uid], 5, dtype=torch.float64).uniform(samples, cells**2 + 2)[0], []
    sides = [-(-side // cells) for side in size]
    for one in drawn:
        small = (one[:-2].view(cells, cells) < keep).double().numpy()
        large = resize(small, [(cells + 1) * side for side in sides], order=1, mode="edge", anti_aliasing=False)
        top, left = (int(u * side) for u, side in zip(one[-2:].tolist(), sides, strict=True))
        found.append(torch.tensor(large[top : top + size[0], left : left + size[1]]))
    return found


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(("cells", "keep", "output"), [(3, 0.5, "probability"), (7, 0.2, "logit"), (4, 0.8, "logit")])
def test_rise_equals_its_definition(cells, keep, output, several):
    batch, model = pictures(several), net()
    expected = []
    for uid, x, target in zip(batch.uids, batch.x, batch.target, strict=True):
        total = torch.zeros(H, W).double()
        for mask in masks(uid, 11, cells, keep, (H, W)):
            logits = model((x * mask)[None])[0]
            if output == "probability":
                logits = logits.softmax(0) if target.ndim == 0 else logits.sigmoid() / target.sum()
            total += score(logits, target) * mask
        expected.append(total / (11 * keep))
    same(explain(Rise(11, cells, keep, output), model, batch), torch.stack(expected))


def test_masks_of_rise_show_every_pixel_equally_often():
    """A score of 1 throughout gives the share of masks that show a pixel, divided by ``keep``: one, up to chance."""
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * H * W, 1).double())
    batch = Batch(("a",), torch.zeros(1, 3, H, W).double(), torch.zeros(1).long())
    found = explain(Rise(4000, 3, 0.5), flat, batch, rows=1000)
    assert (found - 1).abs().max() < 5 / np.sqrt(4000)


class Quadrant(nn.Module):
    """The logit of class 1 is the sum of one quadrant."""

    def forward(self, x: Tensor) -> Tensor:
        value = x[:, :, : H // 2, W // 2 :].mean((1, 2, 3))
        return torch.stack((torch.zeros_like(value), 4 * value), 1)


@pytest.mark.parametrize("output", ["probability", "logit"])
def test_rise_finds_what_counts(output):
    batch = Batch(("a", "b"), torch.ones(2, 3, H, W).double(), torch.ones(2).long())
    for one in explain(Rise(500, 4, 0.5, output), Quadrant(), batch, rows=200):
        there = one[1 : H // 2 - 1, W // 2 + 1 : -1].mean()
        assert there > one[H // 2 + 2 :].mean() + 0.02
        assert there > one[:, : W // 2 - 2].mean() + 0.02
        assert one[: H // 2, W // 2 :].flatten().topk(3).values.mean() == one.flatten().topk(3).values.mean()


# ---- edges ---------------------------------------------------------------------------------------


class Watch(nn.Module):
    """Notes how many rows come in at a time (on the class: a Classifier copies its module)."""

    seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return x.flatten(1)[:, :K]


@pytest.mark.parametrize(
    ("method", "rows"), [(GradientShap(10), 7), (Rise(10), 7), (Rise(10), 2), (GradientShap(10), 64)]
)
def test_copies_of_several_samples_share_a_pass(method, rows):
    batch, model = pictures(), Classifier(Watch(), rows=rows, dtype=torch.float64)
    model.logits(batch.x.double())  # nets are examined on the first samples that they see
    Watch.seen.clear()
    method.attribute(model, batch, {}, Noise(batch.uids, 5, dtype=torch.float64))
    assert sum(Watch.seen) == 30
    assert max(Watch.seen) <= rows
    assert len(Watch.seen) == {7: 5, 2: 20, 64: 1}[rows]


def test_fields_that_make_no_sense_are_errors():
    for wrong, message in (
        (lambda: GradientShap(samples=0), "GradientShap.samples is 0, must be at least 1"),
        (lambda: GradientShap(sigma=-1.0), "GradientShap.sigma is -1.0, must be at least 0"),
        (lambda: GradientShap(spread=-1.0), "GradientShap.spread"),
        (lambda: GradientShap(reduce="abs"), "GradientShap.reduce is 'abs', must be one of sum"),
        (lambda: Rise(samples=0), "Rise.samples"),
        (lambda: Rise(cells=0), "Rise.cells"),
        (lambda: Rise(keep=0.0), r"Rise.keep is 0.0, must be above 0 and at most 1"),
        (lambda: Rise(output="loss"), "Rise.output is 'loss', must be one of probability, logit"),
    ):
        with pytest.raises(UserError, match=message):
            wrong()
