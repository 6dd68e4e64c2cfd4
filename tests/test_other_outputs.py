"""Nets that are no classifiers: values, regions of maps, similarities and next tokens, against slow references."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from contracts import method_contract, metric_contract
from PIL import Image
from tiny import command
from tiny import pictures as saved_pictures
from torch import Tensor, nn

from attrib.causal import CausalGraphs
from attrib.datasets import Selection
from attrib.experiment.cell import Experiment
from attrib.experiment.samples import Samples
from attrib.methods.acd import ACD
from attrib.methods.baselines import Gradient, GuidedBackprop, IntegratedGradients, Occlusion
from attrib.methods.cam import GradCAM
from attrib.methods.causal import CausalPaths
from attrib.methods.cd import CD
from attrib.methods.fisher import FunctionalInformation
from attrib.methods.iba import IBA
from attrib.methods.parts.losses import target_loss
from attrib.methods.readout import IBAReadout
from attrib.methods.sampled import Rise
from attrib.metrics import EHR, IROF, ROAD, Degradation, Infidelity, InsertionDeletion, SensitivityN
from attrib.models import Classifier, Output, log_probabilities, probabilities, torchvision_net
from attrib.models.exam import Exam
from attrib.models.output_kinds import NextToken, Similarity
from attrib.models.output_region import Region
from attrib.models.randomise import randomised
from attrib.models.split import GraphSplit
from attrib.models.variant import Randomise
from attrib.noise import Noise
from attrib.types import Batch, SampleError, UserError

SHAPE = (3, 8, 10)
VALUE = {"read": "value"}


def filled(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(Noise([name]).normal(*parameter.shape)[0])
    return net


class Values(nn.Module):
    """``count`` values; None: one, without a dimension of its own."""

    def __init__(self, count: int | None = None) -> None:
        super().__init__()
        self.conv, self.head, self.count = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, count or 1), count

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.conv(x).relu().mean((2, 3)))
        return y if self.count else y[:, 0]


class Segments(nn.Module):
    """A map of logits of half the size of the image."""

    def __init__(self, classes: int = 3, wrapped: bool = False) -> None:
        super().__init__()
        self.conv, self.head, self.wrapped = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, classes, 1), wrapped

    def forward(self, x: Tensor) -> Any:
        y = self.head(nn.functional.avg_pool2d(self.conv(x).relu(), 2))
        return {"out": y, "aux": 2 * y} if self.wrapped else y


def batch_of(n: int = 3, target: int = 0) -> Batch:
    uids = tuple(f"p{i}" for i in range(n))
    return Batch(uids, Noise(uids, dtype=torch.float64).normal(*SHAPE), torch.full((n,), target))


def model_of(net: nn.Module, output: Any, **more: Any) -> Classifier:
    layers = {"cam": "conv", "bottleneck": "conv"}
    return Classifier(filled(net), layers, dtype=torch.float64, output=output, **{"input_shape": SHAPE, **more})


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [None, 1, 3])
@pytest.mark.parametrize("shape", [SHAPE, None])
def test_values(count, shape):
    batch, model = batch_of(), model_of(Values(count), VALUE, input_shape=shape)
    net = filled(Values(count)).double()
    raw = net(batch.x).detach()
    assert torch.equal(model.logits(batch.x), raw.reshape(3, -1))
    x = batch.x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(net(x).reshape(3, -1)[:, 0].sum(), x)
    found = Gradient().attribute(model, batch, {}, Noise(batch.uids))["map"]
    torch.testing.assert_close(found, grad.sum(1))
    assert isinstance(model._split("cam", batch.x), GraphSplit)
    assert model.link is None


class Probable(Values):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


def test_probabilities_have_the_probabilities_that_they_are():
    batch, model = batch_of(), model_of(Probable(3), {"read": "probabilities"})
    found = probabilities(model.logits(batch.x), several=False, link=model.link)
    torch.testing.assert_close(found, filled(Probable(3)).double()(batch.x).detach())
    assert model.link == "softmax"
    assert model.key != model_of(Probable(3), {"read": "probabilities", "link": "sigmoid"}).key


class ProbableOne(Values):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


@pytest.mark.parametrize("count", [None, 1])
def test_one_probability_is_that_of_class_1(count):
    batch, logit = batch_of(), model_of(Values(count), {"read": "sigmoid"})
    model = model_of(ProbableOne(count), {"read": "sigmoid", "of": "probability"})
    torch.testing.assert_close(model.logits(batch.x), logit.logits(batch.x))
    assert model.key != logit.key
    with pytest.raises(UserError, match=r"returns probabilities.*\{read: sigmoid, of: probability\}"):
        model_of(ProbableOne(count), {"read": "sigmoid"})
    with pytest.raises(UserError, match="of must be logit or probability, not 'p'"):
        model_of(ProbableOne(count), {"read": "sigmoid", "of": "p"})


def test_what_is_no_probability_is_no_score():
    with pytest.raises(UserError, match="gives NaN for noise"):
        model_of(Values(3), {"read": "probabilities"})
    with pytest.raises(UserError, match="link must be softmax or sigmoid, not 'logit'"):
        model_of(Probable(3), {"read": "probabilities", "link": "logit"})


def two_values(rows: int, dtype: torch.dtype = torch.float64) -> Classifier:
    layers = {"cam": "conv", "bottleneck": "conv"}
    return Classifier(filled(Values(2)), layers, rows=rows, dtype=dtype, output=VALUE)


@pytest.mark.parametrize(
    "method",
    [Gradient(), IntegratedGradients(steps=3), Occlusion(window=4, stride=3), GradCAM(), CD(), GuidedBackprop()],
)
def test_methods_of_a_score_keep_their_contract_on_values(method):
    method_contract(method, two_values, batch_of(4, 1), {})


def test_insertion_and_deletion_of_a_value():
    """The first number of the deletion curve is the value of the image; a slow copy of the rest."""
    batch, model = batch_of(2), model_of(Values(), VALUE)
    map = batch.x.sum(1)
    metric = InsertionDeletion(steps=None, step=20, output="logit")
    found = metric.score(model, batch, map, Noise(batch.uids, dtype=torch.float64))
    net = filled(Values()).double()
    for i in range(2):
        order, x, curve = map[i].flatten().argsort(descending=True), batch.x[i].clone(), []
        for count in range(0, 81, 20):
            x.flatten(1)[:, order[:count]] = 0
            curve.append(net(x[None]).item())
        np.testing.assert_allclose(found["deletion_curve"][i].numpy(), curve, atol=1e-6)
    with pytest.raises(UserError, match=r"probabilities are asked for.*model\.output\.read"):
        InsertionDeletion(steps=2).score(model, batch, map, Noise(batch.uids, dtype=torch.float64))
    metric_contract(metric, two_values, batch_of(4, 1), map=batch_of(4).x.sum(1))


@pytest.mark.parametrize(
    ("give", "why"),
    [
        (lambda y: y[:, :, None], r"read=value wants values \(N,\) or \(N, K\).*a tensor \(1, 2, 1\)"),
        (lambda y: {"y": y}, r"read=value wants .*a dict"),
        (lambda y: y.long(), "read=value wants"),
    ],
)
def test_what_are_no_values(give, why):
    class Odd(Values):
        def forward(self, x: Tensor) -> Any:
            return give(super().forward(x))

    with pytest.raises(UserError, match=why):
        model_of(Odd(2), VALUE)


# ---- regions ------------------------------------------------------------------------------------

BOX = (1, 0, 4, 3)
INSIDE = np.zeros((4, 5), dtype=bool)
INSIDE[0:3, 1:4] = True


def mask_files(tmp_path) -> list[Any]:
    Image.fromarray((INSIDE * 255).astype(np.uint8)).save(tmp_path / "mask.png")
    np.save(tmp_path / "mask.npy", INSIDE.astype(np.float32))
    return [str(tmp_path / "mask.png"), str(tmp_path / "mask.npy"), torch.tensor(INSIDE), list(BOX)]


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_a_fixed_region(reduce, tmp_path):
    batch = batch_of(target=2)
    net = filled(Segments()).double()
    raw = net(batch.x).detach().numpy()
    expected = np.zeros((3, 3))
    for n in range(3):
        for k in range(3):
            values = [raw[n, k, y, x] for y in range(4) for x in range(5) if INSIDE[y, x]]
            expected[n, k] = sum(values) if reduce == "sum" else sum(values) / len(values)
    keys = set()
    for region in mask_files(tmp_path):
        output = {"read": "region", "region": region, "reduce": reduce}
        model = model_of(Segments(), output)
        np.testing.assert_allclose(model.logits(batch.x).numpy(), expected, rtol=1e-12)
        z, rest = model.until("cam", batch.x)
        assert isinstance(model._split("cam"), GraphSplit)
        np.testing.assert_allclose(model.after("cam", z, rest).numpy(), expected, rtol=1e-12)
        wrapped = model_of(Segments(wrapped=True), {"take": "out", **output})
        np.testing.assert_allclose(wrapped.logits(batch.x).numpy(), expected, rtol=1e-12)
        keys |= {model.key, wrapped.key}
    assert len(keys) == 4  # a mask counts by its content; a box has a key of its own
    found = CD().attribute(model, batch, {}, Noise(batch.uids))
    assert found["completeness_error"].max() < 1e-6


def test_a_segmentation_net_of_torchvision():
    net = torchvision_net("lraspp_mobilenet_v3_large", num_classes=4).eval()
    x = batch_of(2).x.float().repeat(1, 1, 8, 8)
    model = Classifier(
        net, output={"take": "out", "read": "region", "region": [8, 16, 40, 30]}, input_shape=x.shape[1:]
    )
    with torch.no_grad():
        expected = net(x)["out"][:, :, 16:30, 8:40].sum((2, 3))
    torch.testing.assert_close(model.logits(x), expected, rtol=1e-4, atol=1e-3)
    with pytest.raises(UserError, match=r"model\.output to the field of the logits: out"):
        Classifier(net, input_shape=x.shape[1:])


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "wants region"),
        ({"region": [0, 0, 6, 3]}, r"the box \[0, 0, 6, 3\] is not inside the map .* 4x5"),
        ({"region": [2, 0, 2, 3]}, "x1 < x2"),
        ({"region": [0, 0, 2.5, 3]}, "four whole numbers"),
        ({"region": torch.ones(8, 10)}, "the mask has 8x10 pixels.* 4x5"),
        ({"region": torch.zeros(4, 5)}, "has no pixel"),
        ({"region": torch.ones(1, 4, 5)}, r"not \(H, W\)"),
        ({"region": "nowhere.png"}, "nowhere.png cannot be read as a mask"),
        ({"region": list(BOX), "reduce": "max"}, "reduce must be sum or mean"),
        ({"regoin": list(BOX)}, r"no field 'regoin'.*region"),
    ],
)
def test_what_is_no_region(fields, why):
    with pytest.raises(UserError, match=why):
        model_of(Segments(), {"read": "region", **fields})


def test_a_mask_is_no_pickle(tmp_path):
    np.save(tmp_path / "mask.npy", np.array([[1, None]], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read as a mask"):
        Region(str(tmp_path / "mask.npy"))


class Memory:
    """A dataset in memory."""

    modality, names, key = "image", {}, "memory"

    def __init__(self, batch: Batch) -> None:
        self._batch, self.uids = batch, batch.uids

    def batch(self, uids) -> Batch:
        return self._batch[[self.uids.index(uid) for uid in uids]]

    def fingerprint(self, uid: str) -> str:
        return uid


def cell(model: Classifier, method: Any = None, **more: Any) -> Experiment:
    names = {"dataset": "d", "model": "m", "method": "some_method"}
    return Experiment(names, Memory(batch_of()), model, method or Gradient(), **more)  # type: ignore[arg-type]


PREDICTED = {"read": "region", "region": "predicted"}


@pytest.mark.parametrize("region", [torch.tensor(INSIDE), list(BOX), "predicted"])
def test_infinity_outside_of_a_region_does_not_matter(region):
    class Masked(Segments):
        def forward(self, x: Tensor) -> Any:
            never = ~torch.tensor(INSIDE) & torch.tensor([False, True, True])[:, None, None]
            return super().forward(x).masked_fill(never, -torch.inf)

    model, one = model_of(Masked(), {"read": "region", "region": region}), batch_of().x[:1]
    with model.explaining(one, torch.tensor([1])):
        scores, gradient = model.gradient(one, lambda out, rows: out[:, 1])
    assert scores.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_the_predicted_region_stays_that_of_the_sample(reduce):
    """Occlusion by hand: the pixels are those of the whole image, though the copies are predicted otherwise."""
    model, net = model_of(Segments(), {**PREDICTED, "reduce": reduce}), filled(Segments()).double()
    batch = batch_of(4)
    raw = net(batch.x).detach()
    batch = Batch(batch.uids, batch.x, raw.argmax(1)[:, 1, 2])  # classes that have pixels
    found = cell(model, Occlusion(window=2, stride=2)).explain(batch, {})["map"]
    changed = 0
    for i, k in enumerate(batch.target.tolist()):
        inside = raw[i].argmax(0) == k

        def score(image: Tensor, k: int = k, inside: Tensor = inside) -> float:
            values = net(image[None])[0, k][inside]
            return (values.sum() if reduce == "sum" else values.mean()).item()

        for y in range(0, 8, 2):
            for x in range(0, 10, 2):
                copy = batch.x[i].clone()
                copy[:, y : y + 2, x : x + 2] = 0
                fall = score(batch.x[i]) - score(copy)
                assert math.isclose(
                    found[i, y, x].item(), fall, rel_tol=1e-6, abs_tol=1e-6
                )  # captum's mean is of float32
                changed += int((net(copy[None])[0].argmax(0) != raw[i].argmax(0)).sum())
    assert changed > 20


def test_a_predicted_region_needs_its_sample():
    model, batch = model_of(Segments(), PREDICTED), batch_of()
    with pytest.raises(UserError, match="not known which"):
        model.logits(batch.x)
    with pytest.raises(UserError, match="not known which"):
        Gradient().attribute(model, batch, {}, Noise(batch.uids))
    with pytest.raises(ValueError, match="one at a time"), model.explaining(batch.x):
        pass
    with model.explaining(batch.x[:1]):
        whole = model.logits(batch.x[:1])
        with model.explaining(batch.x[1:2]):  # what is explained stays
            assert torch.equal(model.logits(batch.x[:1]), whole)
    with pytest.raises(UserError, match="not known which"):
        model.logits(batch.x[:1])


def test_a_class_without_pixels_fails_alone():
    class Two(Segments):
        """Never the last class."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) - 1e3 * torch.tensor([0.0, 0, 1]).to(x)[:, None, None]

    model = model_of(Two(), PREDICTED)
    with pytest.raises(SampleError, match="no pixel of this sample to class 2"):
        cell(model).explain(batch_of(1, 2), {})


@pytest.mark.parametrize("metric", [InsertionDeletion(steps=4, output="logit"), Infidelity(samples=5)])
@pytest.mark.parametrize("method", [Gradient(), GradCAM(), GuidedBackprop(), IntegratedGradients(steps=3)])
@pytest.mark.quick(but=["method2-metric0"])
def test_a_run_with_predicted_regions_is_that_of_single_samples(method, metric):
    model, batch = model_of(Segments(), PREDICTED), batch_of(3)
    first = filled(Segments()).double()(batch.x).argmax(1)[:, 0, 0]
    batch = Batch(batch.uids, batch.x, first)
    experiment = cell(model, method)
    maps = experiment.explain(batch, {})["map"]

    def score(some: Batch, rows: slice) -> dict[str, Tensor]:
        return metric.score(model, some, maps[rows], Noise(some.uids, dtype=torch.float64))

    scores = experiment.of_samples(batch, score)
    for i in (2, 0, 1):
        one = batch[[i]]
        torch.testing.assert_close(experiment.explain(one, {})["map"], maps[i : i + 1])
        with model.explaining(one.x):
            alone = score(one, slice(i, i + 1))
        for name, value in alone.items():
            torch.testing.assert_close(value, scores[name][i : i + 1])


def test_a_randomised_copy_has_the_regions_of_its_original():
    net = filled(Segments())
    model = Classifier(net, dtype=torch.float64, output=PREDICTED)
    copy, x = randomised(model, net, Randomise("all"), batch_of().x), batch_of().x[:1]
    with copy.explaining(x):
        found = copy.logits(x)
        torch.testing.assert_close(copy.graph(x)(x), found)
    raw, first = copy.module.head(nn.functional.avg_pool2d(copy.module.conv(x).relu(), 2)), net.double()(x).argmax(1)
    torch.testing.assert_close(found, torch.stack([(raw[0, k] * (first[0] == k)).sum() for k in range(3)])[None])


# ---- similarities -------------------------------------------------------------------------------


def test_similarities_with_given_embeddings():
    prompts = Noise(["prompts"]).normal(4, 5)[0]
    batch, net = batch_of(), filled(Values(5)).double()
    for link, count in (("softmax", 4), ("sigmoid", 1)):
        output = Output(read=Similarity(prompts[:count], scale=7.0, bias=-2.0, link=link))
        model = model_of(Values(5), output)
        image = net(batch.x).detach()
        expected = torch.zeros(3, count, dtype=torch.float64)
        for n in range(3):
            for k in range(count):
                text = prompts[k].double()
                expected[n, k] = 7 * (image[n] @ text) / (image[n].norm() * text.norm()) - 2
        torch.testing.assert_close(model.logits(batch.x), expected)
        assert model.link == link
        p = expected.softmax(1) if link == "softmax" else 1 / (1 + (-expected).exp())
        torch.testing.assert_close(probabilities(expected, link=link), p)
        torch.testing.assert_close(log_probabilities(expected, link=link), p.log())
        torch.testing.assert_close(target_loss(expected, batch.target, link), -p[:, 0].log())
        found = InsertionDeletion(steps=2).score(model, batch, batch.x.sum(1), Noise(batch.uids, dtype=torch.float64))
        torch.testing.assert_close(found["deletion_curve"][:, 0], p[:, 0])


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "wants prompts"),
        ({"prompts": "a cat"}, "a list of texts"),
        ({"prompts": []}, "prompts"),
        ({"prompts": ["a", "a"]}, "'a' twice"),
        ({"prompts": ["a", "b"]}, "cannot embed texts"),
        ({"prompts": torch.ones(1, 5), "scale": 1.0}, "one prompt alone"),
        ({"prompts": torch.ones(2, 5)}, "model.output.scale"),
        ({"prompts": torch.ones(2, 4), "scale": 1.0}, "embeddings of 5 numbers, those of the prompts have 4"),
        ({"prompts": torch.ones(2, 5), "names": ["a"]}, "names must be a list of 2"),
    ],
)
def test_what_are_no_prompts(fields, why):
    with pytest.raises(UserError, match=why):
        model_of(Values(5), {"read": "similarity", **fields})


# ---- next tokens --------------------------------------------------------------------------------


class Tokens(nn.Module):
    """A decoder without attention: each token sees the mean of those before it."""

    pad_id, mask_id = 0, 1

    def __init__(self, size: int = 9) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(size, 6), nn.Linear(6, size)

    def forward(self, x: Tensor) -> Tensor:
        z = self.embed(x).cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return self.head(z.tanh())

    def token_ids(self, words):
        return [["", "", "good", "bad", "so"].index(word) for word in words]


TEXTS = torch.tensor([[3, 4, 5, 2, 0, 0], [8, 7, 6, 5, 4, 3], [2, 0, 5, 0, 0, 0]])  # the last one has a 0 inside


@pytest.mark.parametrize("candidates", [None, [7, 2], ["bad", "good", 8]])
def test_the_next_token(candidates):
    model = Classifier(
        filled(Tokens()),
        {"embedding": "embed"},
        dtype=torch.float64,
        output={"read": "next_token", "candidates": candidates},
    )
    net, ids = filled(Tokens()).double(), {None: range(9), "bad": 3, "good": 2}
    chosen = list(range(9)) if candidates is None else [ids.get(c, c) if isinstance(c, str) else c for c in candidates]
    for row, length in zip(range(3), (4, 6, 3)):
        alone = net(TEXTS[row : row + 1, :length])[0, -1, chosen]
        torch.testing.assert_close(model.logits(TEXTS)[row], alone.detach())
    assert model.link == "softmax"
    assert model.class_names == (None if candidates is None else tuple(map(str, candidates)))
    z, rest = model.until("embedding", TEXTS)
    torch.testing.assert_close(model.after("embedding", z, rest), model.logits(TEXTS))


def test_a_text_that_ends_with_the_id_of_padding_fails_alone():
    """The net would take its end for padding, and the next token would be another one's."""
    batch = Batch(("a", "b"), TEXTS[:2], torch.zeros(2, dtype=torch.long), lengths=torch.tensor([5, 6]))
    model = Classifier(filled(Tokens()), output={"read": "next_token"})
    samples = Samples(Memory(batch), model, batch.uids, target="predicted")
    with pytest.raises(SampleError, match=r"a ends with the id of padding, 0, so .* that of 1 before"):
        samples.batch(["a"])
    assert samples.batch(["b"]).target.tolist() == model.logits(TEXTS[1:2]).argmax(1).tolist()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"candidates": [3]}, "two tokens or more"),
        ({"candidates": "good"}, "two tokens or more"),
        ({"candidates": [3, -1]}, "two tokens or more"),
        ({"candidates": [3, "bad"]}, "3 twice"),
        ({"candidates": [3, 9]}, "no token 9, the net knows 9"),
    ],
)
def test_what_are_no_candidates(fields, why):
    with pytest.raises(UserError, match=why):
        Classifier(filled(Tokens()), output={"read": "next_token", **fields}).logits(TEXTS)


def test_the_end_of_a_text_must_be_known():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = filled(Tokens())

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    with pytest.raises(UserError, match="has no pad_id"):
        Classifier(Plain(), output={"read": "next_token"})
    with pytest.raises(UserError, match="no tokenizer"):
        Classifier(Plain(), output={"read": "next_token", "pad_id": 0, "candidates": ["good", "bad"]})
    model = Classifier(Plain(), output=Output(read=NextToken(pad_id=0)))
    torch.testing.assert_close(model.logits(TEXTS)[0], model.logits(TEXTS[:1, :4])[0])
    with pytest.raises(UserError, match="read: next_token"):
        Classifier(Plain()).logits(TEXTS)


# ---- what is refused, and by which name ----------------------------------------------------------

REFUSED = [
    IBA(), IBAReadout(), FunctionalInformation(), Rise(), CausalPaths(graph=CausalGraphs()),
    CD(score="occlusion", output="probability"), ACD(against="other"),
]  # fmt: skip


@pytest.mark.parametrize("method", REFUSED, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("output", [VALUE, {"read": "region", "region": list(BOX)}, PREDICTED])
def test_methods_that_need_probabilities_are_refused(method, output):
    model = model_of(Values(2) if output is VALUE else Segments(), output)
    with pytest.raises(UserError, match=f"method some_method .*read={output['read']} there are none.*integrated_grad"):
        cell(model, method)


@pytest.mark.parametrize(
    "metric", [IROF(), ROAD(), InsertionDeletion(), Degradation(), Infidelity(output="probability")]
)
def test_metrics_that_need_probabilities_are_refused(metric):
    model = model_of(Values(2), VALUE)
    with pytest.raises(UserError, match=r"metric some .*read=value there are none.*take metric=\[ehr\]") as error:
        cell(model, metrics={"some": metric, "ehr": EHR()})
    assert ("metric.some.output=logit" in str(error.value)) == hasattr(metric, "output")


def test_what_does_without_probabilities_is_taken():
    model = model_of(Values(2), VALUE)
    methods = [FunctionalInformation(activation="none"), Rise(output="logit"), CD(), ACD(), GradCAM()]
    for method in methods:
        cell(model, method, metrics={"i": InsertionDeletion(output="logit"), "s": SensitivityN(), "e": EHR()})
    classes = Classifier(filled(Values(2)), {"cam": "conv"})
    for method in REFUSED:
        cell(classes, method)


@pytest.mark.parametrize("output", [VALUE, PREDICTED])
def test_what_is_explained_must_be_said(output):
    model = model_of(Values(2) if output is VALUE else Segments(), output)
    with pytest.raises(UserError, match=r"dataset\.target=predicted.*decides for no class.*dataset\.target=0"):
        cell(model, target="predicted")
    for rules in ({"select": Selection(min_confidence=0.5)}, {"estimation_select": Selection(min_confidence=0.5)}):
        with pytest.raises(UserError, match=r"select\.min_confidence.*there are none"):
            cell(model, **rules)
    cell(model, target=1)


def test_one_output_of_all():
    batch, model = batch_of(target=-1), model_of(Values(2), VALUE)
    samples = Samples(Memory(batch), model, batch.uids, target=1)  # type: ignore[arg-type]
    assert samples.batch(batch.uids).target.tolist() == [1, 1, 1]
    with pytest.raises(UserError, match=r"dataset\.target=2, but the model's outputs are 0 to 1"):
        Samples(Memory(batch), model, batch.uids, target=2).batch(batch.uids)  # type: ignore[arg-type]
    with pytest.raises(SampleError, match="p0 has no label; explain one output of all"):
        Samples(Memory(batch), model, batch.uids).batch(batch.uids)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"dataset\.target"):
        Samples(Memory(batch), model, batch.uids, target=True)  # type: ignore[arg-type]


def test_scores_without_probabilities():
    logits = torch.zeros(2, 3)
    for ask in (probabilities, log_probabilities):
        with pytest.raises(UserError, match="probabilities are asked for"):
            ask(logits, link=None)
        with pytest.raises(UserError, match="probabilities are asked for"):
            ask(logits, several=True, link=None)


def test_keys_tell_kinds_apart():
    def key(output: Any, net: Callable[[], nn.Module] = Segments) -> str:
        return Classifier(filled(net()), output=output).key

    region = {"read": "region"}
    outputs = [
        {**region, "region": r, "reduce": how} for r in (BOX, (0, 0, 4, 3), "predicted") for how in ("sum", "mean")
    ]
    assert len({key(output) for output in outputs}) == len(outputs)
    assert key(outputs[0]) == key({**outputs[0], "region": list(BOX)})
    tokens = [{"read": "next_token", "candidates": c} for c in (None, [1, 2], [2, 1], ["good", 1])]
    assert len({key(output, Tokens) for output in tokens}) == len(tokens)


# ---- a whole run --------------------------------------------------------------------------------


def test_a_run_from_the_command_line(tmp_path, capfd):
    """Regions of a map: the scores are stored, the exam of two samples and the output stand in spec.json."""
    images, attrib = saved_pictures(tmp_path, 4), command(capfd)
    common = [
        "dataset=image_folder", f"dataset.root={images}", f"dataset.labels={tmp_path / 'labels.csv'}",
        "model=other_output", f"run.root={tmp_path / 'out'}", "run.device=cpu", "run.progress=false",
    ]  # fmt: skip
    segments = ["model._target_=test_other_outputs.Segments", "model.output={read: region, region: [0, 0, 3, 3]}"]
    result = attrib(*common, *segments, "method=gradient", "metric=[insertion_deletion]", "dataset.target=2")
    assert result.status == 2
    assert "metric.insertion_deletion.output=logit" in result.err
    assert not (tmp_path / "out").exists()
    result = attrib(
        *common, *segments, "method=gradient", "metric=[insertion_deletion]", "metric.insertion_deletion.output=logit",
        "dataset.target=2",
    )  # fmt: skip
    assert result.status == 0, result.err
    (spec,) = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/spec.json"))
    assert spec["exam"]["on"] == "samples"
    assert spec["output"] == {"read": "region", "probabilities": None, "class_names": None}
    (summary,) = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/runs/*/summary.json"))
    assert Exam(**summary["exam"]).on == "samples"
    result = attrib(*common, *segments, "method=iba", "metric=[]", "dataset.target=2")
    assert result.status == 2
    assert "method iba works with the probabilities of classes" in result.err
    result = attrib(*common, *segments, "method=gradient", "metric=[]", "dataset.select.min_confidence=0.5")
    assert "min_confidence" in result.err
    predicted = [*segments[:1], "model.output={read: region, region: predicted}", "method=rise",
        "method.output=logit", "method.samples=4", "metric=[]"]  # fmt: skip
    results = [attrib(*common, *predicted, f"dataset.target={k}") for k in range(3)]  # a class may have no pixel
    computed = [re.search(r"maps_computed=(\d)", result.out) for result in results]
    assert sum(int(found[1]) for found in computed if found) >= 4, results
    assert "dataset.target=predicted" in attrib(*common, *predicted, "dataset.target=predicted").err
