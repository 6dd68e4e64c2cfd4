"""Generated nets, shared out among the methods: ten, or a hundred if there is time; ``make fuzz N=1000`` judges all,
``tests/fuzz.py`` one.
"""

from __future__ import annotations

from collections import Counter

import fuzz
import pytest
import torch
from fuzz_checks import CHECKS, Judge, pattern
from generated_nets import Choices, generate, plain

SEEDS, QUICK, PER_TEST = 100, 10, 5

SHARE = 12  # each net meets one method in twelve: all of them on a hundred nets would take ten minutes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "start",
    [start if start < QUICK else pytest.param(start, marks=pytest.mark.slow) for start in range(0, SEEDS, PER_TEST)],
)
def test_every_method_is_right_or_refuses(start: int) -> None:
    for seed in range(start, start + PER_TEST):
        judge = Judge(seed)
        for method in list(CHECKS)[seed % SHARE :: SHARE]:
            verdict = judge.verdict(method)
            if verdict.outcome == "wrong":
                program = "\n".join(judge.given.lines)
                pytest.fail(f"{method}, seed {seed}: {verdict.kind}: {verdict.text}\n{program}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [552, 775])
def test_a_net_for_one_number_of_rows_has_no_causal_graph(seed: int) -> None:
    verdict = Judge(seed).verdict("causal_paths")
    assert verdict.outcome == "refused"
    assert "any number of rows" in verdict.text


# ---- the generator ------------------------------------------------------------------------------------


def test_the_same_seed_is_the_same_net_and_no_global_number_is_drawn() -> None:
    before = torch.get_rng_state()
    one, other = generate(5), generate(5)
    assert one.lines == other.lines
    weights = zip(one.net.state_dict().items(), other.net.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in weights)
    assert torch.equal(before, torch.get_rng_state())
    assert generate(6).lines != one.lines


@pytest.mark.filterwarnings("ignore")
def test_the_reference_is_the_same_net() -> None:
    """With in-place operations written out: on another batch size than the program was written with."""
    for seed in range(300):
        given = generate(seed)
        if "random" in given.program.features:
            continue
        x = Choices(seed + 1).normal(3, *given.shape)
        expected = given.net(x.clone())
        torch.testing.assert_close(given.reference(plain)(x.clone()), expected, rtol=1e-10, atol=1e-10)
        assert expected.shape == (3, given.classes)
        assert expected.isfinite().all()


def test_the_nets_are_many_things() -> None:
    """Forty operations and more, and every feature that a check looks at."""
    programs = [generate(seed).program for seed in range(300)]
    text = "\n".join(program.source() for program in programs)
    for word in (
        "groups=", "stride=2", "dilation=2", "padding_mode", "ConvTranspose2d", "MaxPool2d", "AvgPool2d", "LPPool2d",
        "ceil_mode", "adaptive_max_pool2d", "amax", "BatchNorm2d", "track_running_stats=False", "LayerNorm",
        "GroupNorm",
        "InstanceNorm2d", "RMSNorm", "LocalResponseNorm", "MultiheadAttention", "scaled_dot_product_attention",
        "softmax",
        "TransformerEncoderLayer", "LSTM", "GRU", "PReLU", "Hardswish", "Softplus", "Softsign", "maximum", "threshold",
        "clamp", "inplace=True", "mul_", "chunk", "split", "torch.cat", "interpolate", "Upsample", "pixel_unshuffle",
        "Dropout", "F.dropout(", "permute", "movedim", "roll", "einsum", "glu", "register_buffer", "Sequential",
    ):  # fmt: skip
        assert word in text, word
    features = Counter(feature for program in programs for feature in program.features)
    assert set(features) == {"relu", "max", "product", "recurrent", "batch", "random", "untraced"}


def test_messages_are_grouped_without_what_is_a_nets_own() -> None:
    one = pattern("layer conv1 of Net runs 2 times in a forward pass; take another. Or not")
    assert one == pattern("layer conv12 of Net runs 3 times in a forward pass; take one")
    assert pattern("a map of (3, 4, 5) at 1.5e-3") == pattern("a map of (7, 1) at 12")


# ---- the command --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_the_command_counts_and_its_status_says_whether_anything_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(case: object) -> None:
        raise RuntimeError("size 3 of conv1")

    assert fuzz.main(["--count", "3", "--jobs", "1", "--method", "gradient"]) == 0
    assert "gradient" in capsys.readouterr().out
    monkeypatch.setitem(CHECKS, "broken", wrong)
    assert fuzz.main(["--count", "2", "--start", "4", "--jobs", "1", "--method", "broken"]) == 1
    out = capsys.readouterr().out
    assert "RuntimeError: size # of #" in out
    assert "broken: seeds 4, 5" in out
    assert fuzz.main(["--seed", "4", "--method", "broken"]) == 1
    out = capsys.readouterr().out
    assert "class Net(nn.Module):" in out
    assert "broken: wrong: size 3 of conv1" in out
