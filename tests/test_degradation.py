"""Degradation: parity with the released code, one image at a time, the contract, an oracle, the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contracts import close, metric_contract
from nets import golden, small_cnn, small_cnn_images
from test_irof import H, Recorder, Sum, W, classifier, samples, small_net
from test_sensitivity_n import Levelled
from torch import Tensor

from attrib.metrics import Degradation
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError


def score(metric: Degradation, batch: Batch, map: Tensor, model: Classifier | None = None) -> dict[str, Tensor]:
    return metric.score(model or classifier(), batch, map, Noise(batch.uids))


@pytest.mark.parametrize("tile", [(4, 4), (5, 7)])
def test_equals_the_released_code(tile):
    data, (x, labels) = golden("metric_degradation"), small_cnn_images()
    batch, map = Batch(("a", "b"), x[:2], labels[:2]), torch.tensor(data["heatmaps"][:2])
    found = score(Degradation(tile, as_released=True), batch, map, Classifier(small_cnn()))
    for i in range(2):
        for name in ("MoRF", "LeRF"):
            key = f"tile{tile[0]}x{tile[1]}_im{i}_{name}"
            np.testing.assert_allclose(found[f"{name.lower()}_curve"][i], data[f"{key}_scores"], atol=1e-5)
            assert abs(found[name.lower()][i].item() - data[f"{key}_auc"]) < 1e-5


def reference(
    net, x: Tensor, target: int, map: Tensor, tile: tuple[int, int], base: Tensor, least: bool
) -> list[float]:
    """One tile and one image at a time."""
    corners = [(r, c) for r in range(max(1, H // tile[0])) for c in range(max(1, W // tile[1]))]

    def place(r: int, c: int) -> tuple[slice, slice]:
        rows = slice(r * tile[0], H if r == max(1, H // tile[0]) - 1 else (r + 1) * tile[0])
        return rows, slice(c * tile[1], W if c == max(1, W // tile[1]) - 1 else (c + 1) * tile[1])

    order = sorted(corners, key=lambda at: (1 if least else -1) * map[place(*at)].mean().item())
    image, found = x.clone(), [net(x[None]).softmax(1)[0, target].item()]
    for at in order:
        rows, columns = place(*at)
        image[:, rows, columns] = base[:, rows, columns]
        found.append(net(image[None]).softmax(1)[0, target].item())
    return found


@pytest.mark.parametrize("tile", [(3, 2), (5, 5), (20, 20)])
@pytest.mark.parametrize("baseline", ["zero", "mean"])
@pytest.mark.parametrize("normalize", ["none", "ends"])
def test_equals_one_image_at_a_time(tile, baseline, normalize):
    batch, map = samples()
    found, net = score(Degradation(tile, baseline, normalize), batch, map), small_net().double()
    for i, x in enumerate(batch.x):
        base = torch.zeros_like(x) if baseline == "zero" else x.mean((1, 2), keepdim=True).expand_as(x)
        for name, least in (("morf", False), ("lerf", True)):
            curve = np.array(reference(net, x, int(batch.target[i]), map[i], tile, base, least))
            if normalize == "ends":
                curve = (curve - curve[-1]) / (curve[0] - curve[-1])
            np.testing.assert_allclose(found[f"{name}_curve"][i], curve, atol=1e-9)
            assert abs(found[name][i].item() - np.trapezoid(curve) / (len(curve) - 1)) < 1e-9
    torch.testing.assert_close(found["degradation"], found["lerf"] - found["morf"])


@pytest.mark.parametrize("normalize", ["none", "ends"])
def test_contract(normalize):
    batch, map = samples(5)
    map[1, 2, 3] = torch.nan
    map[2] = map[2].round()
    map[3] = 0.0
    found = metric_contract(Degradation((4, 3), normalize=normalize), classifier, batch, map, atol=1e-9)
    for name, value in found.items():
        assert value[1].isnan().all(), name
        assert value[[0, 2, 3, 4]].isfinite().all(), name


def test_true_importance_is_best_and_its_opposite_worst():
    batch, other = samples(6)
    batch = Batch(batch.uids, batch.x, torch.ones(6).long())
    weight = torch.tensor(np.random.RandomState(1).randn(3, H, W)) * 0.3
    gain, model = (weight * batch.x).sum(1), classifier(net=Sum(weight))
    metric = Degradation((4, 2), output="logit")
    oracle, random, worst = (score(metric, batch, map, model) for map in (gain, other, -gain))
    for better, lesser in ((oracle, random), (random, worst)):
        assert (better["degradation"] > lesser["degradation"]).all()
        assert (better["morf"] < lesser["morf"]).all()
        assert (better["lerf"] > lesser["lerf"]).all()
    close({"d": oracle["degradation"]}, {"d": -worst["degradation"]}, 1e-9)


def test_two_passes_a_tile_in_full_blocks():
    Recorder.seen.clear()
    batch, map = samples()
    score(Degradation((4, 7)), batch, map, classifier(rows=10, net=Recorder()))  # 3 x 2 tiles
    assert Recorder.seen == [4, 10, 10, 10, 10, 4]  # the images as they are come first


def test_ends_that_are_alike_have_no_normal_curve():
    batch, map = samples(2)
    batch.x[0] = 0.0
    found = score(Degradation((4, 4), normalize="ends"), batch, map)
    assert found["degradation"].isnan().tolist() == [True, False]
    assert score(Degradation((4, 4)), batch, map)["degradation"].tolist()[0] == 0.0


def test_errors():
    batch, map = samples()
    with pytest.raises(ValueError, match="does not fit"):
        score(Degradation(), batch, map[:, 1:])
    for wrong in ({"tile": (0, 2)}, {"tile": (2,)}, {"baseline": "black"}, {"normalize": "max"}, {"output": "loss"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Degradation(**wrong)
    with pytest.raises(UserError, match="as_released"):
        Degradation(as_released=True, normalize="ends")


def test_ends_that_differ_by_rounding_are_equal():
    """A net of float32 that says the same of both ends, but for the last bit."""
    batch, map = samples()
    found = score(Degradation((4, 4), normalize="ends", output="logit"), batch, map, Classifier(Levelled()))
    assert all(value.isnan().all() for value in found.values())
    found = score(Degradation((4, 4), normalize="ends", output="logit"), batch, map, Classifier(Levelled(0.01)))
    assert all(value.isfinite().all() for value in found.values())
