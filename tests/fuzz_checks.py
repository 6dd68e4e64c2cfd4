"""Every method on a generated net: right by its own check, refused, or wrong.

A refusal is a UserError or SampleError. Anything else that is raised, a map that its reference does not give, a batch
that is not its samples one by one, a net, an input or a global random state that is left changed: all that is wrong.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import captum.attr
import fuzz_references as references
import numpy as np
import torch
from contracts import FitSamples, PartialInMemory, untouched
from fuzz_references import noise_of
from generated_nets import Choices, Generated, generate
from torch import Tensor

from attrib.causal import CausalGraphs
from attrib.causal.structure import Structure
from attrib.methods import baselines, cam, sampled
from attrib.methods.attention import Attention
from attrib.methods.captum import Captum
from attrib.methods.causal import CausalPaths, graphs_of
from attrib.methods.cd import CD
from attrib.methods.fisher import FunctionalInformation
from attrib.methods.guided_grad_cam import GuidedGradCAM
from attrib.methods.iba import IBA
from attrib.methods.lrp import LRP
from attrib.methods.parts.covariance import Covariance
from attrib.methods.parts.layout import resize
from attrib.models import Classifier
from attrib.models.calls import operation
from attrib.relevance.plan import Plan
from attrib.types import Batch, SampleError, UserError
from attrib.units import Partition

SAMPLES, KNOWN_SAMPLES = 3, 8  # that are explained; of the estimation set
TIGHT = 1e-9  # of what is computed in another order, relative to the largest number
LEAST = 1e-4  # a largest number below this is rounding: behind a LayerNorm a mean is always zero
SINGLE = 1e-6  # of what captum counts or weighs in single precision


class WrongError(AssertionError):
    """``kind`` is the same for all nets; ``detail`` is of this one."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


Outcome = Literal["right", "due", "refused", "wrong"]  # due: refused, as it must be, or not to be judged

UNSTEADY = "the net's own gradient changes with rounding"


@dataclass(frozen=True)
class Verdict:
    seed: int
    method: str
    outcome: Outcome
    kind: str = ""  # why, without what is this net's own
    text: str = ""  # the whole message


class Case:
    """A generated net, with samples and layers to explain it by."""

    def __init__(self, given: Generated) -> None:
        self.given, choices = given, Choices(given.seed + 2**32)
        uids = tuple(f"{given.seed}/{i}" for i in range(SAMPLES))
        targets = torch.tensor([choices.integer(0, given.classes - 1) for _ in uids])
        self.batch = Batch(uids, choices.normal(SAMPLES, *given.shape), targets)
        others = tuple(f"fit/{given.seed}/{i}" for i in range(KNOWN_SAMPLES))
        self.target = choices.integer(0, given.classes - 1)  # of the estimation set
        self.estimation = Batch(
            others, choices.normal(len(others), *given.shape), torch.full((len(others),), self.target)
        )
        places, again = given.program.places, sorted(given.program.again)
        self.cam = choices.one([*places, *again])
        self.bottleneck = choices.one(list(places))
        convolutions = [p for p in places if p.startswith("conv")]
        self.layers = {"cam": self.cam, "bottleneck": self.bottleneck, "conv": choices.one(convolutions)}

    @property
    def net(self) -> torch.nn.Module:
        """The net itself, which no method sees."""
        return self.given.net

    def classifier(self, rows: int = 64) -> Classifier:
        """Raises UserError for a net that is not admitted."""
        return Classifier(
            copy.deepcopy(self.net), self.layers, rows=rows, dtype=torch.float64, input_shape=self.given.shape
        )

    @cached_property
    def classifiers(self) -> tuple[Classifier, Classifier]:
        """One that takes all rows at once, and one that takes two at a time."""
        return self.classifier(), self.classifier(2)

    @cached_property
    def steady(self) -> bool:
        """Whether the net's own gradient is the same for a batch and for its samples, but for rounding."""
        x, target = self.batch.x, self.batch.target
        whole = references.gradient(self.net, x, target)
        singles = [references.gradient(self.net, x[[i]], target[[i]]) for i in range(SAMPLES)]
        return bool((torch.cat(singles) - whole).abs().max() <= TIGHT * max(LEAST, float(whole.abs().max())))

    def has(self, feature: str) -> bool:
        return feature in self.given.program.features

    def explain(
        self, method: Any, batch: Batch | None = None, state: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """All samples, after seeing that one by one they get the same, and that nothing is left changed."""
        batch, state = batch or self.batch, dict(state or {})
        model, small = self.classifiers
        before = (torch.get_rng_state(), np.random.get_state()[1].copy())
        with untouched(model, batch, state):
            maps = dict(method.attribute(model, batch, state, noise_of(batch.uids)))
        if not torch.equal(before[0], torch.get_rng_state()) or (before[1] != np.random.get_state()[1]).any():
            raise WrongError("draws from a global random state")
        parts = []
        for i in range(len(batch)):
            one = batch[[i]]
            parts.append(dict(method.attribute(small, one, state, noise_of(one.uids))))
        largest = max(float(maps[name].abs().max()) for name in method.MAPS)
        for name, value in maps.items():
            expected = torch.cat([part[name] for part in parts])
            if not value.isfinite().all():
                raise WrongError("numbers that are not finite", name)
            if largest < LEAST and name not in method.MAPS:
                continue  # the relative error of rounding, say
            scale = max(largest, float(value.abs().max()))
            same(value, expected, "a batch is not its samples one by one", scale, name)
        for name in method.MAPS:
            if maps[name].shape != (len(batch), *batch.x.shape[2:]):
                raise WrongError("a map of another shape than the image's", f"{name}: {tuple(maps[name].shape)}")
        return maps

    def fitted(self, method: Any) -> dict[str, Tensor]:
        data, model = FitSamples(self.estimation, 4), self.classifiers[0]
        return dict(method.fit.run(model, data, PartialInMemory(), lambda line: None))


def same(
    found: Tensor, expected: Tensor, kind: str, scale: float | None = None, what: str = "", atol: float = TIGHT
) -> None:
    if found.shape != expected.shape:
        raise WrongError(kind, f"{what} {tuple(found.shape)} instead of {tuple(expected.shape)}")
    scale = max(scale or float(expected.abs().max()), LEAST)
    worst = float((found - expected).abs().max())
    if not worst <= atol * scale:
        raise WrongError(kind, f"{what} off by {worst:.2g}, where the largest number is {scale:.2g}")


def summed(x: Tensor) -> Tensor:
    return x.sum(1)


OTHER = "another map than the reference's"


def check_classifier(case: Case) -> None:
    """The logits are the net's own, also of a net that is cut at a layer; so are the gradients there."""
    x, target = case.batch.x, case.batch.target
    model, small = case.classifiers
    if case.has("random"):
        model.logits(x)
        return  # which should not be reached
    with torch.no_grad():
        expected = case.net(x.clone())
    same(model.logits(x), expected, "other logits than the net's")
    same(small.logits(x), expected, "other logits than the net's")
    for role, path in case.layers.items():
        if path in case.given.program.again:
            continue
        front = model.until(role, x)
        same(model.after(role, front.z, front.rest), expected, "other logits behind a cut")
        z, slope = references.layer_and_gradient(case.net, path, x, target)
        same(front.z, z, "another layer in front of a cut", what=path)
        _, found = model.gradient(
            front.z, lambda logits, rows: logits.gather(1, target[rows, None])[:, 0], role, front.rest
        )
        same(found, slope, "another gradient at a layer", what=path)


def check_gradient(case: Case) -> None:
    found = case.explain(baselines.Gradient())["map"]
    same(found, summed(references.gradient(case.net, case.batch.x, case.batch.target)), OTHER)


def check_input_x_gradient(case: Case) -> None:
    found = case.explain(baselines.InputXGradient())["map"]
    x = case.batch.x
    same(found, summed(x * references.gradient(case.net, x, case.batch.target)), OTHER)


def check_integrated_gradients(case: Case) -> None:
    found = case.explain(baselines.IntegratedGradients(steps=4))["map"]
    same(
        found, summed(references.integrated_gradients(case.net, case.batch.x, case.batch.target, 4)), OTHER, atol=SINGLE
    )


def check_smooth_grad(case: Case) -> None:
    batch = case.batch
    found = case.explain(baselines.SmoothGrad(samples=3, sigma=0.2))["map"]
    same(found, summed(references.smooth_grad(case.net, batch.x, batch.target, batch.uids, 3, 0.2)), OTHER)


def check_gradient_shap(case: Case) -> None:
    batch = case.batch
    found = case.explain(sampled.GradientShap(samples=3, sigma=0.1, spread=0.3))["map"]
    expected = references.gradient_shap(case.net, batch.x, batch.target, batch.uids, 3, 0.1, 0.3)
    same(found, summed(expected), OTHER)


def check_occlusion(case: Case) -> None:
    found = case.explain(baselines.Occlusion(window=5, stride=4))["map"]
    same(found, references.occlusion(case.net, case.batch.x, case.batch.target, 5, 4), OTHER, atol=SINGLE)


def check_rise(case: Case) -> None:
    case.explain(sampled.Rise(samples=4, cells=3))


def check_guided_backprop(case: Case) -> None:
    found = case.explain(baselines.GuidedBackprop())["map"]
    same(found, summed(references.through_relus(case.given, case.batch.x, case.batch.target, guided=True)), OTHER)


def check_deconvolution(case: Case) -> None:
    found = case.explain(baselines.Deconvolution())["map"]
    same(found, summed(references.through_relus(case.given, case.batch.x, case.batch.target, guided=False)), OTHER)


def check_deep_lift_shap(case: Case) -> None:
    """Complete for its one baseline, and on a net of linear and elementwise operations the rescale rule itself."""
    batch, net = case.batch, case.net
    found = case.explain(baselines.DeepLiftShap(samples=1, sigma=0.5))["map"]
    baseline = 0.5 * noise_of(batch.uids).normal(*batch.x.shape[1:])
    with torch.no_grad():
        change = references.score(net, batch.x, batch.target) - references.score(net, baseline, batch.target)
    scale = max(float(change.abs().max()), float(found.abs().sum((1, 2)).max()), LEAST)
    missing = float((found.sum((1, 2)) - change).abs().max()) / scale
    if not missing < 1e-6:
        raise WrongError("not complete, and nobody is told", f"{missing:.2g} of the change of the logit is missing")
    if not any(case.has(feature) for feature in ("product", "max")):
        expected = summed(references.rescale(case.given, batch.x, baseline, batch.target))
        if not (worst := float((found - expected).abs().max())) < 1e-6 * scale:
            raise WrongError("complete, but not by the rescale rule", f"off by {worst:.2g} of {scale:.2g}")


def _check_cam(case: Case, method: Any, reference: Callable[[Tensor, Tensor], Tensor]) -> None:
    """``reference`` takes activations and gradients as (N, C, h, w)."""
    found = case.explain(method)
    if case.cam in case.given.program.again:
        return
    place, x, target = case.given.program.places[case.cam], case.batch.x, case.batch.target
    layer = references.layer_and_gradient(case.net, case.cam, x, target)
    expected = reference(*(references.on_grid(t, place) for t in layer))
    same(found["cam"], expected, OTHER, what=f"{case.cam}, {place}:")
    same(found["map"], resize(expected, (x.shape[2], x.shape[3])), "not the layer's map enlarged")


def check_grad_cam(case: Case) -> None:
    _check_cam(case, cam.GradCAM(), references.grad_cam)


def check_grad_cam_plus_plus(case: Case) -> None:
    _check_cam(case, cam.GradCAMPlusPlus(), references.grad_cam_plus_plus)


def check_layer_cam(case: Case) -> None:
    _check_cam(case, cam.LayerCAM(), references.layer_cam)


def check_xgrad_cam(case: Case) -> None:
    _check_cam(case, cam.XGradCAM(), references.xgrad_cam)


def check_hires_cam(case: Case) -> None:
    _check_cam(case, cam.HiResCAM(), references.hires_cam)


def check_eigen_cam(case: Case) -> None:
    _check_cam(case, cam.EigenCAM(), references.eigen_cam)


def check_score_cam(case: Case) -> None:
    x, target = case.batch.x, case.batch.target
    _check_cam(case, cam.ScoreCAM(), lambda a, _: references.score_cam(case.net, a, x, target))


def check_ablation_cam(case: Case) -> None:
    x, target = case.batch.x, case.batch.target

    def reference(a: Tensor, _: Tensor) -> Tensor:
        return references.ablation_cam(case.net, case.cam, case.given.program.places[case.cam], x, target)

    _check_cam(case, cam.AblationCAM(), reference)


def check_guided_grad_cam(case: Case) -> None:
    found = case.explain(GuidedGradCAM())["map"]
    if case.cam in case.given.program.again:
        return
    x, target, place = case.batch.x, case.batch.target, case.given.program.places[case.cam]
    guided = summed(references.through_relus(case.given, x, target, guided=True))
    layer = references.layer_and_gradient(case.net, case.cam, x, target)
    enlarged = resize(references.grad_cam(*(references.on_grid(t, place) for t in layer)), (x.shape[2], x.shape[3]))
    same(found, guided * enlarged, OTHER)


def check_captum_integrated_gradients(case: Case) -> None:
    x, target = case.batch.x, case.batch.target
    found = case.explain(Captum("IntegratedGradients", {"n_steps": 4}))["map"]
    same(found, summed(references.integrated_gradients(case.net, x, target, 4)), OTHER, atol=SINGLE)


def check_captum_guided_backprop(case: Case) -> None:
    found = case.explain(Captum("GuidedBackprop"))["map"]
    same(found, summed(references.through_relus(case.given, case.batch.x, case.batch.target, guided=True)), OTHER)


def check_captum_deep_lift(case: Case) -> None:
    """On a net of linear and elementwise operations it is the rescale rule, unless it is refused."""
    batch = case.batch
    found = case.explain(Captum("DeepLift"))["map"]
    if not any(case.has(feature) for feature in ("product", "max")):
        expected = references.rescale(case.given, batch.x, torch.zeros_like(batch.x), batch.target)
        same(found, summed(expected), "complete, but not by the rescale rule", atol=SINGLE)


def check_captum_layer(case: Case) -> None:
    """Gradient times activation at a layer is HiResCAM, enlarged."""
    found = case.explain(Captum("LayerGradientXActivation"))["map"]
    if case.cam in case.given.program.again:
        return
    place, x = case.given.program.places[case.cam], case.batch.x
    layer = references.layer_and_gradient(case.net, case.cam, x, case.batch.target)
    expected = references.hires_cam(*(references.on_grid(t, place) for t in layer))
    same(found, resize(expected, (x.shape[2], x.shape[3])), OTHER, what=f"{case.cam}, {place}:")


def check_iba(case: Case) -> None:
    """Two steps: a batch is its samples. The first step: the capacity, by its formula, where it lies on the image."""
    state = case.fitted(IBA(steps=2, batch=2))
    case.explain(IBA(steps=2, batch=2), state=state)
    found = case.explain(IBA(steps=1, batch=1), state=state)
    place = case.given.program.places[case.bottleneck]
    expected = references.first_bits(case.net, case.bottleneck, place, case.batch.x, case.estimation.x, 5.0)
    what = f"{case.bottleneck}, {place}:"
    same(found["capacity"], expected, "another capacity than the formula's", what=what, atol=SINGLE)


LRP_LINEAR = ("move", "fill", "share", "layer", "scale")
LRP_CONES = ("relu", "leaky_relu", "abs", "neg", "div")  # f(c x) = c f(x) for c > 0


def check_lrp(case: Case) -> None:
    """Nothing is lost, by any composite. Of linear operations, ReLUs and maxima LRP-0 is input times gradient
    (what divides is a constant)."""
    for composite in ("epsilon_plus_flat", "epsilon_alpha2_beta1", "epsilon"):
        try:
            found = case.explain(LRP(composite=composite, epsilon=0.0 if composite == "epsilon" else 1e-6))
        except SampleError as error:
            raise WrongError("relevance is lost, and somebody is told", str(error)) from error
    x, graph = case.batch.x, case.classifiers[0].graph(case.batch.x)
    plan = Plan(graph, graph.input)
    passing = [(node, step.kind) for node, step in plan.steps.items() if step.kind not in LRP_LINEAR]
    if all((kind == "pass" and operation(node) in LRP_CONES) or node in plan.merged for node, kind in passing):
        same(found["map"], summed(references.lrp_zero(case.net, x, case.batch.target)), OTHER, atol=SINGLE)


def check_attention(case: Case) -> None:
    """Shares of attention are in [0, 1] and know no target; none of the maps is negative."""
    others = dataclasses.replace(case.batch, target=(case.batch.target + 1) % case.given.classes)
    for follow in ("last_layer", "rollout", "gradient"):
        found = case.explain(Attention(follow=follow))["map"]
        if not float(found.min()) >= -TIGHT:
            raise WrongError("negative attention", f"{follow}: {float(found.min()):.2g}")
        if follow != "gradient":
            if not float(found.max()) <= 1 + TIGHT:
                raise WrongError("more than all attention", f"{follow}: {float(found.max()):.2g}")
            again = Attention(follow=follow).attribute(case.classifiers[0], others, {}, noise_of(others.uids))["map"]
            same(again, found, "attention that depends on the target", what=follow)


def check_cd(case: Case) -> None:
    """Relevant and irrelevant parts, each propagated on its own, add up to the logits (``completeness_error``)."""
    found = case.explain(CD(units=Partition(side=3)))
    if not float(found["completeness_error"].max()) < TIGHT:
        raise WrongError("not complete", f"{float(found['completeness_error'].max()):.2g}")


def check_fisher(case: Case) -> None:
    measures = ("functional_information", "smooth_grad", "var_grad", "set_information")
    case.explain(
        FunctionalInformation(
            measures=measures, samples=3, covariance=Covariance(kind="sample"), units=Partition(side=3)
        )
    )


def check_causal_paths(case: Case) -> None:
    """Every effect of the graph is the fall of the logit of a copy of the net whose weights are set to zero."""
    graphs = CausalGraphs(samples=4, correct=False)
    method = CausalPaths(layer="conv", graph=graphs)
    state = case.fitted(method)
    x, target = case.estimation.x[:4], case.target
    structure = Structure.of(case.classifiers[0], x)
    (graph,) = graphs_of(case.estimation[[0]], structure, state)

    def logit(net: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            return net(x.clone())[:, target].mean()

    reference = logit(case.net)
    for path, layer in graph.layers.items():
        module = case.net.get_submodule(path)
        if getattr(module, "groups", 1) > 1:
            continue
        tested = (~layer.effect.isnan()).nonzero()[:, 0].tolist()
        for unit in tested[:2]:
            net = copy.deepcopy(case.net)
            name = structure.call(path).parameter.rpartition(".")[2]
            weight = getattr(net.get_submodule(path), name).data
            if isinstance(module, torch.nn.ConvTranspose2d):
                weight = weight.transpose(0, 1)
            weight[layer.effects.nonzero(), structure.layer(path).units[unit].features] = 0
            fall, most = logit(net) - reference, float(reference.abs()) + 1
            same(layer.effect[unit], fall, "another effect of an intervention", most, f"{path}, unit {unit}:")
    batch = Batch(case.batch.uids, case.batch.x, torch.full_like(case.batch.target, target))
    try:
        case.explain(method, batch, state)
    except SampleError:
        if structure.at(case.layers["conv"]) in graph.reached:
            raise


CHECKS: dict[str, Callable[[Case], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}


def captum_can(case: Case, name: str) -> bool:
    """Whether captum itself, which replaces modules by their class, gives this net what its method promises."""
    x, target, net = case.batch.x, case.batch.target, copy.deepcopy(case.net)
    try:
        found = getattr(captum.attr, name)(net).attribute(x.clone().requires_grad_(), target=target).detach()
    except Exception:  # it breaks off in many ways
        return False
    if name == "GuidedBackprop":
        expected = references.through_relus(case.given, x, target, guided=True)
        return bool((found - expected).abs().max() <= TIGHT * max(LEAST, float(expected.abs().max())))
    with torch.no_grad():
        change = references.score(case.net, x, target) - references.score(case.net, torch.zeros_like(x), target)
    missing = (found.flatten(1).sum(1) - change).abs().max()
    return bool(missing <= SINGLE * max(LEAST, float(change.abs().max()), float(found.flatten(1).abs().sum(1).max())))


ATTENDS = ("scaled_dot_product_attention", "MultiheadAttention", "TransformerEncoderLayer", ".softmax(-1) @ v")
CAPTUMS_RULES = {"captum_guided_backprop": "GuidedBackprop", "captum_deep_lift": "DeepLift"}
CAMS = (*(name for name in CHECKS if "_cam" in name), "captum_layer")


def pattern(message: str) -> str:
    """The first sentence of a message, without what is this net's own: names, numbers, shapes."""
    first = re.split(r"\. |\n|; ", message, maxsplit=1)[0]
    first = re.sub(r"\([\d, x]*\)|\[[\d, ]*\]|'[^']*'|-?\d+(\.\d+)?(e[+-]?\d+)?", "#", first)
    return re.sub(r"\b[\w.]*#[\w.#]*", "#", first)[:160]


def must_be_refused(case: Case, method: str) -> str:
    """Why no number would be right; empty where one would."""
    if case.has("random"):
        return "the net draws random numbers"
    if case.has("batch"):
        return "the rows of a batch interact"
    if not case.steady:
        return UNSTEADY
    if method in ("guided_backprop", "deconvolution", "guided_grad_cam", "captum_guided_backprop") and not case.has(
        "relu"
    ):
        return "the net has no ReLU"
    if method == "attention" and not any(call in case.given.program.source() for call in ATTENDS):
        return "the net has no self-attention"
    if method == "causal_paths" and case.given.program.again:
        return "a layer runs twice"
    if method in CAMS and case.cam in case.given.program.again:
        return "the layer runs twice"
    return ""


@dataclass
class Judge:
    """Verdicts on the net of a seed."""

    seed: int
    given: Generated = field(init=False)

    def __post_init__(self) -> None:
        self.given = generate(self.seed)
        self._case = Case(self.given)

    def verdict(self, method: str) -> Verdict:
        reason = must_be_refused(self._case, method)
        if reason == UNSTEADY:  # nothing can be said of it
            return Verdict(self.seed, method, "due", reason)
        try:
            CHECKS[method](self._case)
        except (UserError, SampleError) as refusal:
            if not reason and method in CAPTUMS_RULES and not captum_can(self._case, CAPTUMS_RULES[method]):
                reason = "captum itself is not right on this net"
            outcome: Outcome = "due" if reason else "refused"
            return Verdict(self.seed, method, outcome, reason or pattern(str(refusal)), str(refusal))
        except Exception as error:  # whatever else a method may raise is wrong
            self._case = Case(self.given)  # it may have left anything behind
            kind = error.kind if isinstance(error, WrongError) else f"{type(error).__name__}: {pattern(str(error))}"
            return Verdict(self.seed, method, "wrong", f"not refused: {reason}" if reason else kind, str(error))
        return Verdict(self.seed, method, "wrong" if reason else "right", f"not refused: {reason}" if reason else "")
