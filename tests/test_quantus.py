"""The adapter of quantus: every one of its metrics, their directions, what they leave alone, bad input."""

from __future__ import annotations

import importlib.metadata
import pickle
import random
import re
import runpy
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contracts import close, metric_contract, unchanged
from quantus_nets import SIDE, Weighted, classifier, gradient, samples
from test_run import run, scores, summary  # noqa: F401 (run is a fixture)
from torch import Tensor, nn

import attrib.metrics.quantus as adapter
from attrib import keys
from attrib.config.objects import build
from attrib.metrics import ExplainingQuantus, Quantus, quantus_metric
from attrib.metrics.quantus import CURVES, EXPLAINS, REFUSED, _classes
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, SampleError, UserError

AVAILABLE = sorted(_classes())
USABLE = [name for name in AVAILABLE if name not in REFUSED]
# What makes them quick, or fit images of 16 x 16.
SMALL: dict[str, dict[str, Any]] = {
    "FaithfulnessCorrelation": {"subset_size": 20, "nr_runs": 10},
    "FaithfulnessEstimate": {"features_in_step": 16},
    "PixelFlipping": {"features_in_step": 16},
    "MonotonicityCorrelation": {"features_in_step": 32, "nr_samples": 2},
    "ROAD": {"percentages": [10, 30, 50]},
    "Infidelity": {"n_perturb_samples": 2},
    "Continuity": {"nr_steps": 4},
    "TopKIntersection": {"k": 20},
    **{name: {"nr_samples": 3} for name in EXPLAINS - {"Continuity", "RandomLogit"}},
}


def score(metric: Quantus, model: Classifier, batch: Batch, map: Tensor, explain: Any = None) -> dict[str, Tensor]:
    explain = explain or partial(gradient, model)
    extra = (explain,) if metric.NEEDS_EXPLAIN else ()
    return metric.score(model, batch, map, Noise(batch.uids, 3), *extra)


# ---- all of them ------------------------------------------------------------------------------


def test_what_quantus_has():
    """A new version with other metrics shows here."""
    assert len(AVAILABLE) == 37
    assert len(USABLE) == 28
    assert set(AVAILABLE) >= set(REFUSED) | EXPLAINS | set(CURVES)


@pytest.mark.parametrize("name", USABLE)
def test_every_metric(name, capsys):
    """It says something, a batch equals singles, in any order, at any row limit; the process is left as it was."""
    channels = 1 if name in ("ROAD", "NonSensitivity") else 3  # NonSensitivity: a forward pass for each number
    metric, model = quantus_metric(name, SMALL.get(name, {})), classifier(channels)
    batch, _ = samples(3, channels)
    map = gradient(model, batch)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    filters = list(warnings.filters)
    with unchanged(batch, map, model):
        found = score(metric, model, batch, map)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    assert warnings.filters == filters
    assert sys.modules["quantus"].helpers.utils.np is np
    assert capsys.readouterr() == ("", "")
    assert not any(module._forward_hooks for module in model.module.modules())

    assert found.keys() == metric.COLUMNS.keys() | metric.CURVES.keys()
    assert found[metric.column].shape == (3,)
    assert all(value.dtype == torch.float64 and value.isfinite().all() for value in found.values())
    assert metric.COLUMNS[metric.column] in ("higher", "lower")
    assert "image" in metric.MODALITIES
    # One row at a time rounds differently, and what quantus divides by is small.
    near = {key: 1e-4 * max(1.0, value.abs().max().item()) for key, value in found.items()}
    single = score(metric, classifier(channels, rows=1), batch[[1]], map[1:2])
    for key, value in found.items():
        torch.testing.assert_close(single[key], value[1:2], rtol=1e-4, atol=near[key])
    close(score(metric, model, batch[[2, 0]], map[[2, 0]]), {key: value[[2, 0]] for key, value in found.items()})


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_work_says_why(name):
    with pytest.raises(UserError, match=rf"quantus' {name} cannot be used here: it \w+"):
        quantus_metric(name)


def test_monotonicity_of_quantus_is_the_same_for_all_maps():
    """Why it is refused: it fills its baseline with the baseline, so that the net always sees the same image."""
    _, model, batch, best, *_ = oracle("PixelFlipping")
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = _classes()["Monotonicity"](features_in_step=64, disable_warnings=True)
        handle = model.module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
        found = [
            metric(
                model=model.module, x_batch=batch.x.numpy(), y_batch=np.array([1]), a_batch=map[:, None].numpy(),
                channel_first=True,
            )
            for map in (best, -best)
        ]  # fmt: skip
        handle.remove()
    assert found == [[True], [True]]
    assert len(seen) == 8
    assert all(torch.equal(x, batch.x * 0) for x in seen)


@pytest.mark.parametrize("name", ["Sparseness", "AUC"])
def test_contract(name):
    """Those that draw no numbers keep the whole contract."""
    batch, map = samples(4, dtype=torch.float64)
    map[1, 2, 3] = torch.nan
    found = metric_contract(quantus_metric(name), lambda rows: classifier(3, rows, torch.float64), batch, map)
    assert found[quantus_metric(name).column].isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("name", ["PixelFlipping", "MaxSensitivity", "AUC", "Sparseness"])
def test_sounds(name):
    net = nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(2 * 64, 3)).eval()
    for i, p in enumerate(net.parameters()):
        p.data = torch.arange(p.numel()).add(7.0 * i).mul(1.7).sin().mul(0.3).view_as(p)
    model, x = Classifier(net), torch.tensor(np.random.RandomState(0).randn(2, 1, 64)).float()
    batch = Batch(("a", "b"), x, torch.tensor([0, 2]), (torch.arange(64) < 20).expand(2, 64))
    metric = quantus_metric(name, SMALL.get(name, {}))
    assert "audio" in metric.MODALITIES
    assert score(metric, model, batch, gradient(model, batch))[metric.column].isfinite().all()


# ---- directions -------------------------------------------------------------------------------


def oracle(name: str) -> tuple[dict, Classifier, Batch, Tensor, Tensor, Any, Any]:
    """Parameters, net, sample, the true map and its opposite, and how each is explained elsewhere.

    The net is linear, so that a pixel's share of the score is known; the darkest pixel, quantus' baseline, is 0.
    """
    r = np.random.RandomState(0)
    weight, x = torch.tensor(r.randn(SIDE, SIDE)).float() * 0.2, torch.tensor(r.rand(1, 1, SIDE, SIDE)).float() + 0.5
    x[..., 0, 0] = 0.0
    parameters = dict(SMALL.get(name, {}))
    if name == "ROAD":  # a pixel becomes about the mean of its neighbours, and the class is nearly lost
        weight -= ((weight * x).sum() - 0.1) / x.sum()
    if name == "NonSensitivity":
        weight[8:] = 0.0
    if name in ("Completeness", "Infidelity"):
        weight = (weight * 64).round() / 64
        x = (x * 16).round() / 16  # sums without rounding
        parameters["normalise"] = False
    model = Classifier(Weighted(weight), rows=256)
    roi = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    roi[:, :4, 3:9] = True
    batch = Batch(("a",), x, torch.tensor([1]), roi)
    best = weight * x[:, 0]
    if name == "ROAD":
        best = weight * (x - x.mean())[:, 0]
    worst = -best
    ripple = 1e-3 * torch.tensor(r.rand(1, SIDE, SIDE)).float()
    if name == "NonSensitivity":
        worst = (weight == 0).float()[None] + ripple
    if name == "MonotonicityCorrelation":
        worst = 1 / (best.abs() + 0.1)
    category = _classes()[name].evaluation_category.value
    if category == "Localisation":
        best, worst = roi + ripple, ~roi + ripple
    if category == "Complexity":
        best = torch.zeros(1, SIDE, SIDE)
        best[0, 5, 5], worst = 1.0, 1 + ripple

    def steady(_: Batch) -> Tensor:
        return best

    def restless(b: Batch) -> Tensor:
        return best * (1 + (300 * b.x[:, 0]).sin())

    def of_the_class(b: Batch) -> Tensor:
        return best if b.target.item() == 1 else -best

    calm, wild = (of_the_class, steady) if name == "RandomLogit" else (steady, restless)
    if category in ("Robustness", "Randomisation"):
        worst = wild(batch)
    return parameters, model, batch, best, worst, calm, wild


@pytest.mark.parametrize("name", USABLE)
def test_true_map_is_better_than_its_opposite_in_the_declared_direction(name):
    parameters, model, batch, best, worst, calm, wild = oracle(name)
    metric = quantus_metric(name, parameters)
    good = score(metric, model, batch, best, calm)[metric.column].item()
    bad = score(metric, model, batch, worst, wild)[metric.column].item()
    assert good > bad if metric.COLUMNS[metric.column] == "higher" else good < bad, (good, bad)


@pytest.mark.parametrize(
    ("name", "own", "other"),
    [
        ("FaithfulnessCorrelation", "correlation_spearman", "distance_euclidean"),
        ("MaxSensitivity", "distance_euclidean", "correlation_pearson"),
        ("RandomLogit", "correlation_pearson", "cosine"),  # scipy's, a distance
    ],
)
def test_a_similarity_of_the_other_kind_has_no_direction(name, own, other):
    given = {function: quantus_metric(name, {"similarity_func": function}) for function in (own, other, None)}
    (first,), (second,), (default,) = (metric.COLUMNS.values() for metric in given.values())
    assert (first, second, default) == (_classes()[name].score_direction.value, "none", first)


def test_what_a_distance_says_is_the_opposite():
    parameters, model, batch, best, worst, *_ = oracle("FaithfulnessCorrelation")
    good, bad = (
        score(quantus_metric("FaithfulnessCorrelation", {**parameters, "similarity_func": f}), model, batch, map)
        for f, map in (("distance_euclidean", best), ("distance_euclidean", worst))
    )
    assert good["faithfulness_correlation"] < bad["faithfulness_correlation"]


def test_directions_are_quantus_own_but_for_one():
    for name in USABLE:
        (declared,) = quantus_metric(name).COLUMNS.values()
        own = _classes()[name].score_direction.value
        assert (declared == own) == (name != "RegionPerturbation"), name
    orders = {order: quantus_metric("RegionPerturbation", {"order": order}).COLUMNS for order in ("lerf", "random")}
    assert orders == {"lerf": {"region_perturbation": "lower"}, "random": {"region_perturbation": "none"}}
    _, model, batch, best, worst, *_ = oracle("RegionPerturbation")
    metric = quantus_metric("RegionPerturbation", {"order": "lerf"})
    good, bad = (score(metric, model, batch, map)["region_perturbation"].item() for map in (best, worst))
    assert good < bad


# ---- parameters -------------------------------------------------------------------------------


def test_functions_by_name_and_what_numpy_2_lacks():
    batch, map = samples(1)
    given = {"nr_samples": 2, "perturb_func": "batch_gaussian_noise", "similarity_func": "distance_euclidean"}
    named = quantus_metric("LocalLipschitzEstimate", {"perturb_func": "batch_gaussian_noise", "nr_samples": 2})
    assert score(named, classifier(), batch, map)["local_lipschitz_estimate"].isfinite().all()
    with pytest.raises(UserError, match=r"no function 'batch_gausian_noise'; did you mean 'batch_gaussian_noise'"):
        quantus_metric("LocalLipschitzEstimate", {**given, "perturb_func": "batch_gausian_noise"})
    # numpy.NaN is taken where the prediction changes.
    changing = quantus_metric("Continuity", {"nr_steps": 4, "return_nan_when_prediction_changes": True})
    assert score(changing, classifier(), batch, map)["continuity"].shape == (1,)


def test_random_logit_takes_the_nets_classes_and_the_samples_stream():
    batch, _ = samples(12)
    asked = []

    def explain(b: Batch) -> Tensor:
        asked.append(b.target.item())
        return gradient(classifier(), b)

    score(quantus_metric("RandomLogit"), classifier(), batch, gradient(classifier(), batch), explain)
    assert all(0 <= other < 5 and other != own for other, own in zip(asked, batch.target.tolist(), strict=True))
    assert len({(other - own) % 5 for other, own in zip(asked, batch.target.tolist(), strict=True)}) > 2


# ---- bad input --------------------------------------------------------------------------------


def test_undefined_samples():
    batch, map = samples(3)
    batch.roi[1] = False
    map[2, 0, 0] = torch.inf
    assert score(quantus_metric("AUC"), classifier(), batch, map)["auc"].isnan().tolist() == [False, True, True]
    found = score(quantus_metric("PixelFlipping", {"features_in_step": 16}), classifier(), batch, map)
    assert found["pixel_flipping"].isnan().tolist() == [False, False, True]
    assert found["pixel_flipping_curve"].isnan().all(1).tolist() == [False, False, True]
    nothing = score(quantus_metric("PixelFlipping"), classifier(), batch, map * torch.nan)
    assert all(value.isnan().all() for value in nothing.values())


def test_what_quantus_refuses_is_a_failure_of_that_sample():
    batch, map = samples(2)
    with pytest.raises(SampleError, match=r"s1: quantus' PixelFlipping refuses it: .*uniformly"):
        score(quantus_metric("PixelFlipping", {"features_in_step": 16}), classifier(), batch[[1]], map[1:] * 0 + 0.5)
    with pytest.raises(SampleError, match=r"s0: quantus' PixelFlipping refuses it: Set 'features_in_step'"):
        score(quantus_metric("PixelFlipping", {"features_in_step": 7}), classifier(), batch, map)
    assert sys.modules["quantus"].helpers.utils.np is np


def test_errors(monkeypatch):
    batch, map = samples(2)
    with pytest.raises(UserError, match=r"no metric 'PixelFliping'; did you mean 'PixelFlipping'\? \(it has: AUC, "):
        quantus_metric("PixelFliping")
    with pytest.raises(UserError, match=r"no parameter 'feature_in_step'; did you mean 'features_in_step'"):
        quantus_metric("PixelFlipping", {"feature_in_step": 3})
    with pytest.raises(UserError, match="return_aggregate is set by attrib"):
        quantus_metric("PixelFlipping", {"return_aggregate": True})
    for order in ("up", 5):
        with pytest.raises(UserError, match=rf"refuses \{{'order': {order!r}\}}"):
            quantus_metric("RegionPerturbation", {"order": order})
    with pytest.raises(UserError, match="must be names and values"):
        Quantus("Sparseness", 5)
    with pytest.raises(UserError, match="build it by"):
        Quantus("MaxSensitivity")
    with pytest.raises(UserError, match="needs a region of interest"):
        score(quantus_metric("AUC"), classifier(), Batch(batch.uids, batch.x, batch.target), map)
    with pytest.raises(UserError, match="images of one channel only; these have 3"):
        score(quantus_metric("ROAD"), classifier(), batch, map)
    with pytest.raises(UserError, match="not several labels"):
        score(quantus_metric("AUC"), classifier(), Batch(batch.uids, batch.x, torch.ones(2, 5)), map)
    with pytest.raises(ValueError, match="does not fit"):
        score(quantus_metric("AUC"), classifier(), batch, map[:, 1:])

    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda _: "0.5.3")
        with pytest.raises(UserError, match=r"knows quantus 0\.6, and 0\.5\.3"):
            quantus_metric("AUC")

    def missing(name: str, *args: Any) -> Any:
        raise ImportError("No module named 'quantus'")

    monkeypatch.setattr("attrib.metrics.quantus.importlib.import_module", missing)
    with pytest.raises(UserError, match="pip install quantus"):
        quantus_metric("AUC")


def test_attrib_does_not_import_quantus(monkeypatch):
    """It takes seconds, and is an extra."""
    monkeypatch.setitem(sys.modules, "quantus", None)  # an import fails
    made = runpy.run_path(adapter.__file__)
    with pytest.raises(made["UserError"], match="pip install quantus"):
        made["quantus_metric"]()
    sources = Path(adapter.__file__).parents[1].rglob("*.py")
    assert not [path for path in sources if re.search(r"^\s*(import|from) quantus\b", path.read_text(), re.MULTILINE)]


def test_yaml_and_key():
    node = {"_target_": "attrib.metrics.quantus_metric", "metric": "MaxSensitivity", "parameters": {"nr_samples": 3}}
    metric = build({**node, "softmax": None}, "here")
    assert isinstance(metric, ExplainingQuantus)
    other = build({**node, "parameters": {"nr_samples": 4}}, "here")
    assert keys.digest(metric) != keys.digest(other)
    assert keys.digest(metric) == keys.digest(quantus_metric("MaxSensitivity", {"nr_samples": 3}))
    with pytest.MonkeyPatch.context() as patch:  # another version's numbers are others
        patch.setattr(importlib.metadata, "version", lambda _: "0.6.99")
        assert keys.digest(quantus_metric("MaxSensitivity", {"nr_samples": 3})) != keys.digest(metric)
    turned = [dict(reversed(given)) for given in ([("nr_steps", 4), ("abs", True)], [("abs", True), ("nr_steps", 4)])]
    one, two = (keys.digest(quantus_metric("Continuity", given)) for given in turned)
    assert one == two  # in whatever order they are given
    again = pickle.loads(pickle.dumps(metric))
    assert again == metric
    assert keys.digest(again) == keys.digest(metric)
    with pytest.raises(UserError, match=r"^here: quantus has no metric 'Maxsensitivity'"):
        build({**node, "metric": "Maxsensitivity"}, "here")


def test_two_at_once_from_the_command_line(run):  # noqa: F811
    """One that asks for maps and has no curve, one of stored maps with a curve; other parameters are other scores."""
    given = ["metric=[quantus,quantus_2]", "metric.quantus.metric=MaxSensitivity", "run.limit=2"]
    given += ["+metric.quantus.parameters.nr_samples=1", "metric.quantus_2.metric=Selectivity"]
    result = run("method=gradient", *given)
    assert result.status == 0, result.err
    assert summary(result)["scores_computed"] == 4
    assert {key[-1] for key in scores(run.root)} == {"max_sensitivity", "selectivity"}
    again = summary(run("method=gradient", *given, "+metric.quantus_2.parameters.patch_size=4"))
    assert (again["scores_computed"], again["scores_present"]) == (2, 2)
