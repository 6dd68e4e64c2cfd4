"""Agglomeration over a line of words: parity with the authors' code, a slow re-derivation, toys with a known tree."""

import numpy as np
import pytest
import torch
from agglomerated import of_units, sets_of, slowly, tangled
from nets import golden

from attrib.agglomeration import Rules, agglomerate, drive, threshold
from attrib.agglomeration.trees import grow
from attrib.decomposition import Decomposer
from attrib.models import AcdLSTM

GOLDEN = golden("acd_1d")
RUNS = [(s, how, p) for s in ("s0", "s2") for how in ("cd", "build_up") for p in ("99p5", "80")]
DIFFERENCE = np.array([1.0, -1.0])  # class 0 against class 1


def lstm() -> AcdLSTM:
    """Without padding: every id is a word."""
    weights = {k.removeprefix("sd_small."): torch.tensor(v) for k, v in GOLDEN.items() if k.startswith("sd_small.")}
    net = AcdLSTM(60, 16, 24, pad_id=-1, mask_id=0)
    net.load_state_dict(weights)
    return net.double().eval().requires_grad_(False)


def scorer(tokens, how):
    """(owner, sets) -> scores of both classes."""
    net, ids = lstm(), torch.tensor(tokens)[None]
    decomposer = Decomposer(net, output_bias=False)

    def answer(_, sets):
        sets = torch.tensor(sets)
        with torch.no_grad():
            if how == "build_up":
                found = net(torch.where(sets, ids, 0))
            else:
                found = decomposer.decompose(ids, sets[None]).relevant[0]
        return found.double().numpy()

    return answer


def walked(n, answer, rules, weights=DIFFERENCE):
    (walk,) = drive([agglomerate((n,), weights, rules)], answer)
    return walk


@pytest.mark.parametrize(("sentence", "how", "p"), RUNS)
def test_parity_with_the_original(sentence, how, p):
    tokens, weights = GOLDEN[f"{sentence}_tokens"], DIFFERENCE * (1 - 2 * int(GOLDEN[f"{sentence}_label"]))
    rules = Rules(float(p.replace("p", ".")), steps=25, absolute=True)
    found = walked(len(tokens), scorer(tokens, how), rules, weights)
    key = f"{sentence}_{how}_{p}_raw"
    np.testing.assert_array_equal([labels for labels, _ in found.levels], GOLDEN[f"{key}_comps"][1:])
    np.testing.assert_array_equal(found.chosen, GOLDEN[f"{key}_masks"])
    np.testing.assert_allclose(found.scores, GOLDEN[f"{key}_scores"], rtol=0, atol=1e-5)
    assert found.whole @ weights == pytest.approx(GOLDEN[f"{key}_score_orig"], abs=1e-5)
    for step, number, score in GOLDEN[f"{key}_comp_scores"][1:]:
        assert found.levels[int(step) - 1][1][int(number)] @ weights == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize(("sentence", "how", "p"), RUNS)
def test_the_collapsed_tree(sentence, how, p):
    """Where the original is right: it puts two fresh words that merge on level 0, and what follows a level too low."""
    tokens, weights = GOLDEN[f"{sentence}_tokens"], DIFFERENCE * (1 - 2 * int(GOLDEN[f"{sentence}_label"]))
    found = walked(len(tokens), scorer(tokens, how), Rules(float(p.replace("p", ".")), 25, True), weights)
    tree = grow((len(tokens),), found.units, found.levels, found.whole, weights, [0, 1], 0, 1)
    tree.check()
    original = GOLDEN[f"{sentence}_{how}_{p}_col_comps"]
    if not np.array_equal(original[0], np.arange(len(tokens))):
        assert any(
            node.size == 2 and node.level == 1 and node.step == min(tree.ranks[node.units]) for node in tree.nodes
        )
        return
    for level, labels in enumerate(original[1:], start=1):
        mine = {frozenset((unit,) for unit in node.units) for node in tree.nodes if node.level == level}
        assert mine == set(sets_of(labels).values())


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 9, 16])
@pytest.mark.parametrize("seed", range(6))
def test_as_slowly_derived(n, seed):
    weights, answer = np.array([1.0, 0.0, -0.5]), tangled((n,), seed)
    q, steps, absolute = (99.5, 95.0, 80.0, 50.0, 99.5, 70.0)[seed], (None, None, 3, None, 1, None)[seed], seed % 2 == 1
    found = walked(n, lambda _, sets: answer(sets), Rules(q, steps, absolute), weights)
    levels, history = slowly((n,), of_units(answer, weights, (n,)), q, steps, absolute)
    assert [sets_of(labels) for labels, _ in found.levels] == levels
    assert [{(int(i),) for i in np.flatnonzero(chosen)} for chosen in found.chosen] == history


def test_an_interaction_is_found():
    """ "not good": each word alone speaks for the class, the two together against it."""
    own = np.array([0.1, 1.0, 2.0, 0.2, 0.3])

    def answer(_, sets):
        return (sets @ own - 9.0 * (sets[:, 1] & sets[:, 2]))[:, None]

    found = walked(5, answer, Rules(99.5, absolute=True), np.ones(1))
    tree = grow((5,), found.units, found.levels, found.whole, np.ones(1), [0], 0, None)
    assert tree.nodes[5].id == "1-2"
    assert tree["1-2"].score == pytest.approx(-6.0)
    assert (tree["1"].score, tree["2"].score) == (1.0, 2.0)


def test_scores_that_only_add_up_are_taken_in_their_order():
    own = np.array([0.5, 3.0, 0.1, 5.0, 4.0, 0.2, 0.3, 0.15, 0.25])
    found = walked(9, lambda _, sets: (sets @ own)[:, None], Rules(99.5), np.ones(1))
    tree = grow((9,), found.units, found.levels, found.whole, np.ones(1), [0], 0, None)
    ranks = tree.ranks
    assert [int(i) for i in np.argsort(ranks, kind="stable")][:4] == [3, 4, 1, 0]
    assert all(node.score == pytest.approx(own[node.units].sum()) for node in tree.nodes)


def test_ties_are_taken_together_also_where_rounding_breaks_them():
    own = np.array([1.0, 0.0, 1.0 + 1e-12, 0.0, 1.0 - 1e-12, 0.0, 0.5, 0.0])
    assert threshold(own, Rules(99.5)).tolist() == (own > 0.9).tolist()
    # Differences of logits around 50 have their rounding, however small they are.
    assert threshold(1e-3 * own + 3e-6 * (own > 1), Rules(99.5), 50.0).tolist() == (own > 0.9).tolist()


def test_one_word_and_all_words_at_once():
    one = walked(1, lambda _, sets: sets @ np.ones((1, 1)), Rules(99.5), np.ones(1))
    assert [labels.tolist() for labels, _ in one.levels] == [[1]]
    every = walked(7, lambda _, sets: sets @ np.ones((7, 1)), Rules(0.0), np.ones(1))
    assert [labels.tolist() for labels, _ in every.levels] == [[1] * 7]
    zeros = walked(7, lambda _, sets: sets @ np.zeros((7, 1)), Rules(99.5), np.ones(1))
    assert len(zeros.levels) == 1


def test_the_word_with_id_0():
    tokens = np.array([0, 27, 0, 35, 0])
    for how in ("cd", "build_up"):
        found = walked(5, scorer(tokens, how), Rules(99.5, absolute=True))
        assert found.levels[-1][0].tolist() == [1] * 5


def test_walks_side_by_side_are_as_alone_and_ask_once():
    shapes, rules = [(9,), (1,), (4,), (14,)], Rules(90.0, absolute=True)
    answers = [tangled(shape, seed) for seed, shape in enumerate(shapes)]
    weights, calls, seen = np.array([1.0, 0.0, 0.0]), [], set()

    def answer(owner, sets):
        calls.append(len(sets))
        rows = []
        for i, members in zip(owner, sets):
            assert not members[shapes[i][0] :].any()
            assert (i, members.tobytes()) not in seen
            seen.add((i, members[: shapes[i][0]].tobytes()))
            rows.append(answers[i](members[None, : shapes[i][0]])[0])
        return np.stack(rows)

    found = drive([agglomerate(shape, weights, rules) for shape in shapes], answer)
    for i, (shape, one) in enumerate(zip(shapes, found)):
        alone = walked(shape[0], lambda _, sets, i=i: answers[i](sets), rules, weights)
        assert [labels.tolist() for labels, _ in one.levels] == [labels.tolist() for labels, _ in alone.levels]
        np.testing.assert_allclose(one.scores[-2], alone.scores[-2], atol=1e-12)
    assert (
        len(calls) <= max(len(one.levels) for one in found) + 1
    )  # one call per step, whatever the number of sentences
