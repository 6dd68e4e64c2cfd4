"""Trees: what they say of their nodes, their JSON, and that every cut is a partition."""

import copy
import json
import re

import numpy as np
import pytest
from agglomerated import tangled
from synthetic import cell, spec

from attrib import report
from attrib.agglomeration import Rules, agglomerate, drive
from attrib.agglomeration.trees import Tree, grow, node_id, runs
from attrib.store import cell as store
from attrib.store.documents import packed
from attrib.types import UserError

WEIGHTS = np.array([1.0, 0.0, -1.0])


def found(shape, seed, rules=None, weights=WEIGHTS):
    scorer = tangled(shape, seed)
    rules = rules or Rules(90.0)
    (walk,) = drive([agglomerate(shape, weights, rules)], lambda owner, sets: scorer(sets))
    return grow(shape, walk.units, walk.levels, walk.whole, weights, [0, 2], 0, 2)


def small():
    """Six words: "2" and "3" first, then "2-4" and "0", then all."""
    scores = {1: np.array([5.0, 1.0])}, {1: np.array([0.5, 0.0]), 2: np.array([7.0, 1.0])}
    labels = np.array([0, 0, 1, 1, 0, 0]), np.array([1, 0, 2, 2, 2, 0])
    units = np.array([[0.5, 0.0], [0.0, 0.0], [3.0, 1.0], [1.5, 0.0], [1.0, 2.0], [-1.0, 1.0]])
    whole = np.array([6.0, 2.0])
    return grow((6,), units, list(zip(labels, scores)), whole, np.array([1.0, -1.0]), [0, 1], 0, 1)


def test_a_small_tree():
    tree = small()
    tree.check()
    assert [n.id for n in tree.nodes] == ["0", "1", "2", "3", "4", "5", "2-3", "2-4", "0-5"]
    assert [n.level for n in tree.nodes] == [0, 0, 0, 0, 0, 0, 1, 2, 3]
    assert [n.parent for n in tree.nodes] == ["0-5", "0-5", "2-3", "2-3", "2-4", "0-5", "2-4", "0-5", None]
    assert tree["2-3"].score == 4.0
    assert tree["2-3"].scores == (5.0, 1.0)
    assert tree.root.score == 4.0
    assert tree.unit_scores.tolist() == [0.5, 0.0, 2.0, 1.5, -1.0, -2.0]
    assert tree.ranks.tolist() == [2, 3, 1, 1, 2, 3]  # 1 and 5 were never chosen
    assert [n.id for n in tree.parts(tree.root)] == ["0", "1", "2-4", "5"]
    assert [n.id for n in tree.cut(0)] == ["0", "1", "2", "3", "4", "5"]
    assert [n.id for n in tree.cut(1)] == ["0", "1", "2-3", "4", "5"]
    assert [n.id for n in tree.cut(9)] == ["0-5"]
    assert [n.id for n in tree.after(1)] == ["2-3"]
    assert [n.id for n in tree.after(2)] == ["0", "2-4"]
    assert tree.paint(tree.after(1), [7.0], empty=-1).tolist() == [-1, -1, 7, 7, -1, -1]


def test_two_fresh_words_that_merge_are_of_level_1():
    """The authors' ``collapse_tree`` gives them level 0."""
    assert small()["2-3"].level == 1


def test_ids_say_which_units():
    assert runs(np.array([1, 1, 0, 1, 0, 1, 1, 1], dtype=bool)) == ((0, 1), (3, 3), (5, 7))
    assert node_id([(7, 7)]) == "7"
    assert node_id([(3, 5)]) == "3-5"
    assert node_id([(3, 5), (8, 9)]).startswith("3-9#")
    assert node_id([(3, 5), (8, 9)]) != node_id([(3, 6), (8, 9)])
    assert node_id([(3, 5), (8, 9)]) == node_id(((3, 5), (8, 9)))


@pytest.mark.parametrize("shape", [(1,), (2,), (9,), (17,), (1, 1), (3, 5), (7, 6)])
@pytest.mark.parametrize("seed", range(4))
def test_every_level_is_a_partition_and_levels_are_nested(shape, seed):
    tree = found(shape, seed, Rules((99.5, 90.0, 60.0, 30.0)[seed], (None, 2, 3, 1)[seed], absolute=seed == 2))
    tree.check()
    below = [frozenset([i]) for i in range(tree.n)]
    for level in range(tree.root.level + 1):
        parts = [frozenset(node.units) for node in tree.cut(level)]
        assert sorted(unit for part in parts for unit in part) == list(range(tree.n))
        assert all(any(small <= part for part in parts) for small in below)
        below = parts
    assert len(below) == 1
    chosen = set()
    for step in range(1, tree.root.step + 1):
        after = [frozenset(node.units) for node in tree.after(step)]
        assert sum(map(len, after)) == len(frozenset().union(*after))
        assert chosen <= set().union(*after)
        chosen = set().union(*after)
    assert chosen == set(range(tree.n))


def test_equal_sets_have_equal_ids_in_other_trees():
    one, other = found((6, 6), 1, Rules(90.0)), found((6, 6), 1, Rules(80.0))
    common = {n.id for n in one.nodes} & {n.id for n in other.nodes}
    assert len(common) > 36
    for name in common:
        assert one[name].members == other[name].members
        assert one[name].score == pytest.approx(other[name].score)


@pytest.mark.parametrize("shape", [(1,), (11,), (5, 4)])
def test_json_and_back(shape):
    tree = found(shape, 3)
    text = json.dumps(tree.to_json(), allow_nan=False)
    again = Tree.from_json(json.loads(text))
    assert [(n.id, n.step, n.level, n.parent, n.members) for n in again.nodes] == [
        (n.id, n.step, n.level, n.parent, n.members) for n in tree.nodes
    ]
    np.testing.assert_allclose([n.score for n in again.nodes], [n.score for n in tree.nodes], rtol=1e-5, atol=1e-12)
    assert (again.target, again.against, again.classes, again.shape) == (0, 2, (0, 2), shape)
    assert json.dumps(again.to_json()) == text


def test_the_tree_of_a_text_without_words():
    empty = Tree((0,), 1, None, (), ())
    assert Tree.from_json(json.loads(json.dumps(empty.to_json()))).nodes == ()


def broken(change):
    value = copy.deepcopy(small().to_json())
    change(value)
    return value


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.pop("units"), "not the JSON of a tree"),
        (lambda v: v.update(version=99), "version 99"),
        (lambda v: v["units"]["step"].pop(), "not the JSON of a tree"),
        (lambda v: v["nodes"][0].update(id="1-2"), "members of node 1-2"),
        (lambda v: v["nodes"][0].update(members=[[2, 9]], id="2-9"), "members of node 2-9"),
        (lambda v: v["nodes"][0].update(parent="8"), "no parent 8"),
        (lambda v: v["nodes"][0].update(parent=None), "no parent, or is not the last"),
        (lambda v: v["nodes"][0].update(level=2), "level 2"),
        (lambda v: v["nodes"][1].update(step=0), "older than its parts"),
        (lambda v: v["nodes"][0].update(scores=[1.0]), "lacks scores"),
        (lambda v: v["units"]["parent"].__setitem__(0, "2-3"), "parts of node 2-3"),
        (lambda v: v["nodes"].append(v["nodes"][0]), "same id"),
        (lambda v: v.update(shape=[60]), "9 nodes for 60 units"),
    ],
)
def test_what_is_not_a_tree_is_named(change, said):
    with pytest.raises(UserError, match=said) as error:
        Tree.from_json(broken(change), "x/tree/a.json")
    assert str(error.value).startswith("x/tree/a.json")


# ---- on the page ----------------------------------------------------------------------------------


def test_the_hierarchy_of_a_sentence_on_the_page(tmp_path):
    made = cell(tmp_path, "films.lstm.acd.1", dataset="films", model="lstm", method="acd")
    store.write_json(made.folder / "spec.json", spec("films", "lstm", "acd") | {"documents": {"tree": ""}})
    (packed_tree,) = packed([small().to_json()])
    map = np.zeros(6, np.float32)
    made.maps.add("s/1", "f", {"map": map, "tree": packed_tree}, seconds=0.1, rows=3)
    made.maps.add("s/2", "f", {"map": map, "tree": packed_tree[:-5]}, seconds=0.1, rows=3)
    made.maps.flush()
    inputs = store.Arrays(tmp_path / "state" / "pictures.cafecafe", "w")
    for uid in ("s/1", "s/2"):
        words = np.array([-1, 0, 1, 2, 3, 3, 4, 5])
        tokens = ["[CLS]", "<b>", "is", "not", "ba", "##d", "at", "all"]
        inputs.add(uid, "f", {"words": words}, name="good", target=0, tokens=tokens)
    inputs.flush()
    text = report.page(tmp_path)
    assert "<b>" not in re.sub(r"<b>[+-]", "", text.split("Hierarchies")[1].split("Failures")[0])
    rows = re.findall(r"<tr>(.*?)</tr>", text.split('class="phrases"')[1].split("</table>")[0], re.DOTALL)
    shown = [re.findall(r'colspan="(\d)"[^>]*>([^<]*)<', row) for row in rows]
    assert shown[0] == [("6", "&lt;b&gt; is not bad at all")]
    assert shown[1] == [("2", ""), ("3", "not bad at"), ("1", "")]
    assert shown[2] == [("2", ""), ("2", "not bad"), ("2", "")]
    assert shown[3] == [("1", word) for word in ("&lt;b&gt;", "is", "not", "bad", "at", "all")]
    assert "s/2" in text
    assert text.count('class="phrases"') == 1  # the damaged one says what is wrong
    assert "Unterminated" in text or "Expecting" in text
