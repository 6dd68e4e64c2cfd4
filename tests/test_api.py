"""``attrib.explain`` and its sisters: the numbers of the runner, and what is refused."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from nets import SmallCNN, small_cnn, small_cnn_images
from PIL import Image
from test_text_run import TEXTS, folder  # noqa: F401  a fixture
from tiny import only_cell, pictures, pixels
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import attrib
from attrib.api.lines import written
from attrib.cli.main import dispatch
from attrib.config.compose import compose
from attrib.datasets import HuggingFaceEncoder, ImageTransform, WordEncoder
from attrib.datasets.images import ImageDataset
from attrib.methods.baselines import Gradient
from attrib.methods.iba import IBA
from attrib.metrics import EHR
from attrib.models import AcdLSTM, Classifier
from attrib.results import tables
from attrib.types import Batch, SampleError, UserError

SQUARE = ImageTransform(size=32, mean=(0.286,) * 3, std=(0.353,) * 3)
FEW = {"steps": 2, "batch": 2}  # of IBA


@pytest.fixture(scope="module")
def images():
    return small_cnn_images()[0][:3]


def run_as_printed(text: str, root) -> dict[str, np.ndarray]:
    """uid -> map, of what a printed command line computes."""
    assert dispatch([*shlex.split(text)[1:], f"run.root={root}", "run.progress=false"]) == 0
    cell = only_cell(root)
    return {uid: cell.maps.read((uid, f))["map"] for uid, f in cell.maps.index()}


# ---- the same numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "fields"), [("iba", FEW), ("smooth_grad", {"samples": 3})])
def test_images_have_the_runners_maps_and_scores_to_the_bit(tmp_path, method, fields):
    overrides = [f"dataset.root={pictures(tmp_path, 3)}", "metric.insertion_deletion.steps=3"]
    data = attrib.dataset("image_folder", "lenet", overrides=overrides)
    given = dict(fit="image_folder", seed=3, run={"batch": 2}, overrides=overrides)
    explanation = attrib.explain("lenet", data, method=method, **given, **fields)
    scored = "metric=[insertion_deletion] metric.insertion_deletion.steps=3"
    stored = run_as_printed(f"{explanation.command()} {scored}", tmp_path / "work")
    assert list(explanation.uids) == sorted(stored)
    assert len(stored) == 3
    for uid, map in zip(explanation.uids, explanation.map):
        np.testing.assert_array_equal(map, stored[uid])
    # Scores of the maps, and the same of pictures that are no files, whose names are given.
    frame = tables.rows(tmp_path / "work")
    known = {(r.uid, r.column): r.value for r in frame.itertuples()}
    loose = attrib.explain(
        "lenet", [Image.open(tmp_path / "images" / f"{uid}.png") for uid in data.uids], uids=data.uids,
        method=method, **given, **fields,
    )  # fmt: skip
    for found in (explanation, loose):
        rows = attrib.evaluate(None, None, found, "insertion_deletion", overrides=overrides)
        assert {(r.uid, r.column): r.value for r in rows.itertuples()} == known
    assert torch.equal(loose.map, explanation.map)


@pytest.mark.parametrize(("method", "fields"), [("iba", FEW), ("integrated_gradients", {"steps": 3})])
def test_texts_have_the_runners_maps_to_the_bit(tmp_path, folder, method, fields):  # noqa: F811
    overrides = [f"model.checkpoint={folder / 'net.safetensors'}", f"dataset.path={folder / 'films.tsv'}"]
    given = dict(method=method, fit="text_csv", run={"batch": 6}, overrides=overrides)
    data = attrib.dataset("text_csv", "deep_lstm", overrides=overrides)
    explanation = attrib.explain("deep_lstm", data, **given, **fields)
    stored = run_as_printed(explanation.command(), tmp_path / "work")
    for uid, map in zip(explanation.uids, explanation.map):
        np.testing.assert_array_equal(map[: len(stored[uid])], stored[uid])
        assert not map[len(stored[uid]) :].any()
    sentences = attrib.explain("deep_lstm", TEXTS, uids=data.uids, **given, **fields)
    assert torch.equal(sentences.map, explanation.map)
    scored = sentences.evaluate("insertion_deletion")
    assert set(scored["state"]) == {"ok"}
    assert len(set(scored["uid"])) == len(TEXTS)


def test_the_printed_python_computes_the_command_lines_map(tmp_path, capsys):
    words = ["model=lenet", "dataset=image_folder", f"dataset.root={pictures(tmp_path, 2)}", "method=iba",
             "method.steps=2", "method.batch=2", "seed=1", "run.batch=1", "dataset.target=3", "metric=[]"]  # fmt: skip
    assert dispatch(["run", "--python", *words]) == 0
    lines = capsys.readouterr().out
    stored = run_as_printed(shlex.join(["attrib", "run", *words, "run.limit=1"]), tmp_path / "work")
    space: dict = {}
    exec(lines.replace('explanation.save("explanation")', ""), space)
    ((uid, map),) = stored.items()
    assert space["explanation"].uids == (uid,)
    np.testing.assert_array_equal(space["explanation"].map[0], map)
    assert dispatch(["run", "--python", "-m", "method=iba,random"]) == 2
    assert "leave -m out" in capsys.readouterr().err


def test_the_printed_python_scores_what_the_run_would(capsys):
    for given, printed in (((), "['insertion_deletion']"), (("metric=[ehr]",), "['ehr']")):
        assert dispatch(["run", "--python", "dataset=digits", "model=lenet", "method=random", *given]) == 0
        assert f"explanation, {printed})" in capsys.readouterr().out


def test_a_module_a_classifier_and_a_loader(images):
    net, estimation = small_cnn(), small_cnn_images("est_images")[0][:8]
    given = dict(target=[1, 2, 3], method="iba", layers="features.5", **FEW)
    one = attrib.explain(net, images, fit=estimation, **given)
    loader = DataLoader(TensorDataset(estimation, torch.zeros(8)), batch_size=3, shuffle=True)
    assert torch.equal(attrib.explain(net, images, fit=loader, **given).map, one.map)
    model = Classifier(net, {"bottleneck": "features.5"})
    given.pop("layers")
    assert torch.equal(attrib.explain(model, images, fit=list(estimation), **given).map, one.map)
    assert torch.equal(
        attrib.explain(model, images, fit=estimation, **{**given, "method": IBA(**FEW), "steps": 2}).map, one.map
    )
    assert one.target.tolist() == [1, 2, 3]
    assert attrib.explain(net, images, np.int64(2), "random").target.tolist() == [2, 2, 2]


def test_precision(images):
    net, given = small_cnn(), dict(method="gradient", target=1)
    coarse = attrib.explain(net, images, precision={"explain": "bfloat16"}, **given)
    assert not torch.equal(coarse.map, attrib.explain(net, images, **given).map)
    model = Classifier(net).with_precision("bfloat16")
    assert torch.equal(attrib.explain(model, images, **given).map, coarse.map)
    found = attrib.compare(
        net, images, ["gradient", "random"], "infidelity", target=1, precision={"explain": "bfloat16"}
    )
    assert torch.equal(found.explanations["gradient"].map, coarse.map)
    with pytest.raises(UserError, match="computed in bfloat16 already"):
        attrib.explain(model, images, precision="float16", **given)
    named = attrib.explain("lenet", pixels(32, 32), method="gradient", precision="bfloat16")
    assert "precision={explain:bfloat16,score:bfloat16}" in shlex.split(named.command())


def test_names_belong_to_contents(images):
    """The order, and what else is explained, change nothing; equal images have names of their own."""
    net = small_cnn()

    def explain(x, **more):
        return attrib.explain(net, x, 0, "smooth_grad", samples=2, run={"batch": 1}, **more)

    whole, turned = explain(images), explain(images.flip(0))
    assert turned.uids == whole.uids[::-1]
    assert torch.equal(turned.map.flip(0), whole.map)
    assert len(set(explain(images[[0, 0]]).uids)) == 2
    assert explain(list(images), uids=["c", "a", "b"]).uids == ("c", "a", "b")
    assert not torch.equal(explain(images, seed=1).map, whole.map)


def test_what_a_batch_brings_is_used(images):
    roi = torch.zeros(3, 32, 32, dtype=torch.bool)
    roi[:, :8] = True
    batch = Batch(("a", "b", "c"), images, torch.tensor([0, 1, 2]), roi=roi)
    explanation = attrib.explain(small_cnn(), batch, "label", "gradient")
    assert explanation.target.tolist() == [0, 1, 2]
    inside = explanation.evaluate("ehr_unweighted")
    given = attrib.evaluate(small_cnn(), images, explanation.map, "ehr_unweighted", roi, target=[0, 1, 2])
    assert inside["value"].tolist() == given["value"].tolist()


# ---- scores -----------------------------------------------------------------------------------------------


def test_regions_of_pictures_are_in_their_own_pixels():
    picture, region = Image.fromarray(pixels(64, 64)), np.zeros((64, 64), bool)
    region[:32] = True
    maps = torch.zeros(1, 32, 32)
    maps[:, :16] = 1  # after resizing: the same half
    scored = attrib.evaluate(small_cnn(), picture, maps, {"mine": EHR()}, region, transform=SQUARE)
    assert scored["metric"].tolist() == ["mine"]
    assert scored["value"].tolist() == pytest.approx([1.0])
    with pytest.raises(UserError, match=r"region of .* is \(32, 32\), but the sample is \(64, 64\)"):
        attrib.evaluate(small_cnn(), picture, maps, "ehr", region[:32, :32], transform=SQUARE)


def test_a_score_that_is_not_defined_says_why(images):
    rows = attrib.evaluate(small_cnn(), images, torch.ones(3, 32, 32), "ehr", torch.zeros(3, 32, 32, dtype=torch.bool))
    assert set(rows["state"]) == {"failed"}
    assert "no region of interest" in rows["reason"][0]


def test_a_metric_that_raises_costs_its_samples_only(images):
    rows = attrib.evaluate(
        small_cnn(), images[..., :4, :4].repeat(1, 1, 8, 1), torch.ones(3, 32, 4), "insertion_deletion"
    )
    assert set(rows["state"]) == {"failed"}
    assert "a blur window of 9 pixels does not fit" in rows["reason"][0]


def test_comparison(images, tmp_path):
    roi = torch.zeros(3, 32, 32, dtype=torch.bool)
    roi[:, :20] = True
    found = attrib.compare(
        small_cnn(), images, {"a": "gradient", "b": Gradient(), "r": "random"}, ["ehr", "localisation"], roi,
        target="predicted",
    )  # fmt: skip
    alone = attrib.explain(small_cnn(), images, method="gradient")
    assert torch.equal(found.explanations["a"].map, alone.map)
    means = found.table[found.table["column"] == "ehr"].set_index("method")["mean"]
    scored = alone.evaluate("ehr", roi)
    assert means["a"] == pytest.approx(scored["value"].mean())
    assert len(found.tests[found.tests["column"] == "ehr"]) == 3
    assert list(found.rows.columns) == tables.ROWS
    assert "best" in repr(found)
    assert '<table class="scores">' in found._repr_html_()
    saved = found.save(tmp_path / "all")
    assert {p.name for p in saved.iterdir()} >= {
        "comparison.html",
        "scores.csv",
        "table.csv",
        "tests.csv",
        "a",
        "b",
        "r",
    }


# ---- what is shown ----------------------------------------------------------------------------------------


def test_saved_files_and_pictures(images, tmp_path):
    explanation = attrib.explain(small_cnn(), images, 1, "gradient", uids=["../a", "b", "<i>c"])
    saved = explanation.save(tmp_path / "here")
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.png")) == [
        "here/map/%2E%2E/a.png", "here/map/%3Ci%3Ec.png", "here/map/b.png"
    ]  # fmt: skip
    page = (saved / "explanation.html").read_text()
    assert "<i>c" not in page
    assert "&lt;i&gt;c" in page
    assert "http" not in page.replace("http-equiv", "")
    import safetensors.torch

    assert torch.equal(safetensors.torch.load_file(saved / "maps.safetensors")["map"], explanation.map)
    assert len(explanation.plot().axes) == 6
    many = attrib.explain(small_cnn(), images.repeat(9, 1, 1, 1), 1, "random")
    assert "The first 24 of 27 samples" in many._repr_html_()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        explanation.save(tmp_path / "file")


def test_words_trees_and_sounds_show_themselves(folder):  # noqa: F811
    overrides = [f"model.checkpoint={folder / 'net.safetensors'}"]
    words = attrib.explain("deep_lstm", ["the film is good <b>"], 1, "gradient", overrides=overrides)
    html = words._repr_html_()
    assert ">good</span>" in html
    assert "<b>" not in html.replace("<b>gradient</b>", "")
    assert words.plot().texts
    tree = attrib.explain("deep_lstm", "not good and bad", 1, "acd_text", overrides=overrides)
    assert 'class="phrases"' in tree._repr_html_()
    assert tree.documents["tree"][0]["nodes"]
    rate = 8000
    tone = np.sin(np.arange(rate // 2) * 0.3)
    sound = attrib.explain("tone_cnn", [tone, (tone[::2].copy(), rate // 2)], 0, "gradient")
    assert sound.map.shape == (2, 4096)
    assert sound._repr_html_().count("<img") == 4
    assert len(sound.plot().axes) == 4


# ---- what is refused --------------------------------------------------------------------------------------


class Ids(nn.Module):
    def forward(self, x):
        return x.float().mean(1, keepdim=True).repeat(1, 2)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(net="lenett"), r"there is no model 'lenett' \(there are: lenet, lenet_\w+"),
        (dict(method="gradcam"), r"there is no method 'gradcam' \(there are: grad_cam,"),
        (dict(method="iba,random"), "there is no method 'iba,random'"),
        (dict(method="nowhere.yaml"), "nowhere.yaml cannot be read"),
        (dict(method=IBA), "the class IBA; give a method such as"),
        (dict(method="gradient", reduces=1), "no field 'reduces'; did you mean 'reduce'"),
        (dict(method=Gradient(), reduces=1), "no field 'reduces'; did you mean 'reduce'"),
        (dict(method="iba"), "iba is fitted on data first: .*fit="),
        (dict(method="iba", fit="photo"), r"there is no dataset 'photo' \(there are: photos,"),
        (dict(method="iba", fit=[]), "fit holds no sample"),
        (dict(net=3), "net is int; give a torch.nn.Module"),
        (dict(x={"a": 1}), "x is dict; give a tensor"),
        (dict(x=[torch.zeros(3, 32, 32), "cat.jpg"]), "x mixes tensors and texts or files"),
        (dict(x=torch.zeros(3, 32, 32)), r"shape \(3, 32, 32\).*; give images \(N, C, H, W\)"),
        (dict(x=np.zeros((32, 32, 3), np.uint8)), "nothing says how this net wants them; say transform="),
        (dict(x=np.zeros((32, 32, 3)), transform=SQUARE), "images are uint8"),
        (dict(x=["no.png"], transform=SQUARE), "no.png cannot be read"),
        (dict(x="a sentence"), "tokenizer="),
        (dict(x=(np.zeros(8), 8000)), "nothing says how this net wants them"),
        (dict(x=(np.zeros(8), 8000), transform=SQUARE), "x holds sounds, but the net wants images"),
        (dict(transform=3), "transform is int; give"),
        (dict(transform={"sizes": 3}), "no field 'sizes'; did you mean 'size'"),
        (dict(transform=SQUARE, tokenizer="x"), "not both"),
        (dict(net="lenet", transform=SQUARE), "model lenet says itself how it wants its data"),
        (dict(target=[1, 2]), "3 samples need as many classes"),
        (dict(target="tabby"), "tabby"),
        (dict(uids=["a"]), "1 names for 3 samples"),
        (dict(uids=["a", "a", "b"]), "a name stands for two samples"),
        (dict(run={"limit": 3}), "run: 'limit' means nothing here"),
        (dict(run={"device": "tpu"}), "run.device=tpu"),
        (dict(overrides=["seed=3"]), "only model.*"),
        (dict(overrides=["model.num_classes=3"]), "only a model that is chosen by its name takes overrides"),
        (dict(layers="features.0"), "the method reads none"),
        (dict(method="grad_cam", layers={"cam": "feature.0"}), "has no layer 'feature.0'; did you mean 'features.0'"),
        (dict(method="attention_raw"), "attention"),
        (dict(bta=3, method="iba"), r"^method iba: .*IBA has no field 'bta'; did you mean 'beta'"),
        (dict(beta="x", method="iba"), r"^method iba: beta must be float"),
        (dict(device="cuda"), r"no field 'device'.*; device is a setting of the run: run=\{'device': 'cuda'\}"),
        (dict(rows=3, method=Gradient()), r"no field 'rows'.*: run=\{'rows': 3\}"),
        (dict(target=-1), "target must be .*, not -1; classes are numbered from 0 to"),
        (dict(target=True), "target must be .*, not True; classes are numbered from 0 to"),
    ],
)
def test_refused_by_name(images, wrong, words):
    arguments = {"net": small_cnn(), "x": images, "method": "gradient", **wrong}
    with pytest.raises(UserError, match=words):
        attrib.explain(**arguments)


def test_refused_parts_of_scores(images):
    net, maps = small_cnn(), torch.rand(3, 32, 32)
    for arguments, words in [
        ((maps, "ehrs"), r"there is no metric 'ehrs' \(there are: ehr,"),
        ((maps, []), "metrics: none is given"),
        ((maps, "ehr"), "needs regions of interest; give them as roi="),
        ((maps[:2], "insertion_deletion"), "map has 2 maps for 3 samples"),
        ((maps[:, :5], "insertion_deletion"), r"is \(5, 32\), but its input has \(32, 32\)"),
        ((maps, "lipschitz"), "give it an Explanation"),
        ((maps, EHR), "the class EHR"),
        ((maps, "ehr", torch.ones(3, 32, 32)), "not bool"),
    ]:
        with pytest.raises(UserError, match=words):
            attrib.evaluate(net, images, *arguments)
    with pytest.raises(UserError, match="gradient comes twice"):
        attrib.compare(net, images, ["gradient", "gradient"])


def test_an_object_has_no_command(images):
    with pytest.raises(UserError, match="SmallCNN was handed over as an object"):
        attrib.explain(small_cnn(), images, method="gradient").command()


def test_a_method_object_has_the_command_of_its_preset():
    explanation = attrib.explain("lenet", pixels(32, 32), method=Gradient(reduce="abs_sum"))
    assert "method=gradient +method.reduce=abs_sum" in explanation.command("mnist")
    assert "dataset=mnist" in explanation.command("mnist")


def test_samples_that_fail_are_named(images):
    class Odd(SmallCNN):
        def forward(self, x):
            return super().forward(x) / (x.mean((1, 2, 3), keepdim=False)[:, None] > 50).logical_not()

    images = torch.cat((images, torch.full((1, 3, 32, 32), 100.0)))
    found = attrib.explain(Odd(), images, 0, "gradient", uids=["a", "b", "c", "d"])
    assert (found.uids, found.failures) == (("a", "b", "c"), {"d": "d: the map has NaN or infinite values"})
    with pytest.raises(SampleError, match=r"^d: the map has NaN"):
        attrib.explain(Odd(), images[3:], 0, "gradient", uids=["d"])


def test_data_that_cannot_be_asked_for_by_name(images):
    class Stream(IterableDataset):
        def __iter__(self):
            yield images[0]

    with pytest.raises(UserError, match="Stream has no length"):
        attrib.explain(small_cnn(), Stream())
    with pytest.raises(UserError, match="sample 0 is str"):
        attrib.explain(small_cnn(), DataLoader(["a", "b"]))


def test_own_text_nets_need_their_tokenizer_and_embedding():
    net = AcdLSTM(vocab_size=6, embedding_dim=4, hidden_dim=3, num_classes=2)
    encoder = WordEncoder(["<unk>", "<pad>", "good", "bad", "film", "a"])
    explanation = attrib.explain(
        net, ["a good film", "bad"], 1, "gradient", layers={"embedding": "embed"}, tokenizer=encoder
    )
    assert explanation.map.shape == (2, 3)
    assert explanation.map[1, 1:].eq(0).all()
    found = attrib.explain(net, ["a good film", "bad"], 1, "gradient", tokenizer=encoder)  # it is the only one
    assert torch.equal(found.map, explanation.map)
    net.more = nn.Embedding(3, 4)
    with pytest.raises(UserError, match=r"its embeddings are embed, more.*layers=\{\"embedding\": \"PATH\"\}"):
        attrib.explain(net, ["a good film"], 1, "gradient", tokenizer=encoder)
    scores = attrib.evaluate(
        net, ["a good film"], [torch.ones(3)], "insertion_deletion", layers={"embedding": "embed"}, tokenizer=encoder
    )
    assert (scores["state"] == "ok").all()
    assert (found.evaluate("eraser")["state"] == "ok").all()  # whose padding the tokenizer knows
    with pytest.raises(UserError, match=r"the net has 6 ids .* its input has 8"):
        attrib.explain(
            net,
            ["a"],
            1,
            "gradient",
            layers={"embedding": "embed"},
            tokenizer=WordEncoder(["<unk>", "<pad>", *"abcdef"]),
        )


# ---- lightness --------------------------------------------------------------------------------------------


def test_import_loads_no_torch():
    code = "import sys, attrib; assert 'torch' not in sys.modules; assert 'explain' in dir(attrib); attrib.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "module 'attrib' has no attribute 'nothing'" in done.stderr


def test_values_survive_the_command_line():
    values = [None, True, 3, -0.5, 1e-7, "a", "a'b\\", "3", "null", "a,b", "", [1, [None]], {"of": "x y"}]
    fields = [f"+method.f{i}={written(value)}" for i, value in enumerate(values)]
    found = compose("run", ["~dataset", "~model", "metric=[]", "method=random", *fields]).values["method"]
    assert [found[f"f{i}"] for i in range(len(values))] == values


def test_nets_of_transformers_with_their_own_tokenizer(tmp_path):
    from tiny_huggingface import TOWER, WORDS, random_weights, tokenizer
    from transformers import BertConfig, BertForSequenceClassification

    net = random_weights(BertForSequenceClassification(BertConfig(**TOWER, vocab_size=len(WORDS))))
    own = tokenizer()
    for part in (net, own):
        part.save_pretrained(tmp_path)
    before, texts = own.backend_tokenizer.to_str(), ["the film is good", "a bad film"]
    given = dict(target=0, method="input_x_gradient")
    loose = attrib.explain(net, texts, tokenizer=HuggingFaceEncoder.of(own, max_length=8), **given)
    overrides = [f"model.path={tmp_path}", "model.input.max_length=8"]
    assert torch.equal(attrib.explain("huggingface", texts, overrides=overrides, **given).map, loose.map)
    assert own.backend_tokenizer.to_str() == before
    with pytest.raises(UserError, match=r"needs its tokenizer"):
        attrib.explain(net, torch.tensor([[3, 4]]), **given)
    with pytest.raises(UserError, match=r"set it, for example 512"):
        attrib.explain(net, texts, tokenizer=own, **given)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (lambda: pixels(32, 32), ["dataset=image_folder", "dataset.root=FOLDER"]),
        (lambda: torch.rand(1, 1, 32, 32), ["dataset=image_folder", "dataset.root=FOLDER"]),
        (lambda: attrib.dataset("digits", "lenet"), ["dataset=digits"]),
        (lambda: Tiny(ImageTransform(size=(32, 32), mean=(0.5,), std=(0.5,))), ["dataset=NAME"]),
    ],
)
def test_a_command_is_about_the_data_that_were_explained(samples, words):
    x = samples()
    uids = x.uids[:1] if hasattr(x, "uids") else None
    explanation = attrib.explain("lenet", x, method="gradient", target=1, uids=uids)
    given = [word for word in shlex.split(explanation.command()) if word.startswith("dataset")]
    assert given == [*words, "dataset.target=1"]


class Tiny(ImageDataset):
    """A data set of one's own, of which no preset tells."""

    def __init__(self, transform):
        super().__init__(["a"], transform)

    def open(self, uid):
        stream = io.BytesIO()
        Image.fromarray(pixels(32, 32)).save(stream, "png")
        return io.BytesIO(stream.getvalue())

    def label(self, uid):
        return 0


def test_a_layer_that_must_be_named_is_asked_for_as_python_has_it():
    encoder = WordEncoder(["<unk>", "<pad>", "a", "b"])
    net = torch.nn.Sequential(torch.nn.Embedding(encoder.size, 4), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    with pytest.raises(UserError, match=r"role 'bottleneck' .*; give layers=\{\"bottleneck\": \"PATH\"\}"):
        attrib.explain(net, ["a b"], method="iba", tokenizer=encoder, fit=["b a"])
