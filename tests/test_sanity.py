"""The sanity check end to end: copies of a net, their maps, agreements, tables and the report."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from nets import small_cnn, small_cnn_images
from tiny import Result, command, pictures

from attrib import report, sanity
from attrib.methods.iba import IBA
from attrib.methods.input_iba import InputBottleneck, InputIBA
from attrib.methods.input_iba_stages import InputIBAStages
from attrib.methods.parts.wgan import WGAN
from attrib.models import Classifier, Randomise
from attrib.models.randomise import randomised
from attrib.noise import Noise
from attrib.results import labels, tables
from attrib.store.cell import cells
from attrib.types import Batch, UserError

LAYERS = ["classifier.3", "classifier.0", "features.8", "features.5", "features.3", "features.0"]


@pytest.fixture
def check(monkeypatch, capfd, tmp_path):
    """tools/sanity.py on small pictures and a small net."""
    images = pictures(tmp_path)

    def run(*arguments: str, root: str = "work") -> Result:
        common = ("dataset=tiny", "model=small_cnn", "run.progress=false", "run.batch=4", "run.device=cpu")
        roots = (f"dataset.root={images}", f"run.root={tmp_path / root}")
        return command(capfd, "sanity")(*common, *roots, *arguments)

    run.root = tmp_path / "work"
    return run


def summary(root):
    table = sanity.summary(labels.labelled(root), tables.rows(root))
    return table.set_index(["contender", "column", "place"]).sort_index()


def test_more_and_more_layers(check):
    grid = "sanity.layers=[1,3,all]"
    first = check("-m", "method=random,gradient", grid)
    assert first.status == 0, first.err
    assert first.out.count("maps_computed=6") == 2 * 4
    assert first.out.count("18 samples compared") == 2
    table = summary(check.root)
    assert list(table.loc["gradient", "spearman"]["layer"]) == [LAYERS[0], LAYERS[2], LAYERS[5]]
    assert set(table["n"]) == {6}
    assert (table["total"] == 6).all()
    # A map that has nothing to do with the net does not change; the gradient of a wholly random net is another.
    assert table.loc["random", "mean"].to_numpy() == pytest.approx(1)
    assert abs(table.loc[("gradient", "spearman", 6), "mean"]) < 0.1
    assert abs(table.loc[("gradient", "ssim", 6), "mean"]) < 0.2
    verdicts = {v.contender: v.passed for v in sanity.verdicts(table.reset_index())}
    assert verdicts == {"random": False, "gradient": True}
    for text in ("random: hardly depends on the weights", "gradient: depends on the weights", "1.00 [1.00"):
        assert text in first.out

    # Again: only what was lost is made.
    (lost,) = check.root.glob("*small_cnn-random-3.gradient.*")
    shutil.rmtree(lost)
    again = check("method=gradient", grid)
    assert again.out.count("maps_computed=6") == 1
    assert again.out.count("maps_computed=0 maps_present=6") == 3
    assert "6 samples compared" in again.out
    assert summary(check.root)["mean"].to_numpy() == pytest.approx(table["mean"].to_numpy(), abs=1e-6)

    # The report: copies have a section of their own, and no other.
    page = report.page(check.root)
    assert page.count("<h2>Sanity check") == 1
    assert re.findall(r"<h2>tiny<small>(.*?)</small>", page) == ["small_cnn"]
    assert page.count("with the original&#39;s maps") >= 1
    assert len(re.findall(r'class="(passes|fails)"', page)) == 2
    assert page.count('loading="lazy"') == 6 * (1 + 2) + 3 * 2 * 4  # gallery, and maps of three samples
    assert page.count("data:image/svg") >= 4


@pytest.mark.slow
def test_chosen_layers_and_what_is_compared(check):
    result = check("method=gradient", "sanity.layers=[classifier,2,all]", "sanity.measures=[hog]", "run.limit=3")
    assert result.status == 0, result.err
    table = summary(check.root).reset_index()
    assert table["column"].unique().tolist() == ["hog"]
    assert table["place"].tolist() == [2, 6]  # the classifier is the last two layers
    assert table[["n", "pending"]].to_numpy().tolist() == [[3, 0]] * 2
    assert "pending" not in result.out
    assert len(cells(check.root)) == 3
    alone = check("method=gradient", "sanity.layers=features.5", "sanity.mode=independent", "run.limit=3")
    assert "small_cnn-random-only-features-5" in {c.folder.name.split(".")[1] for c in cells(check.root)}
    assert "one at a time" in alone.out
    report.page(check.root)


@pytest.mark.slow
def test_shards_and_dry_runs(check):
    module_says = check("method=gradient", "run.dry=true").out  # every number of layers
    assert [name in module_says for name in ("random-1.", "random-6.", "random-7.")] == [True, True, False]
    assert module_says.count("6 to compute") == 7
    assert not check.root.exists() or not cells(check.root)
    for shard in (0, 1):
        check("method=gradient", "sanity.layers=[3]", "run.shards=2", f"run.shard={shard}")
    check("method=gradient", "sanity.layers=[3]", root="whole")
    parts, whole = summary(check.root), summary(check.root.parent / "whole")
    assert set(parts["n"]) == {6}
    # Batches of other sizes round otherwise.
    assert parts["mean"].to_numpy() == pytest.approx(whole["mean"].to_numpy(), abs=1e-5)


def test_the_original_says_which_class_and_which_samples(check):
    """Of a random net the predictions and confidences are others."""
    options = (
        "method=gradient",
        "dataset.target=predicted",
        "dataset.select.min_confidence=0.2",
        "sanity.layers=[all]",
    )
    assert check(*options).status == 0
    original, variant = sorted(cells(check.root), key=lambda c: len(c.folder.name))
    targets = [{uid: r.info["target"] for (uid, _), r in c.maps.index().items()} for c in (original, variant)]
    assert targets[0] == targets[1]
    assert targets[0]
    assert len(set(targets[0].values())) > 1
    assert original.samples() == variant.samples()
    about = variant.spec["randomised"]
    assert about["original"] == original.spec["key"]
    assert about["layers"] == LAYERS
    assert variant.spec["key"] != original.spec["key"]
    assert "randomised" not in original.spec


def test_a_fitted_method_is_fitted_on_each_net(check):
    assert check("method=iba", "method.steps=2", "method.batch=2", "sanity.layers=[1,all]").status == 0
    assert len({c.spec["state_key"] for c in cells(check.root)}) == 3
    assert len(sanity.pairs(labels.labelled(check.root))) == 2


def test_maps_of_other_classes_are_not_compared(check):
    check("method=gradient", "sanity.layers=[all]")
    (variant,) = (c for c in cells(check.root) if "randomised" in c.spec)
    shutil.rmtree(variant.folder / "scores")
    (original,) = (c for c in cells(check.root) if "randomised" not in c.spec)
    key, record = next(iter(original.maps.index().items()))
    late = type(original)(original.folder, "z").maps
    late.add(*key, original.maps.read(key), **{**record.info, "target": 9 - record.info["target"]})
    late.flush()
    assert sanity.compare(check.root, sanity.Agreement()) == 5
    (entry,) = variant.ledger.entries()
    assert entry["uid"] == key[0]
    assert "explains class" in entry["reason"]
    assert set(summary(check.root)["failed"]) == {1}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("sanity.layers=[1,9]", r"layers is 9, but the net has 6 layers with weights; .*classifier\.3, classifier\.0"),
        ("sanity.layers=[features.7]", r"no layer with weights at 'features\.7'"),
        ("sanity.mode=sideways", r"sanity: mode must be 'cascade' or 'independent', not 'sideways'"),
        ("+sanity.layer=1", r"sanity: .*no field 'layer'; did you mean 'layers'"),
        ("sanity.measures=[sim]", "no measure 'sim'"),
        ("sanity.window=4", "window must be odd"),
        ("sanity.layers=1.5", "sanity.layers must be null, or numbers and paths"),
    ],
)
def test_mistakes_are_named_before_anything_is_done(check, argument, message):
    result = check("method=gradient", argument)
    assert result.status == 2
    assert re.search(message, result.err), result.err
    assert not check.root.exists() or not cells(check.root)


def test_without_copies_there_is_nothing_to_draw(check):
    from attrib.report.agreement import tables as drawn

    check("method=gradient", "sanity.layers=[]")
    with pytest.raises(UserError, match="no maps of randomised nets"):
        drawn(check.root)
    assert "Sanity check" not in report.page(check.root)


# ---- InputIBA's own ---------------------------------------------------------------------------


def test_input_iba_across_two_nets():
    net, (x, labels_) = small_cnn(), small_cnn_images()
    original = Classifier(net, {"bottleneck": "features.5"}, dtype=torch.float64)
    copy = randomised(original, net, Randomise("all"), x)
    stages = {
        "feature": IBA(steps=2, batch=2, sigma=None),
        "gan": WGAN(dataset_size=4, sub_dataset_size=2, batch=2, epochs=1, critic_iter=1),
        "input": InputBottleneck(steps=2, batch=2),
    }
    batch = Batch(("a", "b"), x[:2].double(), labels_[:2])
    fitted = [Batch(("e",), x[i : i + 1].double(), labels_[i : i + 1]) for i in range(5)]

    class Data(list):
        uids = ("e",) * 5

    def maps(method, model):
        state = method.fit.run(model, Data(fitted), None, lambda line: None)
        found = method.attribute(model, batch, state, Noise(batch.uids, dtype=torch.float64))
        return {name: found[name] for name in ("feature", "loss_critic", "input")}

    def same(a, b):
        return {name: torch.equal(a[name], b[name]) for name in a}

    plain, random = maps(InputIBA(**stages), original), maps(InputIBA(**stages), copy)
    late = maps(InputIBAStages(**stages, randomised_from="input"), copy)
    early = maps(InputIBAStages(**stages, randomised_from="gan"), copy)
    assert same(late, plain) == {"feature": True, "loss_critic": True, "input": False}
    assert same(early, plain) == {"feature": True, "loss_critic": False, "input": False}
    assert same(random, plain) == {"feature": False, "loss_critic": False, "input": False}
    assert all(same(maps(InputIBAStages(**stages), original), plain).values())  # of the original it is InputIBA
    with pytest.raises(UserError, match=r"randomised_from is .*must be one of gan, input"):
        InputIBAStages(randomised_from="feature")
