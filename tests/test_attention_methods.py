"""Raw attention, rollout and gradient x attention: against loops over what the nets themselves return."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contracts import method_contract
from torch import nn
from transformer_nets import TEXT, Masked, batch_of, classifier, net_of

from attrib.methods.attention import Attention
from attrib.methods.parts.layout import resize
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.relevance.attentions import Attentions, read_tokens
from attrib.types import Batch, UserError

FOLLOW = ["last_layer", "rollout", "gradient"]


def own_attention(net: Masked, ids: torch.Tensor, target: int) -> tuple[list, list]:
    """What Hugging Face's own eager kernel returns for one text: (heads, T, T) of every layer, and gradients."""
    net.net.set_attn_implementation("eager")
    net.net.requires_grad_()
    out = net.net(ids[None], attention_mask=torch.ones_like(ids)[None], output_attentions=True)
    gradients = torch.autograd.grad(out.logits[0, target], out.attentions)
    return [a[0].detach() for a in out.attentions], [g[0] for g in gradients]


def by_hand(follow: str, weights: list, gradients: list, read: list[int]) -> torch.Tensor:
    """(T,) by loops over heads and tokens."""
    t = weights[0].shape[-1]
    if follow == "last_layer":
        found = sum(weights[-1]) / len(weights[-1])
    else:
        found = torch.eye(t, dtype=torch.float64)
        for weight, gradient in zip(weights, gradients):
            if follow == "rollout":
                step = torch.zeros(t, t, dtype=torch.float64)
                for i in range(t):
                    for j in range(t):
                        step[i, j] = 0.5 * weight[:, i, j].mean() + 0.5 * (i == j)
                found = step @ found
            else:
                found = found + sum((g * w).clamp(min=0) for g, w in zip(gradient, weight)) / len(weight) @ found
        if follow == "gradient":
            found = found - torch.eye(t, dtype=torch.float64)
    return torch.stack([found[i] for i in read]).mean(0)


@pytest.mark.parametrize("follow", FOLLOW)
@pytest.mark.parametrize("name", TEXT)
@pytest.mark.quick("bert-gradient", "gpt2-gradient")
def test_texts(name, follow):
    """The kernel of torch's own attention gives what the eager one does; padding does not matter."""
    batch = batch_of(name)
    found = Attention(follow=follow).attribute(classifier(name), batch, {}, Noise(batch.uids))["map"]
    for i, length in enumerate(batch.lengths.tolist()):
        weights, gradients = own_attention(net_of(name).double(), batch.x[i, :length], int(batch.target[i]))
        read = [length - 1] if name in ("gpt2", "llama") else [0]  # GPT-2 and Llama read the last token
        expected = by_hand(follow, weights, gradients, read)
        atol = 1e-6 * expected.abs().max().item()  # Llama's norm is in float32
        torch.testing.assert_close(found[i, :length], expected, rtol=0, atol=atol)
        assert not found[i, length:].any()


class Own(nn.Module):
    """A transformer of 4 x 4 patches behind two tokens, written out, that keeps what it attends to."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.reads, self.patch = reads, nn.Conv2d(3, 8, 8, 8)
        self.first, self.places = nn.Parameter(torch.randn(1, 2, 8)), nn.Parameter(torch.randn(1, 18, 8))
        self.qkv = nn.ModuleList(nn.Linear(8, 24) for _ in range(3))
        self.mlp = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head, self.kept = nn.Linear(8, 3), []

    def forward(self, x):
        z = (
            torch.cat((self.first.expand(x.shape[0], -1, -1), self.patch(x).flatten(2).transpose(1, 2)), 1)
            + self.places
        )
        kept = []
        for qkv, mlp in zip(self.qkv, self.mlp):
            q, k, v = qkv(z).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(2, 3)).softmax(-1)
            kept.append(weights)
            z = z + (weights @ v).transpose(1, 2).flatten(2)
            z = z + F.gelu(mlp(z))
        if type(z) is torch.Tensor:  # torch refuses to export what keeps tensors
            self.kept = kept
        read = {"class": z[:, 0], "last": z[:, -1], "grid": z[:, 2:].mean(1), "both": z[:, :2].mean(1)}[self.reads]
        return self.head(read)


@pytest.mark.parametrize("follow", FOLLOW)
@pytest.mark.parametrize("reads", ["class", "last", "grid", "both"])
@pytest.mark.quick("grid-gradient", "last-last_layer", "both-rollout")
def test_images_whatever_the_logits_read(follow, reads):
    net, batch = Own(reads).double(), batch_of("vit", 3)
    found = Attention(follow=follow).attribute(Classifier(net, dtype=torch.float64), batch, {}, Noise(batch.uids))
    read = {"class": [0], "last": [17], "grid": list(range(2, 18)), "both": [0, 1]}[reads]
    for i in range(3):
        logits = net(batch.x[i : i + 1])
        gradients = torch.autograd.grad(logits[0, batch.target[i]], net.kept)
        expected = by_hand(follow, [w[0].detach() for w in net.kept], [g[0] for g in gradients], read)
        expected = resize(expected[2:].reshape(1, 4, 4), (32, 32))[0]
        torch.testing.assert_close(found["map"][i], expected, rtol=0, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["vit", "deit", "torchvision", "mean"])
@pytest.mark.quick(every=2)
def test_shares_sum_to_one(name):
    """What the logits read is shared out among all tokens; the tokens that they read are the pooling's."""
    batch = batch_of(name, 2)
    attentions = Attentions(classifier(name).graph(batch.x))
    read = read_tokens(attentions(batch.x))
    first = {"vit": 1, "deit": 2, "torchvision": 1, "mean": 16}[name]
    expected = torch.zeros_like(read)
    expected[:, :first] = 1 / first
    torch.testing.assert_close(read, expected)
    for weight in attentions(batch.x).weights:
        torch.testing.assert_close(weight.sum(-1), torch.ones_like(weight[..., 0]))


@pytest.mark.parametrize(
    ("name", "follow"),
    [
        ("torchvision", "gradient"),
        *(pytest.param("torchvision", follow, marks=pytest.mark.slow) for follow in ("last_layer", "rollout")),
        *(pytest.param("distilbert", follow, marks=pytest.mark.slow) for follow in FOLLOW),
    ],
)
def test_contract(name, follow):
    batch = batch_of(name)
    method_contract(Attention(follow=follow), lambda rows, dtype: classifier(name, dtype, rows), batch, {})


# ---- what is refused -----------------------------------------------------------------------------------


def explain(net, batch: Batch):
    model = net if isinstance(net, Classifier) else Classifier(net.double(), dtype=torch.float64)
    return Attention().attribute(model, batch, {}, Noise(batch.uids))


def test_windows_are_refused():
    with pytest.raises(UserError, match=r"layers.0.blocks.0.attn \(WindowAttention\) attends with matrices .*windows"):
        explain(classifier("swin"), batch_of("swin"))


class Other(Own):
    """Attention that cannot be followed."""

    def __init__(self, kind: str) -> None:
        super().__init__("class")
        self.kind, self.mix = kind, nn.Linear(2, 2)

    def forward(self, x):
        first = self.first.expand(x.shape[0], -1, -1)
        z = torch.cat((first, self.patch(x).flatten(2).transpose(1, 2)), 1) + self.places
        start = z
        for qkv, mlp in zip(self.qkv, self.mlp):
            q, k, v = qkv(z).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            if self.kind == "cross":
                k, v = qkv(start).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)[1:]
            if self.kind == "fewer":
                k, v = k[:, :, ::2], v[:, :, ::2]
            weights = (q @ k.transpose(2, 3)).softmax(-1)
            if self.kind == "talking":
                weights = self.mix(weights.movedim(1, -1)).movedim(-1, 1)
            z = z + mlp((weights @ v).transpose(1, 2).flatten(2))
            z = z[:, :-2] if self.kind == "drops" else z
        return self.head(z[:, 0])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cross", "is not what the attention before it gives"),
        ("fewer", "18 tokens attend to 9, not to one another"),
        ("talking", "is not the left factor of a product alone"),
        ("drops", "attends to 16 tokens, and the attention before it to 18"),
    ],
)
def test_attention_of_another_kind_is_refused(kind, message):
    with pytest.raises(UserError, match=message):
        explain(Other(kind), batch_of("vit"))


def test_a_net_without_attention_is_refused():
    with pytest.raises(UserError, match="Sequential has none"):
        explain(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3)), batch_of("vit"))


# ---- attention that is written out ---------------------------------------------------------------------


def _heads_first(q, k, v):
    return (t.transpose(1, 2) for t in (q, k, v))


def _plain(q, k, v):
    q, k, v = _heads_first(q, k, v)
    return ((q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2)


def _einsum(q, k, v):
    weights = torch.einsum("nqhd,nkhd->nhqk", q, k).softmax(-1)
    return torch.einsum("nhqk,nkhd->nqhd", weights, v)


def _exponentials(q, k, v):
    q, k, v = _heads_first(q, k, v)
    scores = q @ k.transpose(2, 3)
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    return (powers / powers.sum(-1, keepdim=True) @ v).transpose(1, 2)


def _heads_last(q, k, v):
    weights = torch.einsum("nqhd,nkhd->nqkh", q, k).softmax(2)
    return torch.einsum("nqkh,nkhd->nqhd", weights, v)


def _keys_first(q, k, v):
    q, k, v = _heads_first(q, k, v)
    weights = (k @ q.transpose(2, 3)).softmax(-2)
    return (v.transpose(2, 3) @ weights).permute(0, 3, 1, 2)


class Written(Own):
    def __init__(self, attention) -> None:
        super().__init__("class")
        self.attention = attention

    def forward(self, x):
        first = self.first.expand(x.shape[0], -1, -1)
        z = torch.cat((first, self.patch(x).flatten(2).transpose(1, 2)), 1) + self.places
        for qkv, mlp in zip(self.qkv, self.mlp):
            z = z + mlp(self.attention(*qkv(z).unflatten(2, (3, 2, 4)).unbind(2)).flatten(2))
        return self.head(z[:, 0])


def test_it_does_not_matter_how_attention_is_written():
    torch.manual_seed(0)
    plain = Written(_plain)
    batch = batch_of("vit").to("cpu", torch.float64)
    expected = explain(plain, batch)["map"]
    for attention in (_einsum, _exponentials):
        other = Written(attention)
        other.load_state_dict(plain.state_dict())
        torch.testing.assert_close(explain(other, batch)["map"], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", [_heads_last, _keys_first])
def test_attention_in_another_order_is_refused(attention):
    with pytest.raises(UserError, match="is not the left factor of a product alone"):
        explain(Written(attention), batch_of("vit"))
