"""Agglomeration over a grid of tiles: parity with the authors' code, a slow re-derivation, toys with a known tree."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from agglomerated import of_units, sets_of, slowly, tangled
from nets import golden

from attrib.agglomeration import Rules, agglomerate, drive, follow, smoothed, threshold
from attrib.agglomeration.trees import grow, runs
from attrib.decomposition import Decomposer
from attrib.models import AcdCNN

GOLDEN, PIECES = golden("acd_2d"), golden("acd_2d_pieces")
# The net's weights are the authors' own and not ours to commit.
WEIGHTS = Path(__file__).parent.parent.parent / "shared" / "golden" / "cd_mnist.npz"
RUNS = {"im3_cd_p99_s1_n5": (99, 28, 5), "im4_cd_p95_s2_n4": (95, 14, 4), "im2_cd_p90_s4_n3": (90, 7, 3)}
RUNS |= {"im3_build_up_p95_s4_n4": (95, 7, 4)}


def net() -> AcdCNN:
    if not WEIGHTS.exists():
        pytest.skip(f"{WEIGHTS} is not here: the weights are not in the repository")
    with np.load(WEIGHTS) as file:
        weights = {k.removeprefix("sd."): torch.tensor(file[k]) for k in file.files if k.startswith("sd.")}
    made = AcdCNN()
    made.load_state_dict(weights)
    return made.eval().requires_grad_(False)


def cd_as_rounded(model: AcdCNN, image: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """The decomposition with the rounding of the authors' code, (m, H, W) -> (m, K).

    Much of a digit is one flat background, where all places of a pooling window have the same sum: which of
    them is taken there, rounding decides.
    """

    def linear(layer, relevant, rest):
        bias = layer(torch.zeros_like(relevant))
        relevant, rest = layer(relevant) - bias, layer(rest) - bias
        share, other = relevant.abs() + 1e-20, rest.abs() + 1e-20
        return relevant + bias * (share / (share + other)), rest + bias * (other / (share + other))

    def pool(relevant, rest):
        _, at = F.max_pool2d(relevant + rest, 2, return_indices=True)
        return [part.flatten(2).gather(2, at.flatten(2)).view(at.shape) for part in (relevant, rest)]

    def relu(relevant, rest):
        return F.relu(relevant), F.relu(relevant + rest) - F.relu(relevant)

    parts = masks[:, None] * image, (1 - masks[:, None]) * image
    for layer in (model.conv1, model.conv2):
        parts = relu(*pool(*linear(layer, *parts)))
    parts = [part.flatten(1) for part in parts]
    return linear(model.fc2, *relu(*linear(model.fc1, *parts)))[0]


def walked_on_golden(run, cd):
    q, side, steps = RUNS[run]
    image, label = torch.tensor(GOLDEN["images"][int(run[2])])[None], int(GOLDEN["labels"][int(run[2])])
    model = net()

    def answer(sets):
        masks = (
            torch.tensor(sets).view(-1, side, side).repeat_interleave(28 // side, 1).repeat_interleave(28 // side, 2)
        )
        with torch.no_grad():
            if "build_up" in run:
                return model(image * masks[:, None]).log_softmax(1).double().numpy()
            return cd(model, image, masks.float()).double().numpy()

    return walked((side, side), answer, Rules(q, steps), np.eye(10)[label]), label


@pytest.mark.parametrize("run", RUNS)
def test_parity_with_the_original(run):
    found, label = walked_on_golden(run, cd_as_rounded)
    comps = GOLDEN[f"{run}_comps"][1:]
    assert len(found.levels) == len(comps)
    np.testing.assert_array_equal([labels for labels, _ in found.levels], comps)
    before_final = int(GOLDEN[f"{run}_num_before_final"])
    np.testing.assert_array_equal(found.chosen, GOLDEN[f"{run}_im_thresh"][:before_final])
    scale = np.abs(GOLDEN[f"{run}_comp_scores"]).max()
    np.testing.assert_allclose(found.scores, GOLDEN[f"{run}_scores"][:before_final], rtol=0, atol=1e-5 * scale)
    for (level, number), scores in zip(GOLDEN[f"{run}_comp_scores_key"], GOLDEN[f"{run}_comp_scores"]):
        mine = found.levels[level - 1][1][number] if level else found.whole
        np.testing.assert_allclose(mine, scores, rtol=0, atol=1e-4 * scale)
    combined = GOLDEN[f"{run}_comp_scores_combined"][: len(found.combined)]
    np.testing.assert_allclose(found.combined, combined, rtol=0, atol=1e-4 * scale)
    np.testing.assert_allclose(found.units, GOLDEN[f"{run}_scores_orig_raw"], rtol=0, atol=1e-4 * scale)
    shape = found.chosen[0].shape
    grow(shape, found.units, found.levels, found.whole, np.eye(10)[label], range(10), label, None).check()


def test_parity_of_our_decomposition():
    """Single pixels of the flat background differ (see above); what is chosen, and its scores, do not."""
    run = "im3_cd_p99_s1_n5"
    found, _ = walked_on_golden(run, lambda model, image, masks: Decomposer(model).decompose(image, masks[None])[0][0])
    np.testing.assert_array_equal([labels for labels, _ in found.levels], GOLDEN[f"{run}_comps"][1:])
    scale = np.abs(GOLDEN[f"{run}_comp_scores"]).max()
    for (level, number), scores in zip(GOLDEN[f"{run}_comp_scores_key"][1:], GOLDEN[f"{run}_comp_scores"][1:]):
        np.testing.assert_allclose(found.levels[level - 1][1][number], scores, rtol=0, atol=1e-5 * scale)
    differ = np.abs(found.units - GOLDEN[f"{run}_scores_orig_raw"]).max(1) > 1e-5 * scale
    flat = GOLDEN["images"][3].ravel() == GOLDEN["images"][3].min()
    assert differ.any()
    assert flat[differ].all()


def test_the_rules_of_the_original():
    np.testing.assert_array_equal(threshold(PIECES["scores"], Rules(95)), PIECES["thr95"])
    np.testing.assert_array_equal(threshold(PIECES["scores_nan"], Rules(95)), PIECES["thr95_nan"])
    np.testing.assert_array_equal(smoothed(PIECES["old"], PIECES["new"]), PIECES["smooth"])
    np.testing.assert_array_equal(follow(PIECES["seg1"], PIECES["seg2"]), PIECES["corr12"])
    np.testing.assert_array_equal(follow(PIECES["seg1"], PIECES["seg3"]), PIECES["corr13"])


def test_more_components_than_the_original_has_colours():
    old = np.zeros((2, 41), dtype=int)
    old[0, ::2] = np.arange(21, 0, -1)
    new = np.where(old > 0, np.cumsum(old > 0).reshape(old.shape), 0)
    np.testing.assert_array_equal(follow(old, new), old)
    assert (np.unique(follow(np.zeros_like(old), new)) == np.arange(22)).all()


def walked(shape, answer, rules, weights):
    (walk,) = drive([agglomerate(shape, weights, rules)], lambda _, sets: answer(sets))
    return walk


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (2, 2), (3, 5), (6, 4), (7, 7)])
@pytest.mark.parametrize("seed", range(5))
def test_as_slowly_derived(shape, seed):
    weights, answer = np.array([1.0, 0.0, -0.5]), tangled(shape, seed)
    q, steps, absolute = (95.0, 90.0, 80.0, 10.0, 60.0)[seed], (None, 3, 2, None, 1)[seed], seed == 2
    found = walked(shape, answer, Rules(q, steps, absolute), weights)
    levels, history = slowly(shape, of_units(answer, weights, shape), q, steps, absolute)
    assert [sets_of(labels) for labels, _ in found.levels] == levels
    assert [{(int(r), int(c)) for r, c in np.argwhere(chosen)} for chosen in found.chosen] == history


def test_two_blobs_are_found_and_merged_last():
    """The score counts what is inside of two blobs; what lies around them takes away."""
    own = np.full((8, 9), -1.0)
    own[1:4, 1:4], own[5:7, 6:8] = 3.0, 2.0
    found = walked((8, 9), lambda sets: (sets @ own.ravel())[:, None], Rules(94.0, steps=2), np.ones(1))
    tree = grow((8, 9), found.units, found.levels, found.whole, np.ones(1), [0], 0, None)
    (both,) = [node for node in tree.parts(tree.root) if node.level > 0]
    assert both.members == runs(own > 0)
    assert both.score == pytest.approx(9 * 3 + 4 * 2)
    assert [node.members for node in tree.parts(both)] == [runs(own == 3), runs(own == 2)]


def test_the_pair_that_gains_most_is_merged_first():
    """Three tiles apart from each other; the outer two belong together."""
    own = np.zeros((1, 9))
    own[0, [0, 4, 8]] = 5.0, 4.0, 4.5

    def answer(sets):
        return (sets @ own.ravel() + 3.0 * (sets[:, 0] & sets[:, 8]))[:, None]

    found = walked((1, 9), answer, Rules(75.0, steps=1), np.ones(1))
    assert [sorted(sets_of(labels).values(), key=min) for labels, _ in found.levels[1:]] == [
        [frozenset({(0, 0), (0, 8)}), frozenset({(0, 4)})],
        [frozenset({(0, 0), (0, 4), (0, 8)})],
    ]


def test_smoothing_closes_what_is_enclosed():
    ring = np.ones((3, 3), dtype=bool)
    ring[1, 1] = False
    closed = smoothed(ring, np.zeros_like(ring))
    assert closed.all()
    corner = np.zeros((3, 3), dtype=bool)
    corner[0, 1] = corner[1, 0] = True  # a corner has two neighbours only
    assert not smoothed(corner, corner)[0, 0]
    own = np.zeros((5, 5))
    own[1:4, 1:4], own[2, 2] = 1.0, -9.0
    with_smoothing = walked((5, 5), lambda s: (s @ own.ravel())[:, None], Rules(70.0, 1), np.ones(1))
    without = walked((5, 5), lambda s: (s @ own.ravel())[:, None], Rules(70.0, 1, smooth=False), np.ones(1))
    assert with_smoothing.chosen[1][2, 2]
    assert not without.chosen[1][2, 2]


def test_all_tiles_chosen():
    """Where the original crashes."""
    for q in (0.0, 50.0):
        found = walked((4, 5), tangled((4, 5), 2), Rules(q), np.array([1.0, 0.0, 0.0]))
        assert (found.levels[-1][0] == 1).all()
        assert found.chosen[-1].all()
