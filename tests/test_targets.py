"""Which class is explained: by rule, number or name; the difference of two; several labels of one sample."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from nets import small_cnn, small_cnn_images
from tiny import command, pictures
from torch import Tensor, nn

from attrib.classes import ClassNames, shown_target
from attrib.config.compose import CommandLine
from attrib.datasets import ImageFolder
from attrib.experiment.samples import Samples
from attrib.experiment.targets import Contrast, check_labels, parsed
from attrib.methods import Method
from attrib.methods.baselines import (
    DeepLiftShap,
    Gradient,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    Occlusion,
    SmoothGrad,
)
from attrib.methods.cam import AblationCAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, ScoreCAM, XGradCAM
from attrib.methods.captum import Captum
from attrib.methods.cd import CD
from attrib.methods.extremal import ExtremalPerturbation
from attrib.methods.fisher import FunctionalInformation
from attrib.methods.lrp import LRP
from attrib.methods.parts.losses import target_score
from attrib.methods.sampled import GradientShap, Rise
from attrib.methods.surrogates import KernelShap, Lime
from attrib.metrics import Degradation, InsertionDeletion, SensitivityN
from attrib.metrics.infidelity import Infidelity
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, SampleError, UserError

K = 10
NAMES = ClassNames(tuple("abcdefghij"), "the test")


class Data:
    """Three samples of the small CNN, of the classes 3, 0 and unknown, or with several labels."""

    key, names = "data", dict(enumerate("abcdefghij"))
    modality = "image"

    def __init__(self, targets: Sequence | None = None) -> None:
        self.x = small_cnn_images()[0][:3].double()
        self.uids = tuple("xyz")
        self.targets = torch.tensor([3, 0, -1] if targets is None else targets)

    def batch(self, uids: Sequence[str]) -> Batch:
        rows = [self.uids.index(u) for u in uids]
        return Batch(tuple(uids), self.x[rows], self.targets[rows])


def classifier(net: nn.Module | None = None, layer: str = "features.8", **fields) -> Classifier:
    paths = {"cam": layer, "bottleneck": layer}
    return Classifier(small_cnn() if net is None else net, paths, dtype=torch.float64, **fields)


def samples(target, data: Data | None = None) -> Samples:
    data = data or Data()
    return Samples(data, classifier(classes=NAMES), data.uids, target=target)


# ---- the rules ---------------------------------------------------------------------------------


def test_second_is_the_largest_score_but_one():
    model, data = classifier(), Data()
    order = model.logits(data.x).argsort(1, descending=True)
    for rule, place in (("predicted", 0), ("second", 1)):
        assert samples(rule).batch(data.uids).target.tolist() == order[:, place].tolist()
    equal = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    nn.init.zeros_(equal[1].weight)
    nn.init.zeros_(equal[1].bias)
    for rule, found in (("predicted", 0), ("second", 1)):
        made = Samples(data, Classifier(equal, dtype=torch.float64), data.uids, target=rule)
        assert made.batch(data.uids).target.tolist() == [found] * 3


def test_a_name_is_the_number_of_its_class():
    assert parsed("c", NAMES) == parsed(2, NAMES) == 2
    assert parsed("label", NAMES) == "label"
    assert parsed({"of": "predicted", "against": "B"}, NAMES) == Contrast("predicted", 1)
    for wrong, why in (
        ("zz", "'zz' is none of the net's classes"),
        (-1, "must be label, predicted or second"),
        (True, "must be label"),
        (None, "must be label"),
        ({"of": "label"}, "has the fields of and against"),
        ({"of": 1, "against": "b"}, "of and against are both 1"),
    ):
        with pytest.raises(UserError, match=f"dataset.target.*{why}"):
            parsed(wrong, NAMES)
    with pytest.raises(UserError, match=r"'c'; the net's classes have no names \(model.classes"):
        parsed("c", None)


def test_a_contrast_has_a_one_and_a_minus_one():
    made = samples({"of": "label", "against": 0})
    assert made.batch(["x"]).target.tolist() == [[-1, 0, 0, 1, 0, 0, 0, 0, 0, 0]]
    with pytest.raises(SampleError, match="y: label and 0 are the same class, 0"):
        made.batch(["y"])
    with pytest.raises(SampleError, match="z has no label"):
        made.batch(["z"])
    logits = classifier().logits(Data().x)
    torch.testing.assert_close(target_score(logits[:1], made.batch(["x"]).target), logits[:1, 3] - logits[:1, 0])
    assert made.confidence(["x"])["x"] == pytest.approx(logits.softmax(1)[0, 3].item())
    with pytest.raises(UserError, match=r"dataset.target=12, but the model's outputs are 0 to 9"):
        samples({"of": 12, "against": "label"}).batch(["x"])


def test_how_a_target_is_shown():
    assert shown_target("zebra", 340) == "zebra (340)"
    assert shown_target("", 3) == "class 3"
    assert shown_target("a \N{MINUS SIGN} b", [1, -1, 0]) == "a \N{MINUS SIGN} b (0 \N{MINUS SIGN} 1)"
    assert shown_target("", [1, 0, 1]) == "classes 0, 2"


# ---- methods and metrics: as of a net whose only score is the difference ---------------------------


class Difference(nn.Module):
    """The small CNN, then the difference of two of its logits as the score of class 0."""

    def __init__(self, of: int, against: int) -> None:
        super().__init__()
        self.net, self.last = small_cnn(), nn.Linear(K, 2, bias=False)
        with torch.no_grad():
            self.last.weight.zero_()
            self.last.weight[0, of], self.last.weight[0, against] = 1.0, -1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.net(x))


METHODS: list[Method] = [
    *(Gradient(), InputXGradient(), IntegratedGradients(steps=4), SmoothGrad(samples=3), GuidedBackprop()),
    *(DeepLiftShap(), Occlusion(window=8, stride=8), GradCAM(), GradCAMPlusPlus(), LayerCAM(), XGradCAM(), HiResCAM()),
    *(ScoreCAM(), AblationCAM(), GradientShap(samples=3), Rise(samples=20, output="logit"), Lime(samples=30)),
    *(KernelShap(samples=30), ExtremalPerturbation(steps=3, stride=1, sigma=1.0), Captum("Saliency")),
    *(CD(), CD(score="occlusion")),
    FunctionalInformation(activation="none", samples=4),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.quick(every=2)
def test_the_map_of_a_contrast_is_that_of_the_difference(method):
    assert method.CONTRASTS
    assert not method.NEEDS_PROBABILITIES
    x, uids = small_cnn_images()[0][:2].double(), ("a", "b")
    contrast = torch.zeros(2, K, dtype=torch.long)
    contrast[:, 3], contrast[:, 5] = 1, -1
    found = method.attribute(classifier(), Batch(uids, x, contrast), {}, Noise(uids, 1, dtype=torch.float64))
    one = Batch(uids, x, torch.zeros(2, dtype=torch.long))
    wrapped = classifier(Difference(3, 5), "net.features.8")
    wanted = method.attribute(wrapped, one, {}, Noise(uids, 1, dtype=torch.float64))
    for name in method.MAPS:
        assert wanted[name].abs().max() > 0
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-9)


def test_the_relevance_of_a_contrast_is_the_difference_of_two():
    """LRP's rules are linear in the relevance that comes from behind."""
    method, x, uids = LRP(), small_cnn_images()[0][:2].double(), ("a", "b")
    assert method.CONTRASTS

    def relevance(target: Tensor) -> Tensor:
        return method.attribute(classifier(), Batch(uids, x, target), {}, Noise(uids, dtype=torch.float64))["map"]

    contrast = torch.zeros(2, K, dtype=torch.long)
    contrast[:, 3], contrast[:, 5] = 1, -1
    wanted = relevance(torch.tensor([3, 3])) - relevance(torch.tensor([5, 5]))
    assert wanted.abs().max() > 0
    torch.testing.assert_close(relevance(contrast), wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "metric",
    [InsertionDeletion(output="logit"), Degradation(output="logit"), Infidelity(output="logit"),
     pytest.param(SensitivityN(output="logit"), marks=pytest.mark.slow)],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_the_score_of_a_contrast_is_that_of_the_difference(metric):
    assert metric.CONTRASTS
    x, uids = small_cnn_images()[0][:2].double(), ("a", "b")
    maps = Noise(uids, 3, dtype=torch.float64).normal(32, 32)
    contrast = torch.zeros(2, K, dtype=torch.long)
    contrast[:, 3], contrast[:, 5] = 1, -1

    def scores(model: Classifier, target: Tensor):
        batch = Batch(uids, x, target)
        return metric.score(model, batch, maps, Noise(uids, 4, dtype=torch.float64))

    found, wanted = (
        scores(classifier(), contrast),
        scores(classifier(Difference(3, 5), "net.features.8"), torch.zeros(2).long()),
    )
    for name in metric.COLUMNS:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-9)


# ---- several labels ------------------------------------------------------------------------------


def test_several_labels_are_checked_one_by_one():
    rows = torch.zeros(3, K)
    rows[0, [2, 5]] = 1
    rows[1, 4] = float("nan")
    made = samples("label", Data(rows.tolist()))
    assert made.batch(["x"]).target[0].nonzero().flatten().tolist() == [2, 5]
    with pytest.raises(SampleError, match=r"y: its label of class 4 \(e\) is nan, not 1 or 0"):
        made.batch(["y"])
    with pytest.raises(SampleError, match="z has no label: none of its 10 labels is 1"):
        made.batch(["z"])
    rows[2, 7], rows[2, 1] = -1, 1
    with pytest.raises(SampleError, match=r"z: its label of class 7 \(h\) is unknown \(-1\)"):
        samples("label", Data(rows.tolist())).batch(["z"])
    few = Data([[1, 0, 1]] * 3)
    few.names = {}
    with pytest.raises(SampleError, match="x has labels for 3 classes, but the model has 10"):
        samples("label", few).batch(["x"])
    with pytest.raises(UserError, match="the samples have several labels each"):
        samples({"of": "label", "against": 1}, Data([[1] + [0] * 9] * 3)).batch(["x"])


def test_several_labels_of_fewer_classes_in_another_order():
    data = Data([[1, 0, 1], [0, 1, 0], [0, 1, 1]])
    data.names = {0: "d", 1: "nothing", 2: "a"}
    made = Samples(data, classifier(classes=NAMES), data.uids, classes={0: 3, 2: 0})
    assert made.batch(["x"]).target.tolist() == [[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]]
    with pytest.raises(SampleError, match=r"y has class 1 \(nothing\), which the net does not know"):
        made.batch(["y"])
    data.names = dict(enumerate("abc"))
    same = Samples(data, classifier(classes=NAMES), data.uids)
    assert same.batch(["z"]).target.tolist() == [[0, 1, 1, 0, 0, 0, 0, 0, 0, 0]]


def test_the_confidence_of_several_labels_is_the_least_of_their_sigmoids():
    rows = [[1, 0, 1] + [0] * 7, [0, 1] + [0] * 8, [0] * 10]
    found = samples("label", Data(rows)).confidence(("x", "y", "z"))
    p = classifier().logits(Data().x).sigmoid()
    assert found == pytest.approx({"x": min(p[0, 0].item(), p[0, 2].item()), "y": p[1, 1].item()})


# ---- the command line ----------------------------------------------------------------------------


class SeveralLabels(ImageFolder):
    """Each picture shows its own class and the next."""

    def batch(self, uids: Sequence[str]) -> Batch:
        found = super().batch(uids)
        rows = torch.zeros(len(uids), K, dtype=torch.long)
        for row, label in zip(rows, found.target.tolist()):
            row[label] = row[(label + 1) % K] = 1
        return Batch(found.uids, found.x, rows, found.roi)


FAST = ["method.feature.steps=2", "method.gan.epochs=1", "method.gan.dataset_size=8", "method.gan.sub_dataset_size=4"]
SEVERAL = [["input_iba_fast", *FAST, "method.input.steps=2"], ["iba", "method.steps=2"], ["gradient"], ["cd"],
           ["rise", "method.samples=20"]]  # fmt: skip


@pytest.mark.parametrize("method", SEVERAL, ids=lambda m: m[0])
def test_a_set_of_several_labels_from_end_to_end(method, tmp_path, capfd):
    images = pictures(tmp_path, 4)
    name, *fields = method
    ended = command(capfd)(
        "dataset=tiny", "dataset._target_=test_targets.SeveralLabels", f"dataset.root={images}", "model=small_cnn",
        f"method={name}", *fields, "metric=[ehr,insertion_deletion]", f"run.root={tmp_path / 'w'}",
        "run.progress=false",        "dataset.select.min_confidence=0.0001",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    assert "maps_computed=4" in ended.out
    assert "failed=0" in ended.out


def test_several_targets_are_a_cell_each():
    line = CommandLine.of(["method=iba", "dataset.targets=[label, second, 'polar bear', {of: predicted, against: 3}]"])
    assert line.multirun
    assert [cell[1] for cell in line.cells()] == [
        "dataset.target='label'", "dataset.target='second'", "dataset.target='polar bear'",
        "dataset.target={of:'predicted',against:3}",
    ]  # fmt: skip
    assert len(CommandLine.of(["dataset.targets=[3]"]).cells()) == 1
    for wrong in (["dataset.targets=label"], ["dataset.targets=[]"], ["dataset.targets=[1]", "dataset.target=1"]):
        with pytest.raises(UserError, match=r"dataset\.targets="):
            CommandLine.of(wrong)


# ---- no label at all ----


class Labelled:
    """Says its labels without being read, unless ``labels`` is None."""

    def __init__(self, *labels, problems=None):
        self.uids = tuple(f"s{i}" for i in range(len(labels)))
        self.label_problems = problems or {}
        if labels[0] is not None:
            self.label = dict(zip(self.uids, labels)).__getitem__


@pytest.mark.parametrize("target", ["label", Contrast("label", "predicted"), Contrast("second", "label")])
def test_without_any_label_nothing_begins(target):
    with pytest.raises(UserError, match=r"none of the 2 samples has a label, .*dataset\.target=predicted"):
        check_labels(Labelled(-1, -1), ("s0", "s1"), target)
    with pytest.raises(UserError, match=r"none of the 1 samples has a label \(twice in labels\.csv\)"):
        check_labels(Labelled(-1, 3, problems={"s0": "twice in labels.csv"}), ("s0",), target)
    check_labels(Labelled(-1, 3), ("s0", "s1"), target)  # the first fails by itself
    check_labels(Labelled((0, 1), (0, 0)), ("s0", "s1"), target)
    check_labels(Labelled(None, None), ("s0", "s1"), target)  # nobody knows before they are read


@pytest.mark.parametrize("target", ["predicted", "second", 3, Contrast("predicted", 3)])
def test_labels_that_nobody_asks_for_may_be_missing(target):
    check_labels(Labelled(-1, -1), ("s0", "s1"), target)


def test_a_folder_without_labels_is_one_message(tmp_path, capfd):
    images = pictures(tmp_path, 5)
    given = ("dataset=image_folder", f"dataset.root={images}", "model=small_cnn", "method=gradient", "metric=[]")
    ended = command(capfd)(*given, f"run.root={tmp_path / 'w'}")
    assert ended.status == 2
    [line] = [line for line in ended.err.splitlines() if "label" in line]
    assert line.startswith("error: none of the 5 samples has a label")
    assert not list((tmp_path / "w").glob("*/spec.json"))
    ended = command(capfd)(*given, f"run.root={tmp_path / 'w'}", "dataset.target=predicted")
    assert ended.status == 0, ended.err


@pytest.mark.parametrize("given", [-1, True, 2.0, None])
def test_what_is_no_class_is_refused_with_the_range(given):
    with pytest.raises(UserError, match=r"not .*; classes are numbered from 0 to the net's last class"):
        parsed(given)
    with pytest.raises(UserError, match=r"classes are numbered from 0 to 2$"):
        parsed(given, ClassNames.of(["a", "b", "c"], "net"))
