"""Localisation: parity with the released IoU, the definitions pixel by pixel, the contract, an oracle, the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contracts import metric_contract
from nets import golden
from torch import Tensor, nn

from attrib.metrics import Localisation
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError

H, W = 9, 11


def samples(n: int = 5) -> tuple[Tensor, Tensor]:
    """Signed maps of various scales, and boxes."""
    r = np.random.RandomState(0)
    map, roi = torch.tensor(r.randn(n, H, W) * 10.0 ** r.uniform(-3, 3, (n, 1, 1))), torch.zeros(n, H, W).bool()
    for box in roi:
        y, x = r.randint(0, H - 3), r.randint(0, W - 3)
        box[y : y + r.randint(2, 5), x : x + r.randint(2, 5)] = True
    return map, roi


def score(metric: Localisation, map: Tensor, roi: Tensor | None) -> dict[str, Tensor]:
    uids = tuple(f"s{i}" for i in range(len(map)))
    batch = Batch(uids, torch.zeros(len(map), 3, *map.shape[1:]), torch.zeros(len(map)).long(), roi)
    return metric.score(Classifier(nn.Identity()), batch, map, Noise(uids))


def test_iou_equals_the_released_code():
    data = golden("metric_iou")
    np.testing.assert_allclose(data["thresholds"], np.arange(50) / 50)
    heat, region = torch.tensor(data["heatmap"]).view(1, 12, 15), torch.tensor(data["gt"]).view(1, 12, 15)
    found = score(Localisation(normalize="none"), heat, region)
    np.testing.assert_allclose(found["iou_curve"][0], data["ious"], atol=1e-12)
    assert found["iou"].item() == pytest.approx(data["ious"].mean())
    assert found["iou_best"].item() == pytest.approx(data["ious"].max())


@pytest.mark.parametrize("normalize", ["positive", "absolute", "none"])
@pytest.mark.parametrize("margin", [0, 2])
def test_equals_the_definitions(normalize, margin):
    map, roi = samples()
    if normalize == "none":
        map = (map / map.abs().amax((1, 2), keepdim=True)).sigmoid()
    found = score(Localisation(normalize, 20, margin), map, roi)
    for i in range(len(map)):
        value = {"positive": map[i].clamp(min=0), "absolute": map[i].abs(), "none": map[i]}[normalize]
        value = value if normalize == "none" else value / value.max()
        pixels = [(value[y, x].item(), y, x) for y in range(H) for x in range(W)]
        region = {(y, x) for y in range(H) for x in range(W) if roi[i, y, x]}
        pixels.sort(reverse=True)
        best = [(y, x) for _, y, x in pixels[: len(region)]]
        if value.gt(0).sum() >= len(region):  # else ties of zero heat decide
            assert found["bbox_ratio"][i].item() == pytest.approx(sum(p in region for p in best) / len(region))
        _, y, x = pixels[0]
        hit = any(abs(y - b) <= margin and abs(x - a) <= margin for b, a in region)
        assert found["pointing"][i].item() == hit
        energy = sum(h for h, *p in pixels if tuple(p) in region) / sum(h for h, *_ in pixels)
        assert found["energy"][i].item() == pytest.approx(energy)
        for k in range(20):
            hot = {tuple(p) for h, *p in pixels if h > k / 20}
            assert found["iou_curve"][i, k].item() == pytest.approx(len(hot & region) / len(hot | region))


def test_contract():
    map, roi = samples()
    map[1, 0, 0] = torch.nan
    map[2] = map[2].sign()  # ties
    roi[3] = False
    batch = Batch(tuple("abcde"), torch.zeros(5, 3, H, W), torch.zeros(5).long(), roi)
    models = lambda rows: Classifier(nn.Identity(), rows=rows)  # noqa: E731
    found = metric_contract(Localisation(margin=1), models, batch, map, atol=0)
    for value in found.values():
        assert value.view(5, -1).isnan().all(1).tolist() == [False, True, False, True, False]


def test_heat_in_the_region_beats_heat_outside():
    map, roi = samples()
    oracle, opposite = score(Localisation(), roi.double(), roi), score(Localisation(), (~roi).double(), roi)
    between = score(Localisation(), map, roi)
    for name in Localisation.COLUMNS:
        torch.testing.assert_close(oracle[name], torch.ones(5).double())
        assert opposite[name].max() == 0, name
        assert ((between[name] >= 0) & (between[name] <= 1)).all()


def test_maps_without_heat_prefer_no_place():
    roi = torch.zeros(2000, 4, 5, dtype=torch.bool)
    roi[:, :2, :2] = True
    for flat in (0.0, -1.0, 3.0):
        found = score(Localisation(), torch.full((2000, 4, 5), flat), roi)
        torch.testing.assert_close(found["energy"], torch.full((2000,), 0.2).double())
        assert abs(found["bbox_ratio"].mean().item() - 0.2) < 0.03  # ties are random: chance
        assert abs(found["pointing"].mean().item() - 0.2) < 0.05
        torch.testing.assert_close(found["iou"], torch.full((2000,), 0.2 if flat > 0 else 0.0).double())


def test_sounds():
    map, roi = torch.tensor([[0.0, 1.0, 0.5, 0.0]]), torch.tensor([[False, False, True, True]])
    batch = Batch(("a",), torch.zeros(1, 1, 4), torch.zeros(1).long(), roi)
    for margin, hit in ((0, 0.0), (1, 1.0)):
        found = Localisation(margin=margin).score(Classifier(nn.Identity()), batch, map, Noise(("a",)))
        assert found["pointing"].item() == hit
        assert found["energy"].item() == pytest.approx(1 / 3)
        assert found["bbox_ratio"].item() == 0.5


def test_errors():
    map, roi = samples()
    with pytest.raises(UserError, match="region of interest"):
        score(Localisation(), map, None)
    with pytest.raises(ValueError, match=r"\(5, 9, 10\)"):
        score(Localisation(), map, roi[:, :, 1:])
    for wrong in ({"normalize": "minmax"}, {"thresholds": 0}, {"margin": -1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Localisation(**wrong)
