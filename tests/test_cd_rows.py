"""Contextual decomposition of batches: how rows are handled, gradients, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contracts import seeded, unchanged
from nets import small_cnn, small_cnn_images
from torch import Tensor, nn

from attrib.decomposition import Decomposer, decompose, table
from attrib.decomposition.chunks import _distinct
from attrib.models import Classifier
from attrib.types import SampleError, UserError

# ---- a net with everything, and how rows are handled --------------------------------------------


class Everything(nn.Module):
    """Re-used modules, functional calls, in-place operations, residuals, gates, constants beside the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False)
        self.norm, self.relu = nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.squeeze, self.excite = nn.Linear(6, 3), nn.Linear(3, 6)
        self.token, self.position = nn.Parameter(torch.ones(1, 1, 6)), nn.Parameter(torch.ones(1, 17, 6))
        self.attention, self.layer = nn.MultiheadAttention(6, 2, batch_first=True), nn.LayerNorm(6)
        self.up, self.fc = nn.ConvTranspose2d(6, 6, 2, 2), nn.Linear(6, 4)

    def block(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.conv(x)))
        y = self.norm(self.conv(y))
        torch.relu_(y)  # its result is not used, its effect is
        y += x
        return F.leaky_relu_(y, 0.2)

    def gate(self, x: Tensor) -> Tensor:
        s = F.adaptive_avg_pool2d(x, 1).flatten(1)
        s = torch.sigmoid(self.excite(F.silu(self.squeeze(s))))
        return x * s[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.relu(self.stem(x)), 2)
        x = self.gate(self.block(self.block(x)))
        x = F.avg_pool2d(self.up(x).add_(1), 2)
        n, c, h, w = x.size()
        z = x.reshape(n, c, h * w).permute(0, 2, 1)
        z = torch.cat((self.token.expand(n, -1, -1), z), 1) + self.position
        y = self.layer(z)
        z = z + self.attention(y, y, y, need_weights=False)[0]
        return self.fc(F.dropout(F.gelu(z)[:, 0] + z[:, 1:].amax(1), 0.5, self.training))


def everything() -> nn.Module:
    net = seeded(Everything(), 0.6).eval()
    net.token += 0.3  # one of its numbers is zero, where a tie makes the parts jump
    return net


def blobs(n: int = 4, m: int = 5) -> tuple[Tensor, Tensor]:
    r = np.random.RandomState(3)
    return torch.tensor(r.randn(n, 3, 8, 8)), torch.tensor(r.rand(n, m, 8, 8) > 0.5)


@pytest.mark.slow
def test_a_net_with_everything() -> None:
    x, masks = blobs()
    model = Classifier(everything(), rows=7, dtype=torch.float64)
    with unchanged(x, masks, model):
        found = decompose(model, x, masks, checks=5)
    assert found.error.max() < 1e-12
    assert torch.allclose(found.logits, everything().double()(x))
    every = decompose(model, x, masks, both=True)
    assert torch.allclose(every.relevant, found.relevant, atol=1e-12)
    # The masks matter, and not in the same way for all classes.
    assert found.relevant.std(1).min() > 1e-3
    plain = Decomposer(everything().double()).decompose(x, masks)
    assert torch.allclose(plain.relevant, found.relevant, atol=1e-12)
    assert torch.allclose(plain.irrelevant, found.irrelevant, atol=1e-12)


def test_a_batch_is_the_same_as_single_samples_in_any_order_and_for_any_row_limit() -> None:
    x, masks = blobs()
    model = Classifier(everything(), rows=64, dtype=torch.float64)
    wanted = decompose(model, x, masks)
    for rows in (3, 20):
        model.rows = rows
        found = decompose(model, x, masks)
        assert torch.allclose(found.relevant, wanted.relevant, atol=1e-12)
        assert torch.allclose(found.error, wanted.error, atol=1e-12)
    single = [decompose(model, x[i : i + 1], masks[i : i + 1, j : j + 1]).relevant for i in (0, 2) for j in (0, 4)]
    assert torch.allclose(torch.cat(single).reshape(2, 2, 4), wanted.relevant[::2, ::4], atol=1e-12)
    order, others = torch.tensor([2, 0, 3, 1]), torch.tensor([4, 1, 0, 2, 3])
    found = decompose(model, x[order], masks[order][:, others])
    assert torch.allclose(found.relevant, wanted.relevant[order][:, others], atol=1e-12)


def test_different_numbers_of_masks_in_any_order() -> None:
    x, masks = blobs()
    model = Classifier(everything(), rows=4, dtype=torch.float64)
    wanted = decompose(model, x, masks)
    pairs = [(3, 1), (0, 0), (0, 4), (2, 2), (3, 0), (0, 1), (2, 2)]
    samples, which = (torch.tensor(v) for v in zip(*pairs, strict=True))
    found = decompose(model, x, masks[samples, which], samples=samples)
    assert torch.allclose(found.relevant, wanted.relevant[samples, which], atol=1e-12)
    assert torch.allclose(found.irrelevant, wanted.irrelevant[samples, which], atol=1e-12)
    assert found.error[1] == 0  # no mask
    four = torch.tensor([2, 0, 3, 1])  # as many masks as samples, in another order
    found = decompose(model, x, masks[four, 0], samples=four)
    assert torch.allclose(found.relevant, wanted.relevant[four, 0], atol=1e-12)


def test_the_whole_and_nothing_and_shares() -> None:
    model = Classifier(small_cnn(), dtype=torch.float64)
    x = small_cnn_images()[0][:2].double()
    masks = torch.stack((torch.ones(32, 32), torch.zeros(32, 32), torch.full((32, 32), 0.3)))[None].expand(
        2, -1, -1, -1
    )
    found = decompose(model, x, masks)
    assert torch.allclose(found.relevant[:, 0], found.logits)
    per_channel = masks[:, :, None].expand(-1, -1, 3, -1, -1)
    assert torch.equal(decompose(model, x, per_channel).relevant, found.relevant)
    assert not found.relevant[:, 1].isclose(found.logits).any()
    # ReLU, maxima and proportional biases are homogeneous: 0.3 of the input is 0.3 of everything.
    assert torch.allclose(found.relevant[:, 2], 0.3 * found.logits)


class Windows(nn.Module):
    """Puts windows of each image into the rows, so that samples and rows cannot be matched."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        z = x.reshape(n, 3, 2, 4, 8).transpose(1, 2).reshape(n * 2, 96)
        return torch.tanh(self.linear(z)).reshape(n, 2, 4).sum(1)


def test_rows_that_are_merged_with_something_else() -> None:
    x, masks = blobs()
    net = seeded(Windows(nn.Linear(96, 4)), 0.6).double().eval()
    found = decompose(Classifier(net, rows=3, dtype=torch.float64), x, masks)
    decomposer = Decomposer(net)  # reads the net once
    one = [decomposer.decompose(x[i : i + 1], masks[i : i + 1, j : j + 1]).relevant for i in range(4) for j in range(5)]
    assert torch.allclose(torch.cat(one).reshape(4, 5, 4), found.relevant, atol=1e-12)


def test_vectors_and_sequences() -> None:
    r = np.random.RandomState(0)
    table = seeded(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), 0.9)
    x = torch.tensor(r.randn(2, 5))
    found = decompose(Classifier(table, dtype=torch.float64), x, torch.eye(5).bool().expand(2, -1, -1))
    assert found.relevant.shape == (2, 5, 3)
    sound = seeded(nn.Sequential(nn.Conv1d(2, 4, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)), 0.9)
    x, masks = torch.tensor(r.randn(2, 2, 20)), torch.tensor(r.rand(2, 4, 20) > 0.4)
    assert decompose(Classifier(sound, dtype=torch.float64), x, masks).relevant.shape == (2, 4, 3)


# ---- gradients, errors ---------------------------------------------------------------------------


def test_a_penalty_on_the_relevant_part_has_gradients() -> None:
    """Rieger et al., ICML 2020: the relevant part of an unwanted feature as a penalty; against finite differences."""
    net = everything().double().requires_grad_()
    decomposer = Decomposer(net)
    x, masks = blobs(2, 2)

    def penalty(x: Tensor) -> Tensor:
        parts = decomposer.decompose(x, masks)
        return parts.relevant.square().sum() + parts.irrelevant[..., 0].sum()

    leaf = x.clone().requires_grad_()
    parameters = [p for _, p in net.named_parameters()]
    gradients = torch.autograd.grad(penalty(leaf), [leaf, *parameters])
    r, step = np.random.RandomState(0), 1e-6
    for value, gradient in zip([leaf, *parameters], gradients, strict=True):
        direction = torch.tensor(r.randn(*value.shape))
        with torch.no_grad():
            value += step * direction
            above = penalty(leaf).item()
            value -= 2 * step * direction
            below = penalty(leaf).item()
            value += step * direction
        assert (gradient * direction).sum().item() == pytest.approx((above - below) / (2 * step), rel=1e-4, abs=1e-6)
    assert all(g.abs().max() > 0 for g in gradients)


def test_training_with_the_penalty_makes_a_feature_irrelevant() -> None:
    generator = torch.Generator().manual_seed(0)
    net = seeded(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), 0.9).float().eval().requires_grad_()
    decomposer, optimizer = Decomposer(net), torch.optim.Adam(net.parameters(), 0.02)
    x = torch.randn(64, 4, generator=generator)
    mask = torch.tensor([1.0, 0, 0, 0]).expand(64, 1, 4)

    def used() -> Tensor:
        relevant = decomposer.decompose(x, mask).relevant
        return (relevant[..., 0] - relevant[..., 1]).abs().mean()

    before = used().item()
    for _ in range(60):
        optimizer.zero_grad()
        (F.cross_entropy(net(x), (x[:, 1] > 0).long()) + used()).backward()
        optimizer.step()
    assert used().item() < 0.2 * before
    assert F.cross_entropy(net(x), (x[:, 1] > 0).long()).item() < 0.3


def test_an_incomplete_rule_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if tanh were linear. The parts add up even so; one mask per sample that goes both ways shows it."""
    monkeypatch.setitem(table.RULES, "tanh", lambda call: call.linear())
    net = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3)), 0.5).eval()
    x, masks = blobs(2)
    model = Classifier(net, dtype=torch.float64)
    assert decompose(model, x, masks, checks=0).error.max() < 1e-12
    with pytest.raises(SampleError, match=r"not complete.*of the largest \(more than 1e-09; sample \d of 2\)"):
        decompose(model, x, masks)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] if x.sum() > 0 else -x.flatten(1)[:, :3]


def test_nets_that_cannot_be_decomposed() -> None:
    x, masks = blobs(2)
    with pytest.raises(UserError, match="eval mode"):
        Decomposer(nn.Linear(3, 3))
    with pytest.raises(UserError, match="torch cannot export Branch"):
        Decomposer(Branch().eval()).decompose(x, masks)
    last = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval()
    with pytest.raises(UserError, match=r"last operation must be an nn\.Linear .*, not relu of 1 \(ReLU\)"):
        Decomposer(last, output_bias=False).constant(torch.rand(2, 3))
    model = Classifier(everything(), dtype=torch.float64)
    with pytest.raises(ValueError, match="do not fit"):
        decompose(model, x, masks[..., :7])
    with pytest.raises(ValueError, match="do not match"):
        decompose(model, x, masks[:1])


def test_the_last_bias_can_be_left_out() -> None:
    x, masks = blobs(2)
    net = everything().double()
    model = Classifier(net, dtype=torch.float64)
    found = decompose(model, x, masks, decomposer=Decomposer(model, output_bias=False))
    assert torch.allclose(found.relevant + found.irrelevant, (net(x) - net.fc.bias)[:, None].expand(-1, 5, -1))
    assert torch.allclose(found.logits, net(x) - net.fc.bias)
    share = decompose(model, x, masks).relevant - found.relevant
    part, other = found.relevant.abs(), found.irrelevant.abs()
    assert torch.allclose(share, net.fc.bias * part / (part + other))


def test_the_samples_of_a_piece_are_those_that_unique_finds():
    for seed in range(5):
        values = torch.randint(0, 6, (11,), generator=torch.Generator().manual_seed(seed))
        expected = values.unique(return_inverse=True)
        for got, wanted in zip(_distinct(values, len(expected[0])), expected, strict=True):
            assert torch.equal(got, wanted)
