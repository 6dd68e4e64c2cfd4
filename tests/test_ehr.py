"""Effective Heat Ratio: parity with the released code, a slow re-derivation, the contract, every documented edge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from contracts import metric_contract
from nets import golden, small_cnn
from scipy.integrate import trapezoid
from torch import Tensor, nn

from attrib.metrics import EHR
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError

H, W = 11, 14


def score(metric: EHR, map: Tensor, roi: Tensor) -> dict[str, Tensor]:
    uids = tuple(f"s{i}" for i in range(len(map)))
    batch = Batch(uids, torch.zeros(len(map), 3, *map.shape[1:]), torch.zeros(len(map)).long(), roi)
    return metric.score(Classifier(nn.Identity()), batch, map, Noise(uids))


def samples(n: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Signed maps of various scales, and boxes."""
    r = np.random.RandomState(seed)
    map = torch.tensor(r.randn(n, H, W) * 10.0 ** r.uniform(-3, 3, (n, 1, 1)))
    roi = torch.zeros(n, H, W, dtype=torch.bool)
    for box in roi:
        y, x = r.randint(0, H - 3), r.randint(0, W - 3)
        box[y : y + r.randint(2, 6), x : x + r.randint(2, 6)] = True
    return map, roi


def reference(heat: np.ndarray, roi: np.ndarray, base: float, steps: int, weighted: bool) -> tuple[float, list[float]]:
    """Pixel by pixel, from the definition; ``heat`` (H, W) in [0, 1]."""
    pixels = [(float(h), bool(inside)) for h, inside in zip(heat.ravel(), roi.ravel(), strict=True) if h >= base]
    quantiles = np.linspace(0, 1, steps)
    ratios = []
    for q in quantiles:
        threshold = min(np.quantile([h for h, _ in pixels], q), 0.99 * max(h for h, _ in pixels))
        total, in_region = 0, 0.0
        for h, inside in pixels:
            if h >= threshold:
                total += 1
                in_region += (h if weighted else 1.0) * inside
        ratios.append(in_region / total)
    return trapezoid(ratios, quantiles), ratios


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("base", [0.1, 0.4])
def test_equals_the_released_code(base, weighted):
    data = golden("metric_ehr")
    heats = {
        "hm0": data["hm0"],
        "hm1": data["hm1"],
        "hm0_uint8": data["hm0_uint8"] / 255.0,  # what the released code does with 8-bit maps
        "hm0_x3": data["hm0_x3"].mean(0),  # and with three channels
    }
    shape = data["hm0"].shape
    regions = {"mask": data["roi_mask"], "box": np.zeros(shape, bool), "boxes": np.zeros(shape, bool)}
    for name, boxes in (("box", data["roi_box"][None]), ("boxes", data["roi_boxes"])):
        for x1, y1, x2, y2 in boxes:
            regions[name][y1:y2, x1:x2] = True
    cases = [(f"{h}_{r}_t{base}_w{weighted:d}".replace(".", "p"), heats[h], regions[r]) for h in heats for r in regions]
    cases = [case for case in cases if case[0] + "_auc" in data or case[0] + "_ratios" in data]
    assert len(cases) >= 6

    metric = EHR(base_threshold=base, weight_by_heat=weighted, normalize="none")
    found = score(
        metric,
        torch.tensor(np.stack([heat for _, heat, _ in cases])),
        torch.tensor(np.stack([region for _, _, region in cases])),
    )
    for i, (name, _, _) in enumerate(cases):
        if name + "_auc" in data:
            assert abs(found["ehr"][i].item() - data[name + "_auc"]) < 1e-9, name
        if name + "_ratios" in data:
            assert np.abs(found["ehr_curve"][i].numpy() - data[name + "_ratios"]).max() < 1e-9, name


@pytest.mark.parametrize("normalize", ["positive", "absolute"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("base", "steps"), [(0.1, 11), (0.0, 6), (0.55, 2)])
def test_equals_the_definition(base, steps, weighted, normalize):
    map, roi = samples()
    found = score(EHR(base, steps, weighted, normalize), map, roi)
    assert found["ehr_curve"].shape == (len(map), steps)
    for i in range(len(map)):
        heat = map[i].abs() if normalize == "absolute" else map[i].clamp(min=0)
        area, ratios = reference((heat / heat.max()).numpy(), roi[i].numpy(), base, steps, weighted)
        assert abs(found["ehr"][i].item() - area) < 1e-7  # 1e-8 in the released denominator
        np.testing.assert_allclose(found["ehr_curve"][i], ratios, atol=1e-7)


@pytest.mark.parametrize("n", [2, 11, 21, 101, 1001])
def test_a_threshold_that_falls_on_a_pixel_keeps_it_as_numpy_does(n):
    """(n - 1) q is a whole number up to rounding for every quantile."""
    r = np.random.RandomState(n)
    for heat in (np.linspace(0.2, 1, n), r.uniform(0.2, 1, n), r.randint(2, 6, n) / 5.0):
        roi = r.rand(n) < 0.4
        roi[0] = True
        found = score(EHR(normalize="none"), torch.tensor(heat[None, None]), torch.tensor(roi[None, None]))
        _, ratios = reference(heat, roi, 0.1, 11, True)
        np.testing.assert_allclose(found["ehr_curve"][0], ratios, atol=2e-8)


@pytest.mark.parametrize("weighted", [True, False])
def test_contract(weighted):
    map, roi = samples()
    map[1, 0, 0] = torch.nan
    map[2] = map[2].round()  # ties
    roi[3] = False
    batch = Batch(tuple("abcde"), torch.zeros(5, 3, H, W), torch.zeros(5).long(), roi)
    found = metric_contract(
        EHR(weight_by_heat=weighted),
        lambda rows: Classifier(small_cnn(), rows=rows, dtype=torch.float64),
        batch,
        map,
        atol=0,
    )
    assert found["ehr"].isnan().tolist() == [False, True, False, True, False]


def test_scale_and_dtype_do_not_matter():
    map, roi = samples()
    expected = score(EHR(), map, roi)["ehr"]
    torch.testing.assert_close(score(EHR(), map * 2.0**-7, roi)["ehr"], expected, rtol=0, atol=0)
    torch.testing.assert_close(score(EHR(), map.float(), roi)["ehr"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("weighted", [True, False])
def test_heat_in_the_region_beats_heat_outside(weighted):
    _, roi = samples()
    metric = EHR(weight_by_heat=weighted)
    oracle, opposite = score(metric, roi.double(), roi)["ehr"], score(metric, (~roi).double(), roi)["ehr"]
    torch.testing.assert_close(oracle, torch.ones(5).double(), rtol=0, atol=1e-7)
    assert opposite.tolist() == [0.0] * 5
    found = score(metric, *samples())
    assert all(((value >= 0) & (value <= 1)).all() for value in found.values())


def test_weighted_perfect_placement_at_half_heat_scores_half():
    data = golden("metric_ehr")
    roi = torch.zeros(1, H, W, dtype=torch.bool)
    roi[:, 2:5, 3:9] = True
    for weighted, expected in ((True, data["half_auc_w1"]), (False, data["half_auc_w0"])):
        found = score(EHR(weight_by_heat=weighted, normalize="none"), 0.5 * roi.double(), roi)
        assert abs(found["ehr"].item() - expected) < 1e-9


def test_flat_maps_score_chance():
    roi = torch.zeros(4, H, W, dtype=torch.bool)
    roi[:, :3, :5] = True
    map = torch.tensor([3.0, 0.0, -2.0, 1e-30])[:, None, None].expand(4, H, W).clone()
    map[2, 0, 0] = -7.0  # without positive value, though not flat
    for weighted in (True, False):
        found = score(EHR(weight_by_heat=weighted), map, roi)["ehr"]
        np.testing.assert_allclose(found, 15 / (H * W), atol=1e-8)


def test_nothing_above_the_threshold_of_a_given_heat_scores_zero():
    map, roi = torch.full((1, H, W), 0.05), torch.ones(1, H, W, dtype=torch.bool)
    assert score(EHR(normalize="none"), map, roi)["ehr"].item() == 0.0


def test_pixels_below_the_threshold_never_count():
    """0.99 max may lie below the base threshold."""
    map, roi = torch.tensor([[[0.4, 0.399]]]).double(), torch.tensor([[[True, False]]])
    assert score(EHR(0.4, weight_by_heat=False, normalize="none"), map, roi)["ehr"].item() == pytest.approx(1, abs=1e-7)


def test_undefined_samples_are_nan():
    map, roi = samples(4)
    map[0, 1, 1], map[1, 1, 1], roi[2] = torch.nan, torch.inf, False
    found = score(EHR(), map, roi)
    assert found["ehr"].isnan().tolist() == [True, True, True, False]
    assert found["ehr_curve"].isnan().all(dim=1).tolist() == [True, True, True, False]


def test_errors():
    map, roi = samples()
    batch = Batch(tuple("abcde"), torch.zeros(5, 3, H, W), torch.zeros(5).long())
    with pytest.raises(UserError, match="region of interest"):
        EHR().score(Classifier(nn.Identity()), batch, map, Noise(batch.uids))
    with pytest.raises(ValueError, match=r"\(5, 11, 13\)"):
        score(EHR(), map[:, :, 1:], roi)
    for wrong in ({"base_threshold": 1.5}, {"steps": 1}, {"normalize": "minmax"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            EHR(**wrong)


def test_the_metric_of_the_how_to_keeps_the_contract():
    page = (Path(__file__).parents[1] / "docs/how-to/add-a-metric.md").read_text()
    namespace: dict = {"__name__": __name__}
    exec(page.split("```python\n")[1].split("```")[0], namespace)
    map, roi = samples()
    map[1, 0, 0], roi[3] = torch.nan, False
    batch = Batch(tuple("abcde"), torch.zeros(5, 3, H, W), torch.zeros(5).long(), roi)
    metric = namespace["PointingGame"](absolute=True)
    found = metric_contract(metric, lambda rows: Classifier(nn.Identity(), rows=rows), batch, map, atol=0)
    assert found["hit"].isnan().tolist() == [False, True, False, True, False]
