"""Where quantus and attrib define the same metric: the same numbers on the same work, or the difference, pinned.

The table of it is in ``docs/how-to/use-quantus.md``. IROF's definition is in ``test_irof.py``.
"""

from __future__ import annotations

import sys
import warnings
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from nets import golden, small_cnn, small_cnn_images
from quantus_nets import SIDE, classifier, samples
from torch import Tensor, nn

from attrib.metrics import Degradation, InsertionDeletion, Localisation, SensitivityN, quantus_metric
from attrib.metrics.quantus import _classes
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, SampleError
from attrib.units import Units

PIXELS = SIDE * SIDE
ZERO = {"perturb_baseline": 0.0}  # quantus' own is the darkest value of the image


def ours(metric: Any, model: Classifier, batch: Batch, map: Tensor) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in metric.score(model, batch, map, Noise(batch.uids)).items()}


def theirs(name: str, model: Classifier, batch: Batch, map: Tensor, **parameters: Any) -> dict[str, np.ndarray]:
    return ours(quantus_metric(name, parameters), model, batch, map)


@contextmanager
def old_numpy():
    """For quantus as its documentation calls it."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(np, "trapz", np.trapezoid, raising=False)
        yield


# ---- quantus itself ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PixelFlipping", "Selectivity", "RegionPerturbation"])
def test_column_of_a_curve_is_quantus_own_area(name):
    """Against quantus, called as its documentation does, with the numpy function that it misses put back."""
    given = {"features_in_step": 32} if name == "PixelFlipping" else {}
    batch, map = samples(2)
    metric, model = quantus_metric(name, given), classifier()
    with old_numpy():
        own = _classes()[name](**given, disable_warnings=True)
        # One batch for both: nothing here depends on the others.
        curves = own(
            model=model.module, x_batch=batch.x.numpy(), y_batch=batch.target.numpy(), a_batch=map[:, None].numpy(),
            channel_first=True,
        )  # fmt: skip
        area = own.get_auc_score
    found = ours(metric, model, batch, map)
    np.testing.assert_allclose(found[f"{metric.column}_curve"], np.stack(curves), atol=1e-6)
    np.testing.assert_allclose(found[metric.column].mean(), area, rtol=1e-5, atol=1e-5)


def test_area_for_each_sample_is_the_same_column_without_the_curve():
    batch, map = samples(2)
    assert quantus_metric("PixelFlipping", {"return_auc_per_sample": True}).CURVES == {}
    whole, alone = (
        theirs("PixelFlipping", classifier(), batch, map, features_in_step=32, return_auc_per_sample=only)
        for only in (False, True)
    )
    np.testing.assert_allclose(alone["pixel_flipping"], whole["pixel_flipping"], rtol=1e-6)
    assert list(alone) == ["pixel_flipping"]


def test_softmax_is_quantus_default_or_the_given():
    batch, map = samples(2)
    p, default, logit = (
        ours(quantus_metric("Selectivity", {}, softmax), classifier(), batch, map)["selectivity_curve"]
        for softmax in (True, None, False)
    )
    assert (p == default).all()
    assert (p > 0).all()
    assert (logit < 0).any()


class Attending(nn.Module):
    """Its last layer by name is a softmax, which is not what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.attend = classifier().module, nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x * (1 + self.attend(x)))


@pytest.mark.parametrize("softmax", [True, False])
def test_a_softmax_inside_the_net_is_left_alone(softmax):
    """quantus takes the last one that it finds for the output: it takes it out, or probabilities for granted."""
    batch, map = samples(2)
    model = Classifier(Attending())
    found = ours(quantus_metric("Selectivity", {}, softmax), model, batch, map)["selectivity_curve"]
    order = map.unfold(1, 8, 8).unfold(2, 8, 8).sum((3, 4)).flatten(1).argsort(1, descending=True)
    for i, x in enumerate(batch.x):
        image = x.clone()
        for step, tile in enumerate(order[i].tolist()):
            row, column = tile // 2 * 8, tile % 2 * 8
            image[:, row : row + 8, column : column + 8] = x.min()
            logits = model.logits(image[None])[0]
            expected = (logits.softmax(0) if softmax else logits)[batch.target[i]].item()
            assert found[i, step] == pytest.approx(expected, rel=1e-5, abs=1e-6)


# ---- deletion and pixel flipping --------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_pixel_flipping_is_deletion(channels):
    """quantus removes numbers of single channels, those of a pixel one after another; its curve lacks the start."""
    batch, map = samples(2, channels)
    model, step = classifier(channels), 8
    mine = ours(InsertionDeletion(steps=None, step=step), model, batch, map)["deletion_curve"]
    features = step if channels == 1 else 8  # it must divide the pixels
    found = theirs("PixelFlipping", model, batch, map, features_in_step=features, **ZERO)["pixel_flipping_curve"]
    every = channels * step // features
    np.testing.assert_allclose(found[:, every - 1 :: every], mine[:, 1:], atol=2e-6)
    assert found.shape[1] == channels * PIXELS // features


def test_area_of_pixel_flipping_is_that_of_deletion_as_released_times_its_points():
    batch, map = samples(2, 1)
    mine = ours(InsertionDeletion(steps=None, step=8, as_released=True), classifier(1), batch, map)
    found = theirs("PixelFlipping", classifier(1), batch, map, features_in_step=8, **ZERO)
    np.testing.assert_allclose(found["pixel_flipping"], mine["deletion"] * PIXELS / 8, rtol=1e-5)


# ---- degradation, selectivity and region perturbation -----------------------------------------


@pytest.mark.parametrize("order", ["morf", "lerf"])
def test_region_perturbation_is_the_fall_of_degradation(order):
    batch, map = samples(2)
    mine = ours(Degradation(tile=(4, 4)), classifier(), batch, map)[f"{order}_curve"]
    found = theirs("RegionPerturbation", classifier(), batch, map, patch_size=4, order=order, **ZERO)
    np.testing.assert_allclose(found["region_perturbation_curve"], mine[:, :1] - mine[:, 1:], atol=2e-6)


def test_selectivity_is_the_first_curve_of_degradation():
    batch, map = samples(2)
    mine = ours(Degradation(tile=(4, 4)), classifier(), batch, map)
    found = theirs("Selectivity", classifier(), batch, map, patch_size=4, **ZERO)
    np.testing.assert_allclose(found["selectivity_curve"], mine["morf_curve"][:, 1:], atol=2e-6)


def test_region_perturbation_pads_images_that_are_no_multiple_of_the_patch():
    """16 = 3 * 5 + 1: quantus has 4 x 4 patches of which some are padding, degradation 3 x 3 tiles, the last larger."""
    batch, map = samples(1)
    assert theirs("Selectivity", classifier(), batch, map, patch_size=5, **ZERO)["selectivity_curve"].shape == (1, 16)
    assert ours(Degradation(tile=(5, 5)), classifier(), batch, map)["morf_curve"].shape == (1, 10)


# ---- sensitivity-n ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 40, 200])
def test_faithfulness_correlation_is_sensitivity_n_at_one_size(size, monkeypatch):
    """Given the subsets that quantus draws, which are those of its random state, seeded by the sample's stream."""
    batch, map = samples(2, 1)
    runs = 12

    def subsets(units: Units, sizes: Tensor, noise: Noise, portion: int):
        gone = torch.zeros(len(batch), runs, PIXELS, dtype=torch.bool)
        for i, seed in enumerate(Noise(batch.uids).child("quantus").bits(1)[:, 0].tolist()):
            r = np.random.RandomState(seed % 2**32)
            for run in range(runs):
                gone[i, run, r.choice(PIXELS, size, replace=False)] = True
        yield gone

    monkeypatch.setattr(SensitivityN, "_subsets", staticmethod(subsets))
    mine = ours(SensitivityN(sizes=(size,), samples=runs), classifier(1), batch, map)["sensitivity_n"]
    found = theirs("FaithfulnessCorrelation", classifier(1), batch, map, subset_size=size, nr_runs=runs, **ZERO)
    np.testing.assert_allclose(found["faithfulness_correlation"], mine, atol=1e-4)
    assert np.abs(mine).max() > 0.1


def test_sensitivity_n_of_quantus_is_another_thing():
    """Of the n largest pixels, not of random subsets; over the samples, not over subsets; and of both sides different
    sets: the fall of the score is that of all pixels that are gone, the sum that of the last step's alone."""
    batch, map = samples(6, 1)
    model, step = classifier(1), 32
    steps = int(0.8 * PIXELS // step)
    with old_numpy():
        (found,) = _classes()["SensitivityN"](features_in_step=step, disable_warnings=True, **ZERO)(
            model=model.module, x_batch=batch.x.numpy(), y_batch=batch.target.numpy(), a_batch=map[:, None].numpy(),
            channel_first=True,
        )  # fmt: skip
    deletion = ours(InsertionDeletion(steps=None, step=step), model, batch, map)["deletion_curve"]
    fall = deletion[:, :1] - deletion[:, 1:]
    # Divided by the largest value of the whole batch, quantus' normalisation.
    largest = (map / map.abs().max()).flatten(1).sort(1, descending=True).values
    last = largest.view(6, -1, step).sum(2).numpy()
    assert found == pytest.approx(np.mean([np.corrcoef(fall[:, k], last[:, k])[0, 1] for k in range(steps)]), abs=1e-4)
    both = np.mean([np.corrcoef(fall[:, k], last[:, : k + 1].sum(1))[0, 1] for k in range(steps)])
    assert abs(found - both) > 0.01  # what it would be with the same sets


# ---- localisation -----------------------------------------------------------------------------


def test_pointing_game_rank_accuracy_and_mass_accuracy():
    batch, map = samples(6)
    map[:3] -= 3 * batch.roi[:3]  # these miss
    map = map - map.amin((1, 2), keepdim=True)  # heat: energy is a share only where nothing is negative
    mine = ours(Localisation(), classifier(), batch, map)
    for name, column in (
        ("PointingGame", "pointing"),
        ("RelevanceRankAccuracy", "bbox_ratio"),
        ("RelevanceMassAccuracy", "energy"),
    ):
        (found,) = theirs(name, classifier(), batch, map).values()
        np.testing.assert_allclose(found, mine[column], rtol=1e-5, err_msg=name)
    assert 0 < mine["pointing"].sum() < 6


def test_attribution_localisation_is_energy_of_absolute_values():
    batch, map = samples(3)
    mine = ours(Localisation(normalize="absolute"), classifier(), batch, map)["energy"]
    (found,) = theirs("AttributionLocalisation", classifier(), batch, map).values()
    np.testing.assert_allclose(found, mine, rtol=1e-5)


def test_localisation_differs_on_ties_signs_and_maps_without_heat():
    batch, map = samples(24)
    batch.roi[:] = False
    batch.roi[:, 2, 2] = True
    tied = torch.zeros_like(map)
    tied[:, 2, 2] = tied[:, 9, 9] = 1.0
    # Two maxima of which one lies in the region: always a hit there, one in two here.
    assert theirs("PointingGame", classifier(), batch, tied)["pointing_game"].all()
    assert 0 < ours(Localisation(), classifier(), batch, tied)["pointing"].mean() < 1
    # Negative values count as negative mass there, as none here.
    signed = map[:1].clone()
    signed[0, 2, 2] = 1.0
    mass = theirs("RelevanceMassAccuracy", classifier(), batch[:1], signed)["relevance_mass_accuracy"]
    assert mass == pytest.approx((1 / signed.sum()).item(), rel=1e-4)
    assert ours(Localisation(), classifier(), batch[:1], signed)["energy"] == pytest.approx(
        (1 / signed.clamp(min=0).sum()).item(), rel=1e-4
    )
    # A map that is negative throughout: refused there, here it prefers no place.
    with pytest.raises(SampleError, match="less than zero"):
        theirs("PointingGame", classifier(), batch[:1], -signed.abs() - 1)
    assert ours(Localisation(), classifier(), batch[:1], -signed.abs() - 1)["energy"] == pytest.approx(1 / PIXELS)


# ---- IROF -------------------------------------------------------------------------------------


def test_irof_is_that_of_the_goldens(monkeypatch):
    """Scores of quantus 0.6.0 by other hands, each image alone; ``test_irof.py`` derives ours from the same loop."""
    data, (x, labels) = golden("quantus_irof"), small_cnn_images()
    segments = iter(data["segments"])
    quantus_metric("IROF")  # imports it
    utils = sys.modules["quantus.helpers.utils"]
    monkeypatch.setattr(utils, "get_superpixel_segments", lambda img, segmentation_method: next(segments))
    batch = Batch(tuple("abcde"), x, labels)
    found = theirs("IROF", Classifier(small_cnn()), batch, torch.tensor(data["maps"]).float())["irof"]
    np.testing.assert_allclose(found, data["scores_alone"], atol=1e-4)
