"""Rules of contextual decomposition: the original's numbers, and operations without a rule."""

from __future__ import annotations

import pytest
import torch
from nets import golden
from test_cd_rules import Op
from torch import Tensor, nn

from attrib.decomposition import Decomposer
from attrib.types import UserError


def test_golden_primitives() -> None:
    g = golden("cd_primitives")
    tensors = {k: torch.tensor(v) for k, v in g.items()}

    def load(module: nn.Module, name: str) -> nn.Module:
        module.load_state_dict(
            {k.removeprefix(f"sd.{name}."): v for k, v in tensors.items() if k.startswith(f"sd.{name}.")}
        )
        return nn.Sequential(nn.Identity(), module).eval()

    conv, lin = load(nn.Conv2d(3, 4, 3, padding=1), "conv"), load(nn.Linear(5, 4), "lin")
    bn = load(nn.BatchNorm2d(3), "bn")
    cases = [
        (conv, "a", "b", "conv"),
        (lin, "lin_a", "lin_b", "lin"),
        (bn, "a", "b", "bn"),
        (bn, "bn0_a", "bn0_b", "bn0"),
        (nn.MaxPool2d(2, 2), "a", "b", "pool"),
        (nn.MaxPool2d(3, 2, 1), "a", "b", "pool3p"),
        (nn.ReLU(), "a", "b", "relu"),
    ]
    for module, a, b, name in cases:
        relevant, irrelevant = tensors[a], tensors[b]
        whole = relevant + irrelevant
        # A mask is a factor of the whole; where the whole is zero, no factor gives two parts, so nothing is there.
        factors = torch.where(whole == 0, 0.0, relevant / whole)
        for both in (False, True):
            got, total = Decomposer(nn.Sequential(nn.Identity(), module).eval()).rows(
                whole, factors, torch.arange(len(whole)), both
            )
            for value, key in ((got, "rel"), (total - got, "irrel")):
                wanted = tensors[f"{name}_{key}"]
                assert (value - wanted).abs().max() <= 1e-5 * wanted.abs().max(), (name, key, both)


def test_golden_gates() -> None:
    """The three contributions to a gate, and the two to the tanh of a cell, as the recurrent rules compute them."""
    from attrib.decomposition.rules_recurrent import _three, _two
    from attrib.decomposition.values import MaskedRows

    g = golden("cd_primitives")
    a, b, c = (torch.tensor(v) for v in g["three_in"])
    both = MaskedRows(7, None).pair(a, a + b)
    for name, f in (("sigmoid", torch.sigmoid), ("tanh", torch.tanh)):
        three = _three(both, c, f)
        got = torch.stack((three.relevant, three.whole - three.bias - three.relevant, three.bias))
        torch.testing.assert_close(got, torch.tensor(g[f"three_{name}"]), rtol=1e-10, atol=1e-12)
    two = _two(both)
    got = torch.stack((two.relevant, two.irrelevant))
    torch.testing.assert_close(got, torch.tensor(g["tanh_two"]), rtol=1e-10, atol=1e-12)


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.erfinv(x)


@pytest.mark.parametrize(("module", "words"), [
    (nn.Sequential(nn.Linear(3, 3), nn.Sequential(Inner())), ["erfinv", "at 1.0 (Inner)"]),
    (nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), ["batch_norm", "statistics of the batch", "at 0"]),
    (Op(lambda x: x.max() + x), ["max", "over the whole tensor"]),
    (Op(lambda x: nn.functional.layer_norm(x, (3,), x.mean(0))), ["layer_norm", "scale or bias that depends"]),
    (Op(lambda x: x.as_strided((x.shape[0], 3), (3, 1))), ["as_strided"]),
])  # fmt: skip
def test_an_operation_without_a_rule_names_itself_and_its_place(module: nn.Module, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        Decomposer(module.eval()).decompose(torch.rand(3, 3), torch.ones(3, 1, 3))
    assert all(word in str(caught.value) for word in words)
