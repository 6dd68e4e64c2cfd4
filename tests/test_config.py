"""From YAML to objects: one form for each value, and every mistake named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.error import URLError

import pytest
import yaml
from hydra.core.override_parser.types import QuotedString
from tiny import ROOT, pictures

from attrib import keys
from attrib.config.compose import compose, parse_overrides
from attrib.config.objects import build, classifier, experiment, options_of, with_input
from attrib.datasets import ImageNet, ImageTransform, Selection
from attrib.methods import Method
from attrib.types import UserError

IBA = {"_target_": "attrib.methods.iba.IBA"}


@dataclass(frozen=True)
class Everything:
    VERSION: ClassVar[int] = 1
    flag: bool = True
    count: int | None = None
    rate: float = 0.5
    both: float | int = 1
    name: str = "a"
    choice: Literal["a", 1] | None = "a"
    names: tuple[str, ...] = ()
    pair: int | tuple[int, float] = 0
    words: Sequence[str] = ()
    sloppy: int = None  # type: ignore[assignment]
    unknown: Any = None
    path: Path | None = None


class Unreadable:
    def __init__(self, x: NoSuchName = 1) -> None:  # noqa: F821
        self.x = x


def not_a_net(width: int = 3) -> int:
    return width


CONSTANT = 3


def everything(**fields: Any) -> Everything:
    return build({"_target_": "test_config.Everything", **fields}, "here.yaml")


@pytest.mark.parametrize(
    ("field", "given", "kept"),
    [
        ("flag", False, False),
        ("count", 3, 3),
        ("count", None, None),
        ("rate", 10, 10.0),
        ("rate", 0.25, 0.25),
        ("both", 2, 2),
        ("both", 2.0, 2.0),
        ("choice", 1, 1),
        ("choice", None, None),
        ("names", ["a", "b"], ["a", "b"]),
        ("pair", 3, 3),
        ("pair", [1, 2], [1, 2.0]),
        ("words", ["a"], ["a"]),
        ("sloppy", None, None),
        ("unknown", {"a": [1]}, {"a": [1]}),
        ("path", "somewhere", "somewhere"),
    ],
)
def test_a_value_has_one_form(field, given, kept):
    found = getattr(everything(**{field: given}), field)
    assert keys.digest(found) == keys.digest(kept)


@pytest.mark.parametrize(
    ("field", "given", "words"),
    [
        ("flag", 1, "flag must be bool, not 1"),
        ("count", 1.5, "count must be int or null, not 1.5"),
        ("count", True, "count must be int or null, not True"),
        ("rate", "x", "rate must be float, not 'x'"),
        ("rate", True, "rate must be float, not True"),
        ("rate", 10**400, "rate must be float"),
        ("name", 5, "name must be str, not 5"),
        ("name", None, "name must be str, not None"),
        ("choice", "b", "choice must be 'a' or 1 or null, not 'b'"),
        ("choice", True, "choice must be 'a' or 1 or null, not True"),
        ("names", "ab", r"names must be tuple\[str, \.\.\.\], not 'ab'"),
        ("names", ["a", 1], "names must be"),
        ("pair", [1], "pair must be"),
        ("words", "ab", "words must be"),
        ("sloppy", "x", "sloppy must be int, not 'x'"),
    ],
)
def test_a_value_of_the_wrong_type(field, given, words):
    with pytest.raises(UserError, match=f"^here.yaml: {words}"):
        everything(**{field: given})


def test_the_same_number_has_the_same_key():
    first, second = (build(IBA | {"beta": beta}, "iba") for beta in (10, 10.0))
    assert keys.digest(first) == keys.digest(second)
    with pytest.raises(UserError, match=r"^method iba: beta must be float, not 'x'$"):
        build(IBA | {"beta": "x"}, "method iba")
    first, second = (build({"_target_": "attrib.datasets.Selection", "min_confidence": n}, "") for n in (1, 1.0))
    assert keys.digest(first) == keys.digest(second)


def test_nodes_inside_a_node_are_checked():
    node = {
        "_target_": "attrib.datasets.ImageFolder",
        "root": "x",
        "transform": {"_target_": "attrib.datasets.ImageTransform", "size": "big"},
    }
    with pytest.raises(UserError, match=r"^d.yaml: transform: size must be int or tuple\[int, int\], not 'big'"):
        build(node, "d.yaml")
    node["transform"] = {"_target_": "attrib.datasets.ImageTransform", "sise": 3}
    with pytest.raises(UserError, match=r"^d.yaml: transform: .*did you mean 'size'"):
        build(node, "d.yaml")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("builtins.dict", None),  # has no signature
        ("test_config.Unreadable", None),
        ("test_config.CONSTANT", "is int, not a class or function"),
        ("builtins.int", "cannot be built"),
        ("test_config.nothing", "cannot import"),
    ],
)
def test_strange_targets(target, words):
    node = {"_target_": target, "x": 1}
    if words is None:
        assert build(node, "here") is not None
    else:
        with pytest.raises(UserError, match=f"^here: .*{words}"):
            build(node, "here")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("batch", "abc", "run.batch must be int or 'auto' or null, not 'abc'"),
        ("limit", 0.5, "run.limit must be int or null, not 0.5"),
        ("strict", "yes", "run.strict must be bool, not 'yes'"),
        ("hooks", "x", "run.hooks must be"),
        ("bach", 1, "did you mean 'batch'"),
    ],
)
def test_options(field, value, words):
    with pytest.raises(UserError, match=words):
        options_of({field: value})
    assert options_of({"flush": 1, "limit": None}).flush == 1.0


# Experiments ------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path) -> dict:
    """A whole configuration, as attrib run resolves it."""
    images = pictures(tmp_path, 2)
    model = yaml.safe_load((ROOT / "tests" / "configs" / "model" / "small_cnn.yaml").read_text())
    folder = {
        "_target_": "attrib.datasets.ImageFolder",
        "root": str(images),
        "boxes": str(images.parent / "boxes.csv"),
        "transform": {"_target_": "attrib.datasets.ImageTransform", **model["input"]},
    }
    return {
        "dataset": {"name": "tiny", **folder, "target": "predicted", "estimation": folder},
        "model": model,
        "method": {"name": "iba", **IBA},
        "metric": {"ehr": {"_target_": "attrib.metrics.EHR"}},
        "run": {"device": "cpu"},
        "seed": 0,
    }


def changed(config: dict, path: str, value: Any) -> dict:
    first, _, rest = path.partition(".")
    return {**config, first: changed(config.get(first) or {}, rest, value) if rest else value}


def test_an_experiment(config):
    cell = experiment(config)
    assert cell.names == {"dataset": "tiny", "model": "small_cnn", "method": "iba"}
    assert cell.config["model"] == config["model"]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("seed", "x", "^seed must be int, not 'x'"),
        ("seed", 1.5, "^seed must be int"),
        ("method.beta", "x", r"^method iba: beta must be float, not 'x'"),
        ("method.betta", 1, r"^method iba: .*did you mean 'beta'"),
        ("metric.ehr.steps", 2.5, r"^metric ehr: steps must be int"),
        ("dataset.root", 5, r"^dataset tiny: root must be str, not 5"),
        ("dataset.transform.mean", 0.5, r"^dataset tiny: transform: mean must be tuple"),
        ("dataset.transform", 5, r"^dataset tiny: transform must be ImageTransform, not 5"),
        ("dataset.estimation.root", 5, r"^dataset tiny: estimation: root must be str, not 5"),
        ("dataset.estimation", None, r"^dataset tiny: iba is fitted on data first"),
        ("dataset.select.count", 2.5, r"^dataset tiny: select: count must be int or null"),
        ("dataset._target_", "test_config.not_a_net", "has no field 'root'"),
        ("dataset", {"_target_": "test_config.not_a_net"}, "is not a dataset"),
        ("method", {"_target_": "attrib.metrics.EHR"}, "is not a method: it has no attribute, MAPS"),
        ("metric.ehr", IBA, r"^metric ehr: .* is not a metric: it has no score, CURVES"),
        ("model._target_", "test_config.not_a_net", "gives int, not a torch.nn.Module"),
        ("model.input", None, r"^model small_cnn: no input"),
        ("model.input.size", "x", "size must be int"),
        ("model.input.mean", None, r"how nets\.small_cnn wants its images is not known; set model\.input\.mean$"),
        ("model.layers", "x", "layers must give"),
        ("model.layers.bottleneck", 5, "bottleneck.*has no layer '5'"),
        ("model.checkpoint", 5, "no such file: 5"),
        ("run.rows", "x", "run.rows must be int"),
    ],
)
def test_mistakes_are_named(config, path, value, words):
    with pytest.raises(UserError, match=words):
        experiment(changed(config, path, value))


def test_a_method_that_can_have_no_key(config):
    with pytest.raises(UserError, match=r"NotADataclass must be a frozen dataclass"):
        experiment(changed(config, "method", {"_target_": "test_config.NotADataclass"}))


class NotADataclass(Method):
    VERSION, MAPS = 1, {}

    def attribute(self) -> None: ...


def test_a_list_file_may_lie_in_the_home_folder(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "l.txt").write_text("p001\n")
    cell = experiment(changed(config, "dataset.select.list", "~/l.txt"))
    assert cell.dataset_key == experiment(changed(config, "dataset.select.list", str(tmp_path / "l.txt"))).dataset_key
    (tmp_path / "l.txt").unlink()
    with pytest.raises(UserError, match=r"select\.list: .*l\.txt cannot be read"):
        assert experiment(changed(config, "dataset.select.list", "~/l.txt")).dataset_key
    assert Selection().list is None


def test_the_split_is_part_of_the_key(tmp_path):
    (tmp_path / "imagenet_class_index.json").write_text('{"0": ["n01440764", "tench"]}')
    for split in ("attribution", "estimation"):
        folder = tmp_path / "images" / split / "n01440764"
        folder.mkdir(parents=True)
        (folder / "a.JPEG").write_bytes(b"")
    one, two = (ImageNet(str(tmp_path), ImageTransform(), split) for split in ("attribution", "estimation"))
    assert one.uids == two.uids
    assert one.key != two.key


# Input ------------------------------------------------------------------------------------------

NULL = dict.fromkeys(("size", "mean", "std", "resize", "resize_size", "interpolation"))


def inputs(arch: str = "resnet50", weights: str | None = "DEFAULT", **given: Any) -> tuple[dict, dict]:
    """model.input and the dataset's transform, which takes it over."""
    config = {
        "model": {"_target_": "attrib.models.torchvision_net", "arch": arch, "weights": weights},
        "dataset": {"transform": {"_target_": "attrib.datasets.ImageTransform", **NULL, **given}},
    }
    config["model"]["input"] = NULL | given
    found = with_input(config)
    return found["model"]["input"], found["dataset"]["transform"]


def test_nulls_are_filled_with_what_the_library_knows():
    model, transform = inputs()
    assert (model["size"], model["resize_size"], model["resize"]) == (224, 232, "crop")
    assert {k: v for k, v in transform.items() if k != "_target_"} == model
    assert inputs("inception_v3")[0]["size"] == 299


def test_what_is_given_wins():
    model, transform = inputs(interpolation="bicubic", std=[1, 1, 1])
    assert (model["interpolation"], model["std"], model["resize_size"]) == ("bicubic", [1, 1, 1], 232)
    for given in ({"size": 448}, {"resize": "squash"}):  # the library's 232 belongs to a crop of 224
        model, transform = inputs(**given)
        assert model["resize_size"] is None
        assert transform["resize_size"] is None
        build(transform, "transform")
    assert inputs(size=448, resize_size=500)[1]["resize_size"] == 500


def test_what_is_not_known_must_be_given():
    with pytest.raises(UserError, match=r"how resnet50 wants its images is not known; set model\.input\.resize_size$"):
        inputs(weights=None)
    assert inputs(weights=None, resize_size=256)[1]["mean"] == [0.485, 0.456, 0.406]
    assert inputs(weights=None, size=448)[0]["resize_size"] is None
    with pytest.raises(UserError, match="resnet49"):
        inputs("resnet49")
    with pytest.raises(UserError, match="arch must be str, not 5"):
        inputs(5)


def test_a_classifier_wants_a_size(config):
    with pytest.raises(UserError, match=r"model: input\.size must be int or tuple\[int, int\], not None"):
        classifier(changed(config, "model.input.size", None)["model"], options_of({}))


@pytest.mark.parametrize(
    "text", ["/d/café", "/d/中文 (1)", "/d/caf\udce9", "a&b", "it's", "~/x", "/d/a=b", "/d/[a]", "back\\slash'"]
)
def test_a_text_needs_no_quotes_where_it_can_only_be_a_text(text):
    assert plain_value(f"dataset.root={text}") == text


def plain_value(override: str) -> Any:
    value = parse_overrides([override])["dataset.root"].value()
    return value.text if isinstance(value, QuotedString) else value


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("dataset.root=[é,b]", "put texts in it that are not plain ASCII in quotes"),
        ("dataset.root=/d/é,b", "put texts in it that are not plain ASCII in quotes"),
        ("dataset.root=choice(1,", "no viable alternative"),
        ("nothing", "expected KEY=VALUE"),
    ],
)
def test_what_may_be_several_values_is_left_to_whoever_wrote_it(override, why):
    with pytest.raises(UserError, match=f"command line: .* is not understood: {why}"):
        parse_overrides([override])


# ---- what attrib reads of every preset, whether or not it has such a line ----

OWN = {
    "model": "name: mine\n_target_: torch.nn.Identity\ninput: {size: 3, mean: [0], std: [1], resize: squash, "
    "interpolation: bilinear}\n",
    "dataset": "name: mine\n_target_: attrib.datasets.Tones\n",
}


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.output={read: value}", {"read": "value"}),
        ("model.output.read=sigmoid", {"read": "sigmoid"}),
        ("+model.output.read=sigmoid", {"read": "sigmoid"}),
        ("++model.output.read=sigmoid", {"read": "sigmoid"}),
        ("model.classes=[a,b]", ["a", "b"]),
        ("model.checkpoint=x.pth", "x.pth"),
        ("model.match=order", "order"),
        ("model.randomise.layers=3", {"layers": 3}),
        ("+model.layers.cam=features", {"cam": "features"}),
        ("dataset.target=3", 3),
        ("dataset.select.count=3", {"count": 3}),
    ],
)
def test_optional_fields_need_no_plus(override, value, tmp_path):
    for group, text in OWN.items():
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.yaml").write_text(text)
    group, field = override.lstrip("+").split("=")[0].split(".")[:2]
    assert compose("run", [override, f"{group}=mine", "method=random"], tmp_path).values[group][field] == value


@pytest.mark.parametrize("model", ["huggingface_image", "lenet"])
def test_an_optional_field_may_be_null_or_there(model):
    overrides = [f"model={model}", "model.output.read=value", "model.output.take=out", "dataset.select.count=3"]
    more = ["model.path=x"] if model == "huggingface_image" else []
    values = compose("run", [*overrides, *more]).values
    assert values["model"]["output"] == {"read": "value", "take": "out"}
    assert values["dataset"]["select"]["count"] == 3
    assert values["dataset"]["select"]["seed"] == 0  # what the preset says otherwise is kept


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.outptu.read=value", "model has no field 'outptu'"),
        ("dataset.tagret=3", "dataset has no field 'tagret'; did you mean 'target'?"),
        (
            "model.layers.camm=x",
            r"model.layers has no field 'camm'; did you mean 'cam'\?.*\+model.layers.camm=... adds",
        ),
    ],
)
def test_misspelt_fields_are_still_refused(override, words):
    with pytest.raises(UserError, match=words):
        compose("run", [override])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.output.raed=value", "raed"),
        ("model.randomise.layres=3", "no field 'layres'; did you mean 'layers'"),
        ("dataset.select.cuont=3", "no field 'cuont'; did you mean 'count'"),
    ],
)
def test_misspelt_fields_of_optional_ones_are_refused_by_who_reads_them(override, words):
    composition = compose("run", [override, "dataset=digits", "model=lenet", "method=random", "metric=[]"])
    with pytest.raises(UserError, match=words):
        experiment(composition.values, composition.files)


# ---- without network ----


class ConnectError(Exception):
    """As httpx has it, whose errors derive from no error of Python's."""

    __module__ = "httpx"


def without_network(how: str, pretrained: bool = True, weights: str | None = None, path: str | None = None) -> Any:
    try:
        if how == "httpx":
            raise ConnectError("[Errno -2] Name or service not known")
        raise {"url": URLError, "refused": ConnectionRefusedError, "wrong": ValueError}[how]("nobody answers")
    except Exception as error:
        raise RuntimeError("cannot be loaded") from error


@pytest.mark.parametrize("how", ["httpx", "url", "refused"])
@pytest.mark.parametrize(
    ("field", "advice"),
    [
        ("pretrained", "set model.pretrained=false model.checkpoint=FILE"),
        ("weights", "set model.weights=null model.checkpoint=FILE"),
        ("path", "set model.path=FOLDER"),
    ],
)
def test_what_cannot_be_downloaded_may_be_put_there_by_hand(how, field, advice):
    value = True if field == "pretrained" else "x"
    with pytest.raises(UserError) as refused:
        build({"_target_": "test_config.without_network", "how": how, field: value}, "mine.yaml")
    assert str(refused.value).startswith("mine.yaml: test_config.without_network cannot download what it needs (")
    assert str(refused.value).endswith(f"On a machine without network, put the file there by hand and {advice}")


def test_other_errors_are_not_those_of_a_network():
    with pytest.raises(UserError, match=r"cannot be built: ValueError: nobody answers"):
        build({"_target_": "test_config.without_network", "how": "wrong"}, "mine.yaml")
