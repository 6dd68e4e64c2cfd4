"""Classes mean the same to the net and to the data: by WordNet id, name or number, or they are refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nets import small_cnn
from tiny import command, only_cell, save
from torch import nn

from attrib.classes import ClassNames, imagenet_classes
from attrib.config.trained import names_of_classes
from attrib.datasets import ImageFolder, ImageTransform, Selection
from attrib.experiment.cell import Experiment
from attrib.experiment.targets import matched
from attrib.methods.baselines import Gradient
from attrib.models import Classifier, save_checkpoint
from attrib.models.huggingface import names_of
from attrib.models.zoo import classes_of, timm_net, torchvision_net
from attrib.types import SampleError, UserError

PETS = ("tabby, tabby cat", "great white shark", "crane", "crane", "zebra")


def names(*given: str) -> ClassNames:
    return ClassNames.of(given or PETS, "the test")


def folders(root: Path, *classes: str) -> Path:
    for i, name in enumerate(classes):
        save(root / name / "a.png", seed=i)
    return root


def net(outputs: int = 5) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, outputs)).eval()


def cell(root: Path, known: ClassNames | None, outputs: int = 5, target="label", select=None, **fields) -> Experiment:
    transform = ImageTransform(size=8, mean=(0.5,) * 3, std=(0.5,) * 3, resize="squash", interpolation="bilinear")
    model = Classifier(net(outputs), input_shape=(3, 8, 8), classes=known)
    return Experiment(
        names={"dataset": "d", "model": "m", "method": "g"},
        dataset=ImageFolder(str(root), transform, **fields),
        model=model,
        method=Gradient(),
        target=target,
        select=select or Selection(),
    )


def explained(made: Experiment) -> list[int]:
    return made.samples(made.dataset.uids, 8).batch(made.dataset.uids).target.tolist()


# ---- one text ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "index"),
    [("zebra", 4), ("Zebra", 4), ("tabby", 0), ("tabby cat", 0), ("TABBY_CAT", 0), ("Great-White_shark", 1), ("3", 3)],
)
def test_a_name_is_found_without_case_by_any_of_its_spellings(text, index):
    assert names().find(text) == index


def test_what_is_not_found_or_means_two_says_so():
    assert "is none of the net's classes; is it great white shark?" in names().find("shark")
    assert names().find("crane") == "'crane' is the name of classes 2, 3: give its number"
    assert "none of the net's classes" in names().find("5")
    assert "the number of one class and the name of another, class 1" in names("0", "2", "7").find("2")
    assert names("0", "2", "7").find("7") == 2


def test_wordnet_ids_are_known_where_the_names_are_imagenets():
    table = imagenet_classes()
    torchvisions = classes_of(torchvision_net, arch="resnet18", weights="DEFAULT")
    timms = classes_of(timm_net, arch="vit_tiny_patch16_224", pretrained=True)
    for found in (torchvisions, timms, ClassNames.of([name for _, name in table.values()], "")):
        assert [found.find(wnid) for wnid in ("n01440764", "n02012849", "n03126707")] == [0, 134, 517]
        assert found.find("zebra") == 340
        assert found.shown(2) == "great white shark"
    assert timms.find("crane") == "'crane' is the name of classes 134 (n02012849), 517 (n03126707): give its WordNet id"
    shifted = [table[(i + 1) % 1000][1] for i in range(1000)]
    assert not ClassNames.of(shifted, "").wnids


def test_the_library_says_nothing_of_other_heads_and_weights_from_elsewhere():
    assert classes_of(timm_net, arch="vit_tiny_patch16_224", pretrained=True, num_classes=5) is None
    assert classes_of(timm_net, arch="vit_tiny_patch16_224") is None
    assert classes_of(torchvision_net, arch="resnet18") is None
    assert len(classes_of(torchvision_net, arch="fcn_resnet50", weights="DEFAULT")) == 21
    assert classes_of(small_cnn) is None


def test_numbers_of_the_data_that_agree_with_a_name_stay():
    numbered = {0: "crane", 2: "crane", 3: "crane", 4: "Zebra"}
    found, problems = names().match(numbered)
    assert found == {2: 2, 3: 3, 4: 4}
    assert list(problems) == [0]  # the name of two classes, and neither is class 0
    assert names().match({0: "zebra", 1: "tabby"})[0] == {0: 4, 1: 0}
    assert list(names().match({0: "4"})[1]) == [0], "a name is not a number where the data number their classes"
    assert names().match({0: "4"}, "folders")[0] == {0: 4}


# ---- folders and labels --------------------------------------------------------------------------


def test_folders_are_found_among_the_nets_classes(tmp_path):
    made = cell(folders(tmp_path, "4", "Great_white_shark", "tabby"), names())
    assert made.dataset.uids == ("4/a", "Great_white_shark/a", "tabby/a")
    assert explained(made) == [4, 1, 0]
    assert [made.class_name(i) for i in (4, 1, 0)] == ["zebra", "great white shark", "tabby"]


def test_folders_that_the_net_does_not_know_are_refused_with_both_lists(tmp_path):
    made = cell(folders(tmp_path, "dog", "zebra"), names())
    with pytest.raises(UserError, match="'dog' is none of the net's classes") as refused:
        made.dataset_key  # noqa: B018
    text = str(refused.value)
    assert "data: dog\n" in text
    assert "net (the test): tabby, great white shark, crane, crane, zebra" in text
    assert explained(cell(tmp_path, names(), target="predicted")) is not None
    (tmp_path / "list.txt").write_text("zebra/a\n")
    only = cell(tmp_path, names(), select=Selection(list=str(tmp_path / "list.txt")))
    assert only.samples(["zebra/a"], 1).batch(["zebra/a"]).target.tolist() == [4]
    with pytest.raises(SampleError, match=r"dog/a has class 0 \(dog\), which the net does not know"):
        only.samples(["dog/a"], 1).batch(["dog/a"])


@pytest.mark.parametrize("known", [None, names()])
def test_folders_that_are_splits_are_no_classes(known, tmp_path):
    dataset = ImageFolder(str(folders(tmp_path, "train/zebra", "Val/zebra")), ImageTransform(8))
    with pytest.raises(UserError, match=r"dataset: its folders are splits \(Val, train\), not classes; name one of"):
        matched(dataset, known, dataset.uids)


def test_nets_without_names_take_the_places_of_the_folders_as_before(tmp_path):
    made = cell(folders(tmp_path, "dog", "zebra"), None)
    assert explained(made) == [0, 1]
    assert made.class_name(1) == "zebra"
    assert made.dataset_key == cell(tmp_path, ClassNames((), "model.classes=none")).dataset_key


def test_only_another_order_of_classes_makes_another_key(tmp_path):
    plain = cell(folders(tmp_path, "dog", "zebra"), None).dataset_key
    assert cell(tmp_path, names("Dog", "zebra", "x", "y", "z")).dataset_key == plain
    orders = ("zebra", "dog", "x", "y", "z"), ("zebra", "x", "dog", "y", "z")
    keys = {cell(tmp_path, names(*order)).dataset_key for order in orders}
    assert len({plain, *keys}) == 3
    predicted = [cell(tmp_path, given, target="predicted").dataset_key for given in (names(*orders[0]), None)]
    assert predicted[0] == predicted[1], "nothing is asked of the labels"


def test_names_in_a_table_of_labels(tmp_path):
    folders(tmp_path / "images", "a", "b")
    table = tmp_path / "labels.csv"
    table.write_text("file,label\na/a.png,zebra\nb/a.png,tabby\n")
    made = cell(tmp_path / "images", names(), labels=str(table))
    assert explained(made) == [4, 0]
    with pytest.raises(UserError, match=r"its labels are names .*model.classes.*dataset.classes"):
        explained(cell(tmp_path / "images", None, labels=str(table)))
    table.write_text("file,label\na/a.png,1\nb/a.png,4\n")
    assert explained(cell(tmp_path / "images", names(), labels=str(table))) == [1, 4]


def test_a_class_index_of_the_data_must_be_the_nets(tmp_path):
    folders(tmp_path / "images", "n1", "n2")
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"4": ["n1", "zebra"], "0": ["n2", "tabby"]}))
    assert explained(cell(tmp_path / "images", names(), classes=str(index))) == [4, 0]
    index.write_text(json.dumps({"1": ["n1", "zebra"], "2": ["n2", "tabby"]}))
    assert explained(cell(tmp_path / "images", names(), classes=str(index))) == [4, 0]


def test_a_net_of_five_classes_does_not_bear_the_names_of_a_thousand(tmp_path):
    folders(tmp_path, "n01440764", "n01491361")
    predicted = cell(tmp_path, None, target="predicted", classes="imagenet")
    assert [predicted.class_name(i) for i in range(5)] == [""] * 5
    with pytest.raises(UserError, match=r"classes up to 999 .*the net has 5, and nothing says"):
        cell(tmp_path, None, classes="imagenet").dataset_key  # noqa: B018
    assert cell(tmp_path, None, outputs=1000, target="predicted", classes="imagenet").class_name(2).startswith("great")


# ---- where the net's names come from ----------------------------------------------------------


def test_model_classes_and_the_checkpoint(tmp_path):
    def said(**node):
        return names_of_classes(node, small_cnn, "model")

    save_checkpoint(tmp_path / "own.safetensors", net(2), {"classes": ["cat", "dog"]})
    save_checkpoint(tmp_path / "plain.safetensors", net(2), {})
    own, plain = str(tmp_path / "own.safetensors"), str(tmp_path / "plain.safetensors")
    assert said(checkpoint=own).names == ("cat", "dog")
    assert said(checkpoint=own, classes="imagenet").names == ("cat", "dog"), "a checkpoint knows better than a preset"
    assert said(checkpoint=own, classes=["a", "b"]).names == ("a", "b")
    assert said(checkpoint=plain) is None
    assert said(checkpoint=plain, classes="imagenet").find("n02391049") == 340
    assert len(said(classes="none")) == 0
    table = tmp_path / "t.json"
    table.write_text('{"0": ["n2", "zebra"], "1": ["n1", "cat"]}')
    assert said(classes=str(table)).find("n1") == 1
    assert said(classes=str(table)).find("ZEBRA") == 0, "its ids are none of ImageNet's"
    table.write_text("{}")
    with pytest.raises(UserError, match=r"model: classes: .* names no class"):
        said(classes=str(table))
    with pytest.raises(UserError, match=r"model.classes names 2 classes, but the net has 5"):
        Classifier(net(5), input_shape=(3, 8, 8), classes=ClassNames(("a", "b"), "model.classes"))


def test_a_net_that_names_some_of_its_classes_only(tmp_path):
    table = tmp_path / "t.json"
    table.write_text('{"0": "zebra", "2": ["n1", "cat"]}')
    for classes in (str(table), ["zebra", None, "cat"]):
        some = names_of_classes({"classes": classes}, small_cnn, "model")
        assert some.names == ("zebra", "", "cat")
        assert (some.find("Zebra"), some.find("cat"), some.find("1")) == (0, 2, 1)
        assert "none of the net's classes" in some.find("")
        assert str(some) == "zebra, 1, cat"
    assert some.match({0: "zebra", 1: "dog"})[1] == {1: "'dog' is none of the net's classes"}
    assert some.match({0: "zebra", 1: "1"}, "folders") == ({0: 0, 1: 1}, {})
    about = SimpleNamespace(num_labels=3, id2label={0: "LABEL_0", "1": "cat"})
    assert names_of(about) == ("", "cat", "")
    assert names_of(SimpleNamespace(num_labels=2, id2label={0: "LABEL_0", 1: "LABEL_1"})) is None


def test_names_of_the_module_that_are_of_another_head_are_dropped():
    module = net(5)
    module.class_names = ("a", "b")
    assert Classifier(module, input_shape=(3, 8, 8)).classes is None
    module.class_names = tuple("abcde")
    assert Classifier(module, input_shape=(3, 8, 8)).class_names == tuple("abcde")


def test_the_command_of_the_readme(tmp_path, capfd):
    root, run = folders(tmp_path / "mine", "sneaker", "Bag"), command(capfd)
    clothes = "[t-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot]"
    given = ["dataset=image_folder", f"dataset.root={root}", "model=small_cnn", "method=gradient", "metric=[]"]
    given += [f"run.root={tmp_path / 'w'}", "run.progress=false"]
    ended = run(*given, f"+model.classes={clothes}")
    assert ended.status == 0, ended.err
    stored = only_cell(tmp_path / "w").maps.index()
    assert {uid: record.info["target"] for (uid, _), record in stored.items()} == {"sneaker/a": 7, "Bag/a": 8}
    folders(root, "dog")
    ended = run(*given, f"+model.classes={clothes}")
    assert ended.status == 2
    assert "'dog' is none of the net's classes" in ended.err
    assert "trouser" in ended.err
