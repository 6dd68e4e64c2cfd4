"""Extremal perturbations: a slow re-derivation from the paper's formulas, oracles, properties, the edges."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import torch
from contracts import seeded
from torch import Tensor, nn

from attrib.config.objects import build
from attrib.methods.extremal import TIE, ExtremalPerturbation, area_loss, blur, kernel, perturb, smooth_max
from attrib.methods.parts.layout import resize
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError

H, W, K = 14, 18, 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4 * H * W, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).sigmoid().flatten(1))


def model(rows: int = 64) -> Classifier:
    return Classifier(seeded(Net()), rows=rows, dtype=torch.float64)


def pictures(n: int) -> Batch:
    r = np.random.RandomState(0)
    return Batch(tuple("abcdef"[:n]), torch.tensor(r.randn(n, 2, H, W)), torch.tensor(r.randint(0, K, n)))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.tensor(np.random.RandomState(seed).rand(*shape))


# ---- the slow and obvious one ----------------------------------------------------------------------


def slow_smooth_max(p: Tensor, cell: tuple[float, float], sigma: float, temperature: float) -> Tensor:
    """(h, w) -> (h, w), a place at a time."""
    h, w = p.shape
    rows = []
    for i in range(h):
        for j in range(w):
            f = []
            for a in range(h):
                for b in range(w):
                    distance = math.sqrt(((i - a) * cell[0]) ** 2 + ((j - b) * cell[1]) ** 2) / sigma
                    k = math.exp(-(max(0.0, distance - 1) ** 2) / 4)
                    if k >= 1e-3:
                        f.append(k * p[a, b])
            f = torch.stack(f)
            e = (f / temperature).exp()
            rows.append((f * e).sum() / e.sum())
    return torch.stack(rows).view(h, w)


def slow_area_loss(m: Tensor, area: float, tie: float = 0.0) -> Tensor:
    """(H, W) -> (), by sorting; the area is a whole number of pixels. Values near the last one that is wanted
    share what is left for them: the square of a 0-1 variable is its mean."""
    ordered = m.flatten().sort(descending=True).values
    ones = round(area * len(ordered))
    border = ordered[ones - 1].item()
    near = [i for i, value in enumerate(ordered.tolist()) if abs(value - border) <= tie]
    share = (ones - near[0]) / len(near) if tie else 0.0
    total = torch.zeros((), dtype=m.dtype)
    for i, value in enumerate(ordered):
        if tie and i in near:
            total = total + share * (value - 1) ** 2 + (1 - share) * value**2
        else:
            total = total + (value - (1 if i < ones else 0)) ** 2
    return total / len(ordered)


def slow_blur(x: Tensor, sigma: float) -> Tensor:
    """(C, H, W), the sum over all pixels of the image as the paper writes it."""
    if sigma == 0:
        return x
    out = torch.zeros_like(x)
    row, column = torch.meshgrid(torch.arange(x.shape[1]), torch.arange(x.shape[2]), indexing="ij")
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            g = torch.exp(-((row - i) ** 2 + (column - j) ** 2).to(x) / (2 * sigma**2))
            out[:, i, j] = (x * g).sum((1, 2)) / g.sum()
    return out


def slow_perturb(levels: list[Tensor], m: Tensor) -> Tensor:
    """(C, H, W) levels and m (H, W), a pixel at a time."""
    rows = []
    for i in range(m.shape[0]):
        for j in range(m.shape[1]):
            at = (1 - m[i, j]) * (len(levels) - 1)
            low = min(int(at), len(levels) - 2)
            rows.append(levels[low][:, i, j] * (1 - (at - low)) + levels[low + 1][:, i, j] * (at - low))
    return torch.stack(rows, dim=1).view_as(levels[0])


def reference(net: nn.Module, x: Tensor, target: int, area: float, method: ExtremalPerturbation) -> dict[str, Tensor]:
    """One sample, one area, plain autograd through everything."""
    size = (math.ceil(H / method.stride), math.ceil(W / method.stride))
    cell = (H / size[0], W / size[1])
    levels = [slow_blur(x, method.max_blur * i / (method.levels - 1)) for i in range(method.levels)]
    start = {"preserve": method.initial, "delete": 1 - method.initial, "dual": method.initial}[method.game]
    p = (uniform(*size) * 0 + start).requires_grad_()
    adam = torch.optim.Adam([p], lr=method.lr)
    velocity, losses = torch.zeros(size), []

    def mask() -> tuple[Tensor, Tensor]:
        small = slow_smooth_max(p, cell, method.sigma, method.temperature)
        return small, resize(small[None], (H, W))[0]

    def phi(m: Tensor) -> Tensor:
        return net(slow_perturb(levels, m)[None])[0, target]

    for step in range(method.steps):
        _, m = mask()
        sides = {"preserve": (-1, 0), "delete": (0, 1), "dual": (-1, 1)}[method.game]
        objective = sides[0] * phi(m) + sides[1] * phi(1 - m)
        constraint = slow_area_loss(m, area, TIE)
        loss = objective + method.area_weight * method.area_growth**step * constraint
        (p.grad,) = torch.autograd.grad(loss, p)
        if method.optimizer == "adam":
            adam.step()
        with torch.no_grad():
            if method.optimizer == "sgd":
                velocity = method.momentum * velocity + p.grad
                p -= method.lr * velocity
            p.clamp_(0, 1)
        losses.append(torch.stack((objective, constraint)).detach())
    with torch.no_grad():
        small, m = mask()
        return {"small": small, "m": m, "losses": torch.stack(losses, 1), "kept": phi(m), "removed": phi(1 - m)}


@pytest.mark.parametrize(
    ("game", "optimizer", "initial"), [("preserve", "adam", 1.0), ("delete", "sgd", 0.8), ("dual", "sgd", 0.5)]
)
def test_equals_the_formulas(game, optimizer, initial):
    fields = dict(initial=initial, game=game, optimizer=optimizer, areas=(9 / (H * W), 63 / (H * W)), steps=3, lr=0.06)
    method = ExtremalPerturbation(
        **fields, area_weight=20.0, area_growth=1.3, stride=4, sigma=1.5, max_blur=4.0, levels=3, temperature=0.1
    )
    batch, classifier = pictures(2), model(rows=3)
    found = method.attribute(classifier, batch, {}, Noise(batch.uids))
    growth = method.area_growth ** torch.arange(3).double()
    for i in (1,):  # the other is there to be in the way
        total, loss = 0, 0
        for a, area in enumerate(method.areas):
            slow = reference(classifier.module, batch.x[i], int(batch.target[i]), area, method)
            small, curves = found["masks"][i, a], (found["curve_game"][i, a], found["curve_area"][i, a])
            torch.testing.assert_close(small, slow["small"], rtol=0, atol=1e-9)
            torch.testing.assert_close(torch.stack(curves), slow["losses"], rtol=0, atol=1e-9)
            torch.testing.assert_close(found["area"][i, a], slow["m"].mean(), rtol=0, atol=1e-9)
            torch.testing.assert_close(found["kept"][i, a], slow["kept"], rtol=0, atol=1e-9)
            torch.testing.assert_close(found["removed"][i, a], slow["removed"], rtol=0, atol=1e-9)
            total, loss = total + slow["m"], loss + slow["losses"][0] + 20 * growth * slow["losses"][1]
            assert small.std() > 1e-3
        torch.testing.assert_close(found["map"][i], total, rtol=0, atol=1e-9)
        torch.testing.assert_close(found["loss"][i], loss, rtol=0, atol=1e-7)


# ---- smooth masks ----------------------------------------------------------------------------------


def test_kernel():
    k = kernel((7.0, 7.0), 7.0, (32, 32))
    assert k.shape == (13, 13)
    assert (k[6, 5:8] == 1).all()
    assert k[6, 9] == pytest.approx(math.exp(-1))
    assert torch.equal(k, k.flip(0))
    assert torch.equal(k, k.T)
    assert k[0, 0] == 0  # 8.5 sigma away
    assert k[k > 0].min() >= 1e-3
    assert kernel((7.0, 3.5), 7.0, (32, 64)).shape == (13, 25)
    assert kernel((7.0, 7.0), 100.0, (4, 1)).shape == (7, 1)  # no wider than the lattice


@pytest.mark.parametrize("temperature", [0.02, 0.3])
def test_smooth_max_equals_loops(temperature):
    p = uniform(2, 6, 5)
    found = smooth_max(p, kernel((4.0, 3.0), 3.0, (6, 5)), temperature)
    for one, expected in zip(found, p, strict=True):
        torch.testing.assert_close(one, slow_smooth_max(expected, (4.0, 3.0), 3.0, temperature))


def test_smooth_max_is_between_mean_and_maximum():
    p, k = uniform(3, 7, 8), kernel((2.0, 2.0), 5.0, (7, 8))
    ends = [smooth_max(p, k, temperature) for temperature in (1e6, 1.0, 0.1, 1e-6)]
    assert all((low <= high + 1e-12).all() for low, high in itertools.pairwise(ends))
    f = torch.stack([_window(p, k, i, j) for i in range(7) for j in range(8)], dim=1)
    torch.testing.assert_close(ends[0].flatten(1), f[..., 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(ends[-1].flatten(1), f[..., 1], rtol=0, atol=1e-6)
    assert (ends[-1] >= p - 1e-6).all()  # the paper's lemma: m is never below its parameters
    assert torch.equal(smooth_max(torch.zeros(1, 7, 8), k, 0.05), torch.zeros(1, 7, 8))


def _window(p: Tensor, k: Tensor, i: int, j: int) -> Tensor:
    """(N, 2): mean and maximum of k(u - v) p(v) around place (i, j)."""
    h, w = p.shape[1:]
    down, right = torch.arange(h) - i + k.shape[0] // 2, torch.arange(w) - j + k.shape[1] // 2
    weights = k[down[:, None].clamp(0, k.shape[0] - 1), right.clamp(0, k.shape[1] - 1)]
    inside = (down[:, None] >= 0) & (down[:, None] < k.shape[0]) & (right >= 0) & (right < k.shape[1]) & (weights > 0)
    f = (weights * p)[:, inside]
    return torch.stack((f.mean(1), f.amax(1)), dim=1)


def test_smooth_max_has_the_right_gradient():
    p, k = uniform(2, 4, 5).requires_grad_(), kernel((4.0, 4.0), 4.0, (4, 5))
    assert torch.autograd.gradcheck(lambda p: smooth_max(p, k, 0.05), p)


# ---- the area --------------------------------------------------------------------------------------


def test_area_loss_equals_sorting():
    m, areas = uniform(3, 2, 5, 8).requires_grad_(), (0.1, 0.45)
    found = area_loss(m, areas)
    slow = torch.stack([torch.stack([slow_area_loss(one[a], area) for a, area in enumerate(areas)]) for one in m])
    torch.testing.assert_close(found, slow)
    (ours,), (theirs,) = torch.autograd.grad(found.sum(), m), torch.autograd.grad(slow.sum(), m)
    torch.testing.assert_close(ours, theirs)


def test_area_loss_of_a_step_is_zero():
    m = torch.zeros(1, 1, 4, 5).double()
    m[..., :2] = 1
    assert area_loss(m, [0.4]).item() == 0
    assert area_loss(m, [0.2]).item() == pytest.approx(0.2)
    assert area_loss(m, [0.6]).item() == pytest.approx(0.2)
    assert area_loss(torch.zeros(1, 1, 1, 10).double(), [0.01]).item() == pytest.approx(0.01)  # a tenth of a pixel


def test_equal_values_share_the_gradient():
    """No place is preferred; rounding does not decide; in sum it is what sorting gives."""
    m = torch.full((1, 1, 4, 5), 0.5).double()
    m[0, 0, 0, 0] = 0.9
    rounded = (m + 1e-9 * (uniform(1, 1, 4, 5) - 0.5)).requires_grad_()
    m.requires_grad_()
    (grad,) = torch.autograd.grad(area_loss(m, [0.25])[0, 0], m)  # five ones: 0.9, and four for nineteen
    assert grad[0, 0, 0, 0].item() == pytest.approx(2 * (0.9 - 1) / 20)
    torch.testing.assert_close(grad.flatten()[1:], torch.full((19,), 2 * (0.5 - 4 / 19) / 20).double())
    (slow,) = torch.autograd.grad(slow_area_loss(m[0, 0], 0.25), m)
    assert grad.sum().item() == pytest.approx(slow.sum().item())
    (other,) = torch.autograd.grad(area_loss(rounded, [0.25])[0, 0], rounded)
    torch.testing.assert_close(other, grad, rtol=0, atol=1e-9)


# ---- perturbations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.0, 0.4, 2.5])
def test_blur(sigma):
    x = uniform(2, 6, 7)
    torch.testing.assert_close(blur(x, sigma), slow_blur(x, sigma))


@pytest.mark.parametrize("kind", ["blur", "zero", "mean"])
def test_the_ends_of_a_perturbation(kind):
    x = uniform(2, 3, 6, 7)
    pyramid = ExtremalPerturbation(perturbation=kind, max_blur=2.0).pyramid(x)
    assert pyramid.shape[1] == (8 if kind == "blur" else 2)
    ends = {"blur": blur(x, 2.0), "zero": x * 0, "mean": x.mean((2, 3), keepdim=True).expand_as(x)}
    shown = perturb(pyramid, torch.stack((torch.ones(2, 6, 7), torch.zeros(2, 6, 7)), 1).double()).x
    torch.testing.assert_close(shown[:, 0], x)
    torch.testing.assert_close(shown[:, 1], ends[kind])


def test_perturb_and_its_slope():
    pyramid, m = uniform(2, 4, 3, 6, 7), uniform(2, 2, 6, 7, seed=1)
    x, slope = perturb(pyramid, m)
    for b in range(2):
        for g in range(2):
            torch.testing.assert_close(x[b, g], slow_perturb(list(pyramid[b]), m[b, g]))
    step = 1e-7
    torch.testing.assert_close((perturb(pyramid, m + step).x - x) / step, slope, rtol=0, atol=1e-6)


# ---- oracles ---------------------------------------------------------------------------------------


class Squares(nn.Module):
    """The logit of class 0 is the contrast in one square, that of class 1 in another."""

    PLACES = ((slice(4, 16), slice(4, 16)), (slice(18, 30), slice(20, 32)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 0, a, b].abs().mean((1, 2)) * 10 for a, b in self.PLACES], dim=1)


QUICK = dict(steps=60, area_growth=1.03, stride=3, sigma=2.0, max_blur=6.0)


def checkerboard(n: int = 2) -> Batch:
    """All of it has contrast, which blur takes away."""
    i, j = torch.meshgrid(torch.arange(36), torch.arange(36), indexing="ij")
    x = ((i + j) % 2 * 2 - 1).double().expand(n, 1, 36, 36).clone()
    return Batch(tuple("ab"[:n]), x, torch.arange(n))


def explain(**fields) -> tuple[dict[str, Tensor], Batch, Classifier]:
    batch, classifier = checkerboard(), Classifier(Squares(), dtype=torch.float64)
    method = ExtremalPerturbation(**{**QUICK, **fields})
    return dict(method.attribute(classifier, batch, {}, Noise(batch.uids))), batch, classifier


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"game": "delete"},
        {"game": "dual"},
        {"perturbation": "zero", "area_weight": 30.0},
        {"perturbation": "mean", "area_weight": 30.0, "optimizer": "adam", "lr": 0.05},
    ],
    ids=str,
)
def test_the_map_lies_on_what_the_class_depends_on(fields):
    areas = (0.06, 0.11)
    found, batch, classifier = explain(areas=areas, **fields)
    for i, (rows, columns) in enumerate(Squares.PLACES):
        inside = torch.zeros(36, 36, dtype=torch.bool)
        inside[rows, columns] = True  # a ninth of the image, and a mask's rim is smooth
        map = found["map"][i]
        assert map[inside].sum() > 0.6 * map.sum()
        assert map[inside].mean() > 12 * map[~inside].mean()
        assert inside.flatten()[map.argmax()]
    full = classifier.logits(batch.x).gather(1, batch.target[:, None])
    assert (found["kept"][:, 1] > 0.1 * full[:, 0]).all()
    assert (found["removed"][:, 1] < 0.5 * full[:, 0]).all()
    assert (found["kept"][:, 0] < found["kept"][:, 1]).all()  # more area shows more
    assert (found["removed"][:, 0] > found["removed"][:, 1]).all()


def test_masks_have_their_area():
    areas = (0.1, 0.2, 0.4)
    found, *_ = explain(areas=areas, steps=80, stride=2, sigma=1.0)
    torch.testing.assert_close(found["area"], torch.tensor(areas).double().expand(2, 3), rtol=0.15, atol=0)
    assert found["masks"].amin() >= 0
    assert found["masks"].amax() <= 1
    assert (found["curve_area"][..., -1] < 0.2 * found["curve_area"][..., 0]).all()


def test_a_mask_beats_random_masks_of_its_area():
    found, batch, classifier = explain(areas=(0.1,))
    method, mask = ExtremalPerturbation(**QUICK), resize(found["masks"][0], (36, 36))[0]
    shifts = [(int(a), int(b)) for a, b in np.random.RandomState(0).randint(0, 36, (30, 2))]
    moved = torch.stack([mask.roll(shift, (0, 1)) for shift in shifts])
    scores = classifier.logits(perturb(method.pyramid(batch.x[:1]), moved[None]).x[0])[:, 0]
    assert (found["kept"][0, 0] >= scores - 1e-9).all()
    assert found["kept"][0, 0] > scores.mean() + 2 * scores.std()


def test_the_perturbed_input_is_what_the_gradient_says():
    """Against finite differences through mask, blur and net."""
    batch, classifier = pictures(2), model()
    for game in ("preserve", "delete", "dual"):
        method = ExtremalPerturbation(game=game, areas=(0.1, 0.3), max_blur=3.0, levels=4)
        pyramid, m, way = method.pyramid(batch.x), uniform(2, 2, H, W), uniform(2, 2, H, W, seed=1) - 0.5
        _, grad = method._play(classifier, pyramid, m, batch.target)
        step = 1e-7 * way
        high, low = (method._play(classifier, pyramid, m + s, batch.target)[0] for s in (step, -step))
        torch.testing.assert_close((high - low) / 2e-7, (grad * way).sum((2, 3)), rtol=1e-4, atol=1e-7)


# ---- edges -----------------------------------------------------------------------------------------


def test_smoothing_the_map():
    plain, *_ = explain(areas=(0.1,), steps=5)
    smooth, *_ = explain(areas=(0.1,), steps=5, smooth=0.09)
    torch.testing.assert_close(smooth["map"], blur(plain["map"], 0.09 * 36))
    assert torch.equal(smooth["masks"], plain["masks"])


def test_several_labels():
    batch = pictures(2)
    labels = Batch(batch.uids, batch.x, torch.tensor([[1, 0, 1], [0, 1, 0]]))
    method = ExtremalPerturbation(steps=3, areas=(0.2,), stride=4, sigma=1.0)
    found = method.attribute(model(), labels, {}, Noise(batch.uids))
    one = method.attribute(model(), Batch(batch.uids, batch.x, torch.tensor([0, 1])), {}, Noise(batch.uids))
    torch.testing.assert_close(found["map"][1], one["map"][1])
    assert (found["map"][0] - one["map"][0]).abs().max() > 1e-6


def test_areas_do_not_see_each_other():
    together, alone = explain(areas=(0.05, 0.2), steps=6)[0], explain(areas=(0.2,), steps=6)[0]
    torch.testing.assert_close(together["masks"][:, 1:], alone["masks"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("fields", [{}, {"optimizer": "adam", "lr": 0.05}, {"game": "delete", "initial": 0.9}], ids=str)
def test_many_steps_of_a_batch_equal_single_ones(fields):
    """Also where masks are flat at 0 or 1 and many pixels are tied."""
    batch, method = pictures(3), ExtremalPerturbation(steps=50, stride=3, sigma=1.0, areas=(0.1, 0.3), **fields)
    whole = method.attribute(model(), batch, {}, Noise(batch.uids))
    for i in range(3):
        one = method.attribute(model(), batch[[i]], {}, Noise(batch.uids[i : i + 1]))
        torch.testing.assert_close(one["map"][0], whole["map"][i], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("game", "keep"), ("perturbation", "noise"), ("optimizer", "lbfgs"), ("areas", ()), ("areas", (0.1, 1.0)),
        ("areas", (0.0,)), ("areas", (float("nan"),)), ("steps", 0), ("stride", 0), ("levels", 1), ("area_growth", 0.9),
        ("lr", 0.0), ("sigma", -1.0), ("temperature", 0.0), ("max_blur", 0.0), ("area_weight", -1.0), ("smooth", -0.1),
        ("momentum", 1.0), ("initial", 1.1),
    ],
)  # fmt: skip
def test_bad_fields(field, value):
    with pytest.raises(UserError, match=rf"ExtremalPerturbation\.{field} is "):
        ExtremalPerturbation(**{field: value})


def test_masks_are_regions_of_their_areas_or_refused():
    """At 224 x 224 a place shows 2.3 % of the image. On small or narrow images the default lengths left masks of 0 or
    of everything; what the refusal says instead gives each mask its area, where the class looks."""
    size, k = ExtremalPerturbation().lattice((224, 224))
    assert size == (32, 32)
    assert k.shape == (13, 13)
    for height, width in ((28, 28), (32, 32), (40, 7), (12, 1), (64, 64)):
        look = torch.zeros(2, height, width, dtype=torch.float64)  # class 0 looks at one end, class 1 at the other
        ends = look if height > width else look.mT
        ends[0, : max(height, width) // 3], ends[1, -(max(height, width) // 3) :] = 1, 1

        class Ends(nn.Module):
            def __init__(self, look: Tensor) -> None:
                super().__init__()
                self.register_buffer("look", 10 * look / look.sum((1, 2), keepdim=True))

            def forward(self, x: Tensor) -> Tensor:
                return (x.abs() * self.look).sum((2, 3))

        classifier = Classifier(Ends(look), dtype=torch.float64)
        i, j = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        batch = Batch(("a", "b"), ((i + j) % 2 * 2 - 1).double().expand(2, 1, height, width), torch.arange(2))
        with pytest.raises(
            UserError, match=rf"sigma is 7 and .* of images of {height} x {width}, more than"
        ) as refused:
            ExtremalPerturbation().attribute(classifier, batch, {}, Noise(batch.uids))
        advice = dict(re.findall(r"(stride|sigma|max_blur)=([0-9.]+)", str(refused.value)))
        method = ExtremalPerturbation(
            stride=int(advice["stride"]), sigma=float(advice["sigma"]), max_blur=float(advice["max_blur"]),
            optimizer="adam", lr=0.05, steps=80, area_growth=1.0355,
        )  # fmt: skip
        found = method.attribute(classifier, batch, {}, Noise(batch.uids))
        wanted = torch.tensor(method.areas).double().expand(2, 4)
        torch.testing.assert_close(found["area"], wanted, rtol=0.25, atol=1 / (height * width))
        for one, there in zip(found["map"], look.bool(), strict=True):
            assert one[there].mean() > 5 * one[~there].mean()


def test_a_stride_that_leaves_one_place():
    with pytest.raises(UserError, match=r"stride 18, with which the smallest mask covers 100% of images of 14 x 18"):
        ExtremalPerturbation(stride=18).attribute(model(), pictures(1), {}, Noise(["a"]))


def test_from_a_yaml():
    node = {"_target_": "attrib.methods.extremal.ExtremalPerturbation", "areas": [0.1, 0.5]}
    assert build(node, "method") == ExtremalPerturbation(areas=(0.1, 0.5))
