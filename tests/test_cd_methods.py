"""The methods ``cd`` and ``acd`` on small nets, and ACD from the command line to the report."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from contracts import seeded
from nets import golden
from sentences import bag_of_words, classifier, lstm, some_sentences
from sentences import texts as as_batch
from tiny import command, pictures, tool
from torch import nn

from attrib import report
from attrib.agglomeration.trees import Tree
from attrib.decomposition import Decomposer
from attrib.methods.acd import ACD
from attrib.methods.cd import CD
from attrib.models import AcdCNN, Classifier
from attrib.noise import Noise
from attrib.sanity.perturbed_trees import perturbed, tree_agreement
from attrib.store.cell import cells
from attrib.types import Batch, SampleError, UserError
from attrib.units import Partition

K = 4
WEIGHTS = Path(__file__).parent.parent.parent / "shared" / "golden" / "cd_mnist.npz"


def net() -> nn.Module:
    """With a smooth nonlinearity, so that parts are not only on or off."""
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 4 * 5, K)
    return seeded(nn.Sequential(*layers))


def images(n: int = 3) -> Batch:
    r = np.random.RandomState(5)
    return Batch(tuple("abc"[:n]), torch.tensor(r.randn(n, 3, 8, 10)), torch.tensor([1, 3, 0][:n]))


def explained(method, batch, module=None, rows=64):
    module = net() if module is None else module
    model = Classifier(
        module, {"embedding": "embedding"} if batch.mask is not None else {}, rows=rows, dtype=torch.float64
    )
    return method.attribute(model, batch, {}, Noise(batch.uids, 0, dtype=torch.float64))


def by_tile(batch: Batch, map: torch.Tensor, side: int) -> list[list[float]]:
    """Sums over tiles, with plain loops."""
    h, w = batch.x.shape[-2:]
    sums = [[0.0] * side * side for _ in batch.uids]
    for i in range(len(batch)):
        for r in range(h):
            for c in range(w):
                sums[i][r * side // h * side + c * side // w] += float(map[i, r, c])
    return sums


def tile(side: int, number: int, h: int = 8, w: int = 10) -> torch.Tensor:
    of = (torch.arange(h) * side // h)[:, None] * side + torch.arange(w) * side // w
    return of == number


@pytest.mark.parametrize("score", ["cd", "occlusion", "build_up", "input_x_gradient", "integrated_gradients"])
def test_each_score_as_slowly_derived(score):
    batch, side, module = images(), 4, net()
    decomposer = Decomposer(module)  # reads the net once
    output = "probability" if score in ("occlusion", "integrated_gradients") else "logit"
    method = CD(score, Partition("tiles", side=side), output=output, steps=7)
    found = by_tile(batch, explained(method, batch)["map"], side)

    def value(x, target):
        logits = module(x[None])[0]
        return (logits.softmax(0) if output == "probability" else logits)[target]

    for i, target in enumerate(batch.target.tolist()):
        x = batch.x[i]
        points = [1.0] if score == "input_x_gradient" else [j / 6 for j in range(7)]
        grads = []
        for t in points:
            point = (x * t).requires_grad_()
            grads.append(torch.autograd.grad(value(point, target), point)[0])
        for number in range(side * side):
            inside = tile(side, number)
            if score == "cd":
                expected = decomposer.decompose(x[None], inside[None, None]).relevant[0, 0, target]
            elif score == "occlusion":
                expected = value(x, target) - value(x * ~inside, target)
            elif score == "build_up":
                expected = value(x * inside, target)
            else:
                expected = (sum(grads) / len(grads) * x * inside).sum()
            assert found[i][number] == pytest.approx(float(expected), abs=1e-10)


def test_integrated_gradients_of_the_original():
    if not WEIGHTS.exists():
        pytest.skip(f"{WEIGHTS} is not here: the weights are not in the repository")
    with np.load(WEIGHTS) as file:
        weights = {k.removeprefix("sd."): torch.tensor(file[k]) for k in file.files if k.startswith("sd.")}
    module, stored = AcdCNN(), golden("acd_ig2d")
    module.load_state_dict(weights)
    batch = Batch(("a",), torch.tensor(stored["image"]).double(), torch.tensor([int(stored["label"])]))
    method = CD("integrated_gradients", Partition("tiles", side=28), output="probability", steps=100)
    found = explained(method, batch, module)["map"][0].numpy()
    np.testing.assert_allclose(found, stored["ig"], rtol=0, atol=1e-4 * np.abs(stored["ig"]).max())


@pytest.mark.parametrize("baseline", ["zero", "mask"])
@pytest.mark.parametrize("score", ["cd", "occlusion", "build_up"])
@pytest.mark.parametrize("special", [False, True])
def test_words_that_only_add_up(score, baseline, special):
    """Of a bag of words, every score is what the word adds."""
    batch, module = as_batch(some_sentences(special)), bag_of_words()
    method = CD(score, baseline=baseline, output_bias=False)
    found = explained(method, batch, module)["map"]
    added = module.embedding(batch.x) @ module.fc.weight.T  # (B, T, K)
    added -= (
        module.embedding(torch.tensor(0)) @ module.fc.weight.T if baseline == "mask" and score == "occlusion" else 0
    )
    own = added.gather(2, batch.target[:, None, None].expand(-1, added.shape[1], 1))[..., 0]
    for i in range(len(batch)):
        sums = [own[i, batch.words[i] == w].sum() for w in range(int(batch.words[i].max()) + 1)]
        mine = [found[i, batch.words[i] == w].sum() for w in range(len(sums))]
        if score == "build_up":  # the score of everything else and the bias is in each
            mine, sums = (np.diff([float(v) for v in values]) for values in (mine, sums))
            if baseline == "mask":
                continue
        np.testing.assert_allclose([float(v) for v in mine], [float(v) for v in sums], atol=1e-10)


def test_superpixels_and_units_of_the_user():
    batch = images(2)
    units = torch.zeros(2, 8, 10, dtype=torch.long)
    units[:, :, 5:], units[:, 0] = 1, -1
    given = Batch(batch.uids, batch.x, batch.target, units=units)
    found = explained(CD(units=Partition("given")), given)["map"]
    assert (found[:, 0] == 0).all()
    assert all(len(np.unique(one.numpy())) == 3 for one in found)
    assert (
        len(explained(CD(units=Partition("superpixels", segments=6, compactness=1000.0)), batch)["map"][0].unique())
        >= 3
    )


def test_completeness_is_kept():
    found = explained(CD(units=Partition("tiles", side=3)), images())
    assert found["completeness_error"].shape == (3,)
    assert 0 <= found["completeness_error"].max() < 1e-9
    assert CD().COLUMNS == {"completeness_error": "none"}
    assert CD("occlusion").COLUMNS == CD("occlusion").EXTRAS == {}


# ---- acd ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_map_is_a_level_of_the_tree():
    batch, side = images(), 4
    units = Partition("tiles", side=side)
    trees = [Tree.from_json(t) for t in explained(ACD(units=units, percentile=70.0), batch)["tree"]]
    for level in (0, 1, 2, 99):
        sums = by_tile(batch, explained(ACD(units=units, percentile=70.0, level=level), batch)["map"], side)
        for tree, own in zip(trees, sums):
            for node in tree.cut(level):
                assert sum(own[unit] for unit in node.units) == pytest.approx(node.score, rel=1e-5, abs=1e-6)
    for tree, x, target in zip(trees, batch.x, batch.target.tolist()):
        assert (tree.shape, tree.target, tree.against, tree.classes) == ((4, 4), target, None, (0, 1, 2, 3))
        for node in tree.nodes[tree.n :]:
            inside = sum(tile(side, unit).long() for unit in node.units).bool()
            expected = Decomposer(net()).decompose(x[None], inside[None, None]).relevant[0, 0]
            np.testing.assert_allclose(node.scores, expected.tolist(), rtol=1e-5, atol=1e-6)
            assert node.score == pytest.approx(expected[target].item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("score", ["cd", "occlusion", "build_up"])
def test_against_another_class(score):
    batch, units = images(), Partition("tiles", side=3)
    logits = net()(batch.x)
    trees = [Tree.from_json(t) for t in explained(ACD(score, units, against="other"), batch)["tree"]]
    for tree, own in zip(trees, logits):
        others = [k for k in own.argsort(descending=True).tolist() if k != tree.target]
        assert tree.against == others[0]
        for node in tree.nodes[tree.n :]:
            difference = node.scores[tree.target] - node.scores[tree.against]
            assert node.score == pytest.approx(difference, rel=1e-4, abs=1e-5)
    with pytest.raises(SampleError, match=r"b: ACD.against is class 3"):
        explained(ACD(score, units, against=3), batch)
    with pytest.raises(UserError, match="classes 0 to 3"):
        explained(ACD(score, units, against=4), batch)


def test_several_labels():
    batch = images()
    many = Batch(batch.uids, batch.x, torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1]]))
    (tree, *_) = explained(ACD(units=Partition("tiles", side=3)), many)["tree"]
    tree = Tree.from_json(tree)
    assert tree.target == [1, 0, 1, 0]
    assert tree.root.score == pytest.approx(tree.root.scores[0] + tree.root.scores[2], rel=1e-4)


def test_sentences_and_one_without_words():
    sentences = [*some_sentences(special=True), [(2, -1), (3, -1)]]
    batch = as_batch(sentences)
    model = classifier(lstm())
    found = ACD("occlusion", percentile=99.5, absolute=True, against="other").attribute(
        model, batch, {}, Noise(batch.uids, 0, dtype=torch.float64)
    )
    trees = [Tree.from_json(t) for t in found["tree"]]
    assert [tree.n for tree in trees] == [9, 1, 14, 5, 2, 0]
    assert (found["map"][batch.words < 0] == 0).all()
    nothing = ACD("occlusion").attribute(model, batch[[5]], {}, Noise(["t5"], 0, dtype=torch.float64))
    assert nothing["tree"][0]["nodes"] == []


def test_a_net_of_many_classes_keeps_those_that_matter():
    module = seeded(nn.Sequential(nn.Flatten(), nn.Linear(240, 50)))
    batch = images(1)
    (tree,) = (
        Tree.from_json(t) for t in explained(ACD(units=Partition("tiles", side=2), against=40), batch, module)["tree"]
    )
    top = module(batch.x)[0].topk(5).indices.tolist()
    assert tree.classes == tuple(sorted({*top, 1, 40}))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: CD("lime"), "CD.score is 'lime', must be one of cd, occlusion"),
        (lambda: CD(steps=1), "CD.steps is 1"),
        (lambda: CD(output="odds"), "CD.output is 'odds'"),
        (lambda: CD(baseline="blur"), "CD.baseline is 'blur'"),
        (lambda: CD(output="probability"), "contextual decomposition explains logits only"),
        (lambda: ACD("input_x_gradient"), "ACD.score is 'input_x_gradient'"),
        (lambda: ACD(units=Partition("superpixels")), "ACD.units.kind is 'superpixels'"),
        (lambda: ACD(percentile=101.0), "ACD.percentile is 101.0"),
        (lambda: ACD(steps=0), "ACD.steps is 0"),
        (lambda: ACD(level=-1), "ACD.level is -1"),
        (lambda: explained(CD("occlusion", baseline="mask"), images()), "a token of texts"),
    ],
)
def test_mistakes_are_named(make, said):
    with pytest.raises(UserError, match=said):
        make()


# ---- perturbed copies -----------------------------------------------------------------------------------


def test_perturbed_copies():
    batch, model = images(), Classifier(net(), dtype=torch.float64)
    noisy = perturbed(model, batch, "noise", 0.25, Noise(batch.uids, 0, dtype=torch.float64))
    assert 0.2 < (noisy.x - batch.x).abs().max() <= 0.25
    attacked = perturbed(model, batch, "fgsm", 0.01, Noise(batch.uids, 0, dtype=torch.float64))
    gone = (model.logits(batch.x) - model.logits(attacked.x)).gather(1, batch.target[:, None])
    assert (gone > 0).all()  # less of the target's logit
    with pytest.raises(UserError, match="cannot be perturbed"):
        perturbed(model, as_batch(some_sentences()), "noise", 0.1, Noise(["x"], 0))
    units = Partition("tiles", side=4)
    one, other = (Tree.from_json(explained(ACD(units=units), b)["tree"][0]) for b in (batch, noisy))
    assert tree_agreement(one, one) == (1.0, 1.0, 1.0)
    assert all(-1 <= value <= 1 for value in tree_agreement(one, other))


# ---- from the command line to the report ----------------------------------------------------------


def test_acd_end_to_end(tmp_path, monkeypatch, capfd):
    call = command(capfd)
    where = f"dataset.root={pictures(tmp_path, 3)}", f"run.root={tmp_path / 'work'}", "run.progress=false"
    small = "method.units.side=4", "method.percentile=80", "metric=[ehr]"
    result = call("dataset=tiny", "model=small_cnn", "method=acd", *small, *where)
    assert result.status == 0, result.err
    assert "maps_computed=3 maps_present=0 scores_computed=3" in result.out
    (cell,) = cells(tmp_path / "work")
    files = sorted((cell.folder / "tree").glob("**/*.json"))
    assert len(files) == 3
    before = [file.read_text() for file in files]
    assert all(Tree.from_json(json.loads(text)).n == 16 for text in before)

    # Again: nothing to do but the file that went; one by one: the same trees.
    files[1].unlink()
    assert "maps_computed=0 maps_present=3" in call("dataset=tiny", "model=small_cnn", "method=acd", *small, *where).out
    assert [file.read_text() for file in files] == before
    alone = f"run.root={tmp_path / 'alone'}", "run.batch=1", "run.rows=3"
    assert call("dataset=tiny", "model=small_cnn", "method=acd", *small, *where, *alone).status == 0
    for text, file in zip(before, sorted(tmp_path.glob("alone/*/tree/**/*.json"))):
        one, other = (Tree.from_json(json.loads(t)) for t in (text, file.read_text()))
        assert [n.id for n in one.nodes] == [n.id for n in other.nodes]

    # What people look at.
    capfd.readouterr()
    assert tool("table").main([str(tmp_path / "work")]) == 0
    assert "completeness" in capfd.readouterr().out
    page = report.page(tmp_path / "work")
    assert page.count("<figure>") > 6
    assert page.count("<script") == 1  # the report's own
    assert tool("compare_trees").main(["dataset=photos", "method=random", "run.limit=1"]) == 2
    assert "makes no trees" in capfd.readouterr().err
