"""Functional information: parity with the released code, draws, stopping, labels, fields."""

from __future__ import annotations

import math

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contracts import close, fit_contract, method_contract, seeded
from fisher_nets import Conv, Linear, conv, inputs
from torch import Tensor, nn

from attrib.config.objects import build
from attrib.methods.fisher import ABOUT, FunctionalInformation
from attrib.methods.parts.covariance import Covariance
from attrib.methods.parts.inputs import Inputs
from attrib.methods.parts.perturbed import Mean, Outputs, Perturbations, gradients
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError
from attrib.units import Partition

PLAIN = ("functional_information", "smooth_grad", "smooth_grad_sq", "var_grad")
WITH_COVARIANCE = ("covariance_functional_information", "covariance_gradients")


# ---- parity with the released code ------------------------------------------------------------------


class SoftplusNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.f = nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(F.softplus(self.c2(F.softplus(self.c1(x)))).flatten(1))


class Stored:
    """The noise of a file in the place of a sample's stream: one draw per perturbation."""

    def __init__(self, draws: np.ndarray) -> None:
        self.draws = iter(torch.tensor(draws).double())

    def normal(self, *shape: int, ragged: int | None = None) -> Tensor:
        return next(self.draws).reshape(1, *shape)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return nets.golden("fisher_cnn")


@pytest.fixture(scope="module")
def released(golden):
    """(measures, covariance, state, fields) -> what the method gives for the golden image and noise."""
    net = SoftplusNet()
    net.load_state_dict({k[3:]: torch.tensor(v) for k, v in golden.items() if k.startswith("sd.")})
    model = Classifier(net, dtype=torch.float64)
    image = torch.tensor(golden["x"]).double()[None]

    def explain(measures, covariance=None, state=None, **fields):
        covariance = covariance or Covariance()
        target = torch.tensor([fields.pop("label", int(golden["label"]))])
        fields = {"channels": "summed", "samples": 6} | fields
        method = FunctionalInformation(measures=tuple(measures), covariance=covariance, **fields)
        return method.attribute(model, Batch(("a",), image, target), state or {}, Stored(golden["noise"]))

    explain.model, explain.image = model, image
    return explain


def agree(found: Tensor, expected: np.ndarray, rel: float = 1e-5) -> None:
    expected = torch.tensor(expected).double()
    assert (found - expected).abs().max() <= rel * expected.abs().max()


def test_parity_without_covariance(golden, released):
    found = released(PLAIN)
    for name in PLAIN:
        key = f"none_{name}" + ("__corrected_var_of_grads" if name == "var_grad" else "")
        agree(found[name][0], golden[key])
    agree(released(("var_grad",), as_released=True)["var_grad"][0], golden["none_var_grad"])
    found = released(PLAIN, Covariance("sample_channels"))
    for name in PLAIN:
        agree(found[name][0], golden[f"perchannel_{name}__corrected"])
    found = released(WITH_COVARIANCE)
    for name in WITH_COVARIANCE:
        agree(found[name][0], golden[f"none_{name}__corrected"])


@pytest.mark.parametrize(
    ("kind", "key", "suffix"),
    [
        ("scalar", "scalar", ""), ("channels", "vector", "__corrected"),
        ("matrix", "matrix", ""), ("matrix", "chol", "__corrected"), ("stack", "stack", ""),
    ],
)  # fmt: skip
def test_parity_with_covariance(golden, released, kind, key, suffix):
    covariance = Covariance(kind, jitter=0.0)
    state = covariance.given(torch.tensor(golden[f"cov_{'matrix' if key == 'chol' else key}"]))
    before = {name: value.clone() for name, value in state.items()}
    for _ in range(2):  # the released code shrinks the factor that it is given at every draw
        found = released(WITH_COVARIANCE, covariance, state)
        for name in WITH_COVARIANCE:
            agree(found[name][0], golden[f"{key}_{name}{suffix}"])
    close(state, before, 0)


@pytest.mark.parametrize("key", ["none", "scalar", "matrix", "stack"])
def test_parity_of_the_perturbed_inputs(golden, released, key):
    covariance = Covariance() if key == "none" else Covariance(key, jitter=0.0)
    state = {} if key == "none" else covariance.given(torch.tensor(golden[f"cov_{key}"]))
    batch = Batch(("a",), released.image, torch.zeros(1, dtype=torch.long))
    inputs, outputs = Inputs.of(released.model, batch), Outputs("softmax", batch.target, torch.empty(1, 0).long())
    spread = covariance.of(batch, inputs, state)
    source = Perturbations(released.model, inputs, outputs, spread, 0.15, Stored(golden["noise"]))
    agree(source.noisy(torch.tensor([0]), 6)[0], golden[f"{key}_perturbed"])


def test_parity_of_labels_and_activations(golden, released):
    found = released(("functional_information", "smooth_grad"), labels=(0, 1))
    for name in ("functional_information", "smooth_grad"):
        agree(found[f"{name}_by_label"][0].movedim(-1, 0), golden[f"labels01_{name}"])
    covariance = Covariance("matrix", jitter=0.0)
    state = covariance.given(torch.tensor(golden["cov_matrix"]))
    name = "covariance_functional_information"
    found = released((name,), covariance, state, labels=(0, 1))
    agree(found[f"{name}_by_label"][0].movedim(-1, 0), golden[f"labels01_{name}_matrix"])
    found = released(("functional_information",), activation="none", as_released=True)
    agree(found["functional_information"][0], golden["logits_functional_information"])
    best = int(released.model.logits(released.image).argmax())  # of the input itself, not of every noisy copy
    found = released(("smooth_grad",), var_spread=4.0, label=best)
    agree(found["smooth_grad"][0], golden["labelnone_vs4_smooth_grad__corrected"])


def test_a_place_has_the_sum_of_its_channels(golden, released):
    """The released code has this for audio only, channel by channel."""
    found = released(("functional_information",), channels="each")
    agree(found["functional_information"][0], golden["audio_functional_information"].sum(0))
    covariance = Covariance("matrix", jitter=0.0)
    state = covariance.given(torch.tensor(golden["cov_matrix"]))
    name = "covariance_functional_information"
    found = released((name,), covariance, state, channels="each")
    agree(found[name][0], golden[f"audio_{name}_matrix"].sum(0))


# ---- draws, stopping, labels ------------------------------------------------------------------------------


class Uneven(Conv):
    """A steep function of inputs whose first number is positive, a nearly linear one of the others."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (0.05 + 3 * (x.flatten(1)[:, :1] > 0)).to(x.dtype)


def test_a_sample_stops_when_its_maps_are_known_well_enough():
    batch = inputs(5)
    method = FunctionalInformation(("functional_information", "smooth_grad"), 60, tolerance=0.12)
    build_model = lambda rows, dtype=torch.float64: Classifier(seeded(Uneven()), rows=rows, dtype=dtype)  # noqa: E731
    maps = method_contract(method, build_model, batch, {})
    assert maps["draws"].unique().numel() > 1
    assert maps["draws"].min() >= 10
    for i in range(5):
        error = torch.stack([maps["error_functional_information"], maps["error_smooth_grad"]])[:, i].amax(0)
        done = (error <= 0.12).nonzero()
        expected = method.counts[int(done[0])] if len(done) else 60
        assert maps["draws"][i] == expected
        # Frozen: the map is that of so many draws.
        alone = FunctionalInformation(method.measures, expected)
        found = alone.attribute(build_model(64), batch[[i]], {}, Noise([batch.uids[i]], 3, dtype=torch.float64))
        torch.testing.assert_close(found["smooth_grad"][0], maps["smooth_grad"][i])
        torch.testing.assert_close(found["stderr_smooth_grad"][0], maps["stderr_smooth_grad"][i])


@pytest.mark.parametrize(("samples", "expected"), [(3, [3]), (10, [10]), (12, [10, 11, 12])])
def test_points_of_the_curves(samples, expected):
    assert FunctionalInformation(samples=samples).counts == expected
    counts = FunctionalInformation(samples=1000).counts
    assert (len(counts), counts[0], counts[-1]) == (20, 10, 1000)


@pytest.mark.parametrize("measure", ABOUT)
def test_labels_reductions_and_activations_keep_the_contract(measure):
    batch = inputs(3)
    build_model = lambda rows, dtype: Classifier(seeded(Conv()), rows=rows, dtype=dtype)  # noqa: E731
    for fields in (
        {"labels": "all", "reduce": "abs_sum", "activation": "log_softmax"},
        {"labels": 2, "reduce": "abs_max", "channels": "each"},
        {"labels": (3, 1), "as_released": True, "covariance": Covariance("sample_channels")},
    ):
        method = FunctionalInformation((measure,), 4, **fields)
        maps = method_contract(method, build_model, batch, {})
        labels, by_label = maps["labels"].long(), maps[f"{measure}_by_label"]
        for i, target in enumerate(batch.target.tolist()):
            for k in (labels[i] == target).nonzero()[:, 0].tolist():
                torch.testing.assert_close(by_label[i, ..., k], maps[measure][i])
    assert (f"stderr_{measure}", f"{measure}_by_label") == method.TOKENS


def test_reductions_of_channels():
    batch, model = inputs(2), conv()

    def explain(reduce):
        method = FunctionalInformation(("smooth_grad",), 5, reduce=reduce)
        return method.attribute(model, batch, {}, Noise(batch.uids, dtype=torch.float64))

    total = torch.zeros_like(batch.x)
    source = Noise(batch.uids, dtype=torch.float64)
    std = (0.15 * batch.x.flatten(1).var(1)).sqrt().view(-1, 1, 1, 1)
    for _ in range(5):
        x = (batch.x + std * source.normal(3, 4, 5)).requires_grad_()
        f = model.module(x).softmax(1).gather(1, batch.target[:, None]).sum()
        total += torch.autograd.grad(f, x)[0] / 5
    torch.testing.assert_close(explain("sum")["smooth_grad"], total.sum(1))
    torch.testing.assert_close(explain("abs_sum")["smooth_grad"], total.abs().sum(1))
    torch.testing.assert_close(explain("abs_max")["smooth_grad"], total.abs().amax(1))
    exact, bound = (explain(how)["stderr_smooth_grad"] for how in ("sum", "abs_sum"))
    assert (bound >= exact * (1 - 1e-9)).all()  # a sum's standard error is at most the sum of theirs


@pytest.mark.parametrize("batched", [True, False])
def test_gradients_of_several_labels_are_those_of_each(batched):
    batch, model = inputs(7), conv(rows=6)
    values, grad = gradients(
        model, model.module, batch.x, (), lambda out, rows: out[:, :3] * (1 + rows.start * 0), 3, together=batched
    )
    for k in range(3):
        one, each = model.gradient(batch.x, lambda out, rows, k=k: out[:, k])
        torch.testing.assert_close(values[:, k], one, rtol=0, atol=1e-14)
        torch.testing.assert_close(grad[:, k], each, rtol=0, atol=1e-14)


def test_more_labels_than_rows_go_backward_in_several_passes(monkeypatch):
    """1000 classes of a large net must not take the memory of 1000 rows."""
    batch, model = inputs(3), conv(rows=3)
    sizes, grad = [], torch.autograd.grad

    def counted(outputs, inputs, grad_outputs=None, **options):
        sizes.append(len(grad_outputs))
        return grad(outputs, inputs, grad_outputs, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    _, found = gradients(model, model.module, batch.x, (), lambda out, rows: out, 4)
    monkeypatch.undo()
    assert sizes == [3, 1] * 3
    for k in range(4):
        each = model.gradient(batch.x, lambda out, rows, k=k: out[:, k])[1]
        torch.testing.assert_close(found[:, k], each, rtol=0, atol=1e-14)


def test_several_positive_labels_are_summed():
    batch, model = inputs(2), conv()
    many = Batch(batch.uids, batch.x, torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]]))
    for activation, f in (
        ("softmax", lambda out, t: (out.softmax(1) * t).sum()), ("none", lambda out, t: (out * t).sum()),
        ("log_softmax", lambda out, t: (out.log_softmax(1) * t).sum()),
    ):  # fmt: skip
        method = FunctionalInformation(("smooth_grad",), 3, var_spread=1e-20, activation=activation)
        found = method.attribute(model, many, {}, Noise(batch.uids, dtype=torch.float64))["smooth_grad"]
        x = batch.x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(f(model.module(x), many.target), x)
        torch.testing.assert_close(found, grad.sum(1), rtol=1e-6, atol=1e-9)


def test_small_and_certain_probabilities_have_finite_information():
    """Probabilities of 1e-60 and of 1 - 1e-60, in float32."""
    for shift, activation in ((140.0, "softmax"), (-140.0, "softmax"), (140.0, "log_softmax"), (-140.0, "log_softmax")):
        net = Linear(torch.full((60,), 0.1))
        batch = Batch(
            ("a",), torch.full((1, 3, 4, 5), -shift / 6) + torch.arange(60).view(1, 3, 4, 5) / 60, torch.tensor([0])
        )
        method = FunctionalInformation(("functional_information", "smooth_grad"), 3, activation=activation)
        found = method.attribute(Classifier(net), batch, {}, Noise(batch.uids))
        assert all(value.isfinite().all() for value in found.values()), (shift, activation)
        assert (found["functional_information"] >= 0).all()


def test_streaming_means_are_means():
    r = torch.tensor(np.random.RandomState(0).randn(3, 11, 2)) + 1e6
    mean = Mean((3, 2), r)
    at = torch.arange(3)
    for piece in (r[:, :1], r[:, 1:1], r[:, 1:8], r[:, 8:]):
        mean.add(at, piece)
    torch.testing.assert_close(mean.mean, r.mean(1))
    torch.testing.assert_close(mean.error, r.std(1) / 11**0.5, rtol=1e-7, atol=0)
    mean.add(at[1:2], r[1:2])
    assert mean.n.tolist() == [11, 22, 11]


def test_memory_does_not_grow_with_the_draws():
    """No tensor is larger than the rows that the model allows, whatever the number of draws."""
    batch, model, sizes = inputs(2), conv(rows=4), []
    gradient = model.gradient
    model.gradient = lambda z, *rest: sizes.append(len(z)) or gradient(z, *rest)
    FunctionalInformation(samples=40).attribute(model, batch, {}, Noise(batch.uids, dtype=torch.float64))
    assert max(sizes) <= 4
    assert sum(sizes) == 80


# ---- configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("measures", (), "measures is ()"), ("measures", ("smooth_grad",) * 2, "without repetition"),
        ("measures", ("smothgrad",), "functional_information, cov"), ("samples", 1, "at least 2"),
        ("var_spread", 0.0, "above 0"), ("var_spread", math.nan, "above 0"), ("tolerance", 0.0, "above 0, or null"),
        ("activation", "relu", "softmax, log_softmax, none"), ("channels", "all", "each, summed"),
        ("reduce", "max", "sum, abs_sum, abs_max"), ("levels", 0, "at least 1"), ("labels", 0, "a number of labels"),
        ("labels", (), "a list of labels"), ("labels", (1, -1), "a list of labels"), ("labels", "some", "target, all"),
        ("labels", (1.5,), "a list of labels"), ("labels", True, "a number of labels"),
    ],
)  # fmt: skip
def test_bad_fields(field, value, message):
    with pytest.raises(UserError) as error:
        FunctionalInformation(**{field: value})
    assert message in str(error.value)
    assert field in str(error.value)


def test_labels_that_the_net_does_not_have():
    batch = inputs(2)
    for labels, message in ((5, "has 4 classes"), ((1, 4), "no class 4")):
        with pytest.raises(UserError, match=message):
            FunctionalInformation(labels=labels).attribute(conv(), batch, {}, Noise(batch.uids))


def test_a_list_of_measures_from_a_config():
    node = {"_target_": "attrib.methods.fisher.FunctionalInformation", "measures": ["var_grad", "smooth_grad"]}
    method = build({**node, "labels": [0, 2]}, "x")
    assert method.measures == ("var_grad", "smooth_grad")
    assert list(method.MAPS) == ["var_grad", "smooth_grad"]
    assert (method.labels, build({**node, "labels": 2}, "x").labels) == ((0, 2), 2)
    assert build({**node, "labels": "all"}, "x").labels == "all"
    assert method.fit is None


@pytest.mark.parametrize("kind", ["auto", "stack", "sample_channels"])
def test_the_contract_on_sounds(kind):
    def build_model(rows: int, dtype: torch.dtype) -> Classifier:
        return Classifier(seeded(Conv(1)), rows=rows, dtype=dtype)

    method = FunctionalInformation(tuple(ABOUT), 4, covariance=Covariance(kind), units=Partition(segments=4), levels=2)
    state = fit_contract(method.fit, build_model, inputs(12, (3, 9), seed=1)) if method.fit else {}
    method_contract(method, build_model, inputs(4, (3, 9)), state)
