"""Attention methods refuse nets whose tokens move or meet but in attention, and heads that are none."""

from __future__ import annotations

import pytest
import torch
from test_attention_methods import Own, explain
from torch import Tensor, nn
from transformer_nets import batch_of

from attrib.types import UserError

T = 18  # two tokens and 4 x 4 patches
ORDER = torch.randperm(T, generator=torch.Generator().manual_seed(0))


class Moved(Own):
    """Something is done to the tokens between the attentions, or behind the last one."""

    def __init__(self, between: str = "none", behind: str = "none", reads: str = "class") -> None:
        super().__init__(reads)
        self.between, self.behind = between, behind
        self.mix, self.over = nn.Linear(T, T), nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.gate, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.heads = nn.ModuleList((nn.Linear(8, 3), nn.Linear(8, 3)))

    def moved(self, z: Tensor, how: str) -> Tensor:
        grid = z[:, 2:].unflatten(1, (4, 4))
        return {
            "none": lambda: z,
            "norm": lambda: self.norm(z),
            "sequence first": lambda: self.norm(z.transpose(0, 1)).transpose(0, 1),
            "there and back": lambda: self.norm(z.flip(1)).flip(1),
            "flip": lambda: z.flip(1),
            "roll": lambda: z.roll(3, 1),
            "order": lambda: z[:, ORDER],
            "halves": lambda: torch.cat((z[:, T // 2 :], z[:, : T // 2]), 1),
            "transposed": lambda: torch.cat((z[:, :2], grid.transpose(1, 2).flatten(1, 2)), 1),
            "class last": lambda: torch.cat((z[:, 1:], z[:, :1]), 1),
            "two swapped": lambda: z[:, [*range(T - 2), T - 1, T - 2]],
            "mixed": lambda: self.mix(z.transpose(1, 2)).transpose(1, 2),
            "convolved": lambda: z + self.over(z.transpose(1, 2)).transpose(1, 2),
            "gated": lambda: z * self.gate(z.mean(1, keepdim=True)).sigmoid(),
        }[how]()

    def forward(self, x: Tensor) -> Tensor:
        z = torch.cat((self.first.expand(len(x), -1, -1), self.patch(x).flatten(2).transpose(1, 2)), 1) + self.places
        for i, (qkv, mlp) in enumerate(zip(self.qkv, self.mlp)):
            q, k, v = qkv(z).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            mixed = ((q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).flatten(2)
            around = z.flip(1) if (self.between, i) == ("residual", 2) else z
            z = around + mixed
            z = z + mlp(z).relu()
            z = self.moved(z, self.between) if i == 0 and self.between != "residual" else z
        z = self.moved(z, self.behind)
        if self.reads == "two heads":
            return self.heads[0](z[:, 0]) + self.heads[1](z[:, 1])
        read = {
            "class": lambda: z[:, 0],
            "last": lambda: z[:, -1],
            "all": lambda: z.mean(1),
            "grid": lambda: z[:, 2:].unflatten(1, (4, 4)).mean((1, 2)),
            "class and mean": lambda: z[:, 0] + self.gate(z[:, 1:].mean(1)),
            "weighted": lambda: (z * torch.linspace(1, 2, T, dtype=z.dtype)[:, None]).mean(1),
            "weighted two": lambda: 3 * z[:, 0] + z[:, 1],
            "largest": lambda: z.amax(1),
        }[self.reads]
        return self.head(read())


MOVES = ("flip", "roll", "order", "halves", "transposed", "class last", "two swapped", "mixed", "convolved", "gated")


@pytest.mark.parametrize("reads", ["class", "all"])
@pytest.mark.parametrize("how", MOVES)
@pytest.mark.quick(every=3)
def test_tokens_that_move_or_meet_between_attentions_are_refused(how, reads):
    torch.manual_seed(0)
    with pytest.raises(UserError, match=r"depends on other tokens of the attention .*moved or mixed between"):
        explain(Moved(how, reads=reads), batch_of("vit"))


@pytest.mark.parametrize(
    ("behind", "reads"),
    [
        ("mixed", "class"),
        ("mixed", "all"),
        ("convolved", "all"),
        ("none", "weighted"),
        ("none", "weighted two"),
        ("none", "largest"),
    ],
)
def test_tokens_that_are_not_read_as_they_are_is_refused(behind, reads):
    torch.manual_seed(0)
    with pytest.raises(UserError, match="does not read the tokens that the last attention"):
        explain(Moved(behind=behind, reads=reads), batch_of("vit"))


def test_what_goes_around_the_last_attention_must_not_move():
    with pytest.raises(UserError, match=r"what goes around the last attention is moved|before they are read"):
        explain(Moved("residual", reads="grid"), batch_of("vit"))


@pytest.mark.parametrize(
    ("between", "behind", "reads"),
    [
        ("norm", "norm", "all"),
        ("sequence first", "none", "grid"),
        ("there and back", "class last", "class"),
        ("none", "flip", "last"),
        ("none", "order", "all"),
        ("none", "none", "class and mean"),
        ("none", "none", "two heads"),
    ],
)
@pytest.mark.quick(every=3)
def test_nets_whose_tokens_stay_are_right(between, behind, reads):
    torch.manual_seed(0)
    assert explain(Moved(between, behind, reads), batch_of("vit"))["map"].std() > 0


class Parts(nn.Module):
    """Attention of one head within rows, columns, strips or windows, (N, parts, T, T)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.patch, self.qkv = kind, nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 24)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.patch(x).permute(0, 2, 3, 1)  # 8 x 8 places
        z = {
            "rows": lambda: z,
            "columns": lambda: z.transpose(1, 2),
            "strips": lambda: z.reshape(len(x), 4, 16, 8),
            "halves": lambda: z.reshape(len(x), 2, 32, 8),
            "windows": lambda: z.unflatten(1, (2, 4)).unflatten(3, (2, 4)).transpose(2, 3).reshape(len(x), 4, 16, 8),
        }[self.kind]()
        q, k, v = self.qkv(z).chunk(3, -1)
        return self.head(((q @ k.transpose(2, 3)).softmax(-1) @ v + z).mean((1, 2)))


@pytest.mark.parametrize("kind", ["rows", "columns", "strips", "halves", "windows"])
def test_parts_of_an_image_are_no_heads(kind):
    torch.manual_seed(0)
    with pytest.raises(UserError, match="that are not heads, as the same token stands at another place"):
        explain(Parts(kind), batch_of("vit"))
