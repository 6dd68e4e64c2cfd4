"""The usual methods on texts, each against a slow and obvious derivation, one sentence at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from contracts import method_contract
from text_nets import PAD, K, lstm, text_classifier, text_net, texts
from torch import Tensor, nn

from attrib.methods import Method
from attrib.methods.baselines import Gradient, InputXGradient, IntegratedGradients, Occlusion, Random, SmoothGrad
from attrib.methods.surrogates import KernelShap
from attrib.models import Classifier
from attrib.models.huggingface import HuggingFaceClassifier
from attrib.noise import Noise
from attrib.types import Batch, UserError

NETS = ["lstm", "around", "untraceable"]
REDUCE = {
    "sum": lambda a: a.sum(-1),
    "abs_sum": lambda a: a.abs().sum(-1),
    "abs_max": lambda a: a.abs().max(-1).values,
}
SEVERAL = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0], [1, 1, 1, 0, 1], [0, 0, 0, 0, 1]])


def explain(method: Method, net: str, batch: Batch, rows: int = 7):
    return method.attribute(
        text_classifier(net)(rows, torch.float64), batch, {}, Noise(batch.uids, seed=5, dtype=torch.float64)
    )


@contextmanager
def embedded(net: nn.Module, z: Tensor):
    handle = net.embedding.register_forward_hook(lambda *_: z)
    yield
    handle.remove()


def sentence(net: nn.Module, batch: Batch, i: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Its embedded tokens (L, E), without padding, and the target's score as a function of them."""
    ids, target = batch.x[i : i + 1, : batch.lengths[i]], batch.target[i]

    def score(z: Tensor) -> Tensor:
        with embedded(net, z[None]):
            logits = net(ids)[0]
        return logits[target] if target.ndim == 0 else sum(logits[k] for k in range(K) if target[k])

    return net.embedding(ids)[0].detach(), score


def gradient(score: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(score(z), z)[0]


def each(
    net: nn.Module, batch: Batch, one: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """``one(score, z)`` of every sentence alone."""
    return tuple(one(score, z) for z, score in (sentence(net, batch, i) for i in range(len(batch))))


def padded(values: tuple[Tensor, ...], length: int) -> Tensor:
    return torch.stack([torch.cat((v, v.new_zeros(length - len(v)))) for v in values])


def same(found: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("several", [False, True])
def test_gradient_equals_finite_differences(net, several):
    batch, step = texts(4), 1e-5
    batch = Batch(batch.uids, batch.x, SEVERAL, None, batch.lengths, batch.words) if several else batch

    def differences(score, z):
        out = torch.zeros_like(z)
        for at in np.ndindex(*z.shape):
            e = torch.zeros_like(z)
            e[at] = step
            out[at] = (score(z + e) - score(z - e)) / (2 * step)
        return out

    expected = each(text_net(net), batch, differences)
    for name, reduce in REDUCE.items():
        found = explain(Gradient(reduce=name), net, batch)["map"]
        same(found, padded(tuple(map(reduce, expected)), 11), 1e-8)
        assert found.abs().sum(1).min() > 1e-6


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("reduce", REDUCE)
def test_input_x_gradient(net, reduce):
    batch = texts(4)
    expected = each(text_net(net), batch, lambda score, z: REDUCE[reduce](z * gradient(score, z)))
    same(explain(InputXGradient(reduce=reduce), net, batch)["map"], padded(expected, 11))


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("steps", "baseline", "reduce"), [(7, 0.0, "sum"), (20, -0.4, "sum"), (9, 0.0, "abs_max")])
@pytest.mark.parametrize("rows", [2, 50])
def test_integrated_gradients_equal_the_integral(net, steps, baseline, reduce, rows):
    batch = texts(4)
    nodes, weights = np.polynomial.legendre.leggauss(steps)

    def integral(score, z):
        start = torch.full_like(z, baseline)
        total = sum(
            w / 2 * gradient(score, start + (n + 1) / 2 * (z - start)) for n, w in zip(nodes, weights, strict=True)
        )
        return (z - start) * total

    expected = each(text_net(net), batch, integral)
    found = explain(IntegratedGradients(steps, baseline, reduce), net, batch, rows)
    same(found["map"], padded(tuple(map(REDUCE[reduce], expected)), 11), 1e-6)  # captum's weights are float32
    change = torch.stack(each(text_net(net), batch, lambda score, z: score(z) - score(torch.full_like(z, baseline))))
    same(found["delta"], torch.stack([e.sum() for e in expected]) - change, 1e-6)


@pytest.mark.parametrize("net", NETS)
def test_integrated_gradients_are_complete(net):
    batch = texts(4)
    found = explain(IntegratedGradients(steps=400), net, batch, rows=500)
    change = torch.stack(each(text_net(net), batch, lambda score, z: score(z) - score(torch.zeros_like(z))))
    assert change.abs().min() > 1e-3
    assert found["delta"].abs().max() < 1e-5
    same(found["map"].sum(1), change, 1e-5)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("reduce", REDUCE)
def test_smooth_grad_is_the_mean_gradient_of_noisy_copies(net, reduce):
    batch, expected = texts(4), []
    for i, uid in enumerate(batch.uids):
        z, score = sentence(text_net(net), batch, i)
        stream = Noise([uid], seed=5, dtype=torch.float64)
        sigma = 0.3 * (z.max() - z.min())
        copies = [z + sigma * stream.normal(*z.shape, ragged=0)[0] for _ in range(5)]
        expected.append(REDUCE[reduce](sum(gradient(score, copy) for copy in copies) / 5))
    found = explain(SmoothGrad(samples=5, sigma=0.3, reduce=reduce), net, batch)
    same(found["map"], padded(tuple(expected), 11))


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_occlusion_replaces_one_token_at_a_time(net, baseline):
    batch = texts(4)

    def falls(score, z):
        out = torch.zeros(len(z), dtype=z.dtype)
        for t in range(len(z)):
            covered = z.clone()
            covered[t] = baseline
            out[t] = score(z) - score(covered)
        return out

    expected = padded(each(text_net(net), batch, falls), 11)
    for rows in (1, 7, 500):
        # captum divides in float32
        same(explain(Occlusion(baseline=baseline), net, batch, rows)["map"].double(), expected, 1e-6)


def test_random_is_uniform_and_each_samples_own():
    batch = texts(4)
    found = explain(Random(), "lstm", batch)["map"]
    for one, uid, length in zip(found, batch.uids, batch.lengths.tolist(), strict=True):
        assert torch.equal(one[:length], Noise([uid], seed=5, dtype=torch.float64).uniform(length, ragged=0)[0])
        assert (one[length:] == 0).all()


# ---- transformers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    """A small one with random weights under which the words matter."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=20, num_labels=K, pad_token_id=PAD,
    )  # fmt: skip
    net = HuggingFaceClassifier(transformers.BertForSequenceClassification(config), pad_id=PAD, mask_id=0)
    r = np.random.RandomState(0)
    for p in net.parameters():
        if p.ndim == 2:
            p.data = torch.tensor(0.4 * r.randn(*p.shape))
    return net.double().eval().requires_grad_(False)


@pytest.mark.parametrize(
    "method", [Gradient(reduce="abs_sum"), IntegratedGradients(steps=3), KernelShap(samples=9, baseline="mask")]
)
def test_a_transformer_keeps_the_contract(bert, method):
    roles = bert.default_layers
    method_contract(method, lambda rows, dtype: Classifier(bert, roles, rows=rows, dtype=dtype), texts(4), {})


def test_behind_a_layer_norm_the_sum_of_the_gradient_is_refused(bert):
    model, batch = Classifier(bert, bert.default_layers, dtype=torch.float64), texts(4)
    with pytest.raises(UserError, match="reduce=sum leaves nothing"):
        Gradient(reduce="sum").attribute(model, batch, {}, Noise(batch.uids))
    norms = Gradient(reduce="abs_sum").attribute(model, batch, {}, Noise(batch.uids))["map"]
    assert norms[batch.mask].min() > 1e-3


# ---- oracle, rows, errors --------------------------------------------------------------------------


class OneWord(nn.Module):
    """The logits are a multiple of the number of times that token 7 stands in the text."""

    pad_id, mask_id = PAD, 0

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(12, 6, padding_idx=PAD), nn.Linear(1, K, bias=False)
        with torch.no_grad():
            self.embedding.weight.copy_(torch.eye(12)[:, 2:8] + 0.1)
            self.head.weight.copy_(torch.arange(1.0, K + 1)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        counts = ((self.embedding(x)[..., 5:] - 0.1) ** 2 * (x != PAD).unsqueeze(-1)).sum(1)
        return self.head(counts)


@pytest.mark.parametrize(
    "method",
    [
        Gradient(reduce="abs_max"),
        InputXGradient(reduce="abs_sum"),
        IntegratedGradients(steps=3, baseline=0.1, reduce="abs_sum"),
        Occlusion(baseline=0.1),
    ],
    ids=lambda m: type(m).__name__,
)
def test_the_word_that_counts_comes_first(method):
    x = torch.tensor([[2, 7, 3, 4], [7, 5, PAD, PAD], [3, 4, 8, 7]])
    batch = Batch(("a", "b", "c"), x, torch.tensor([0, 3, 4]), lengths=torch.tensor([4, 2, 4]), words=x)
    model = Classifier(OneWord(), {"embedding": "embedding"}, dtype=torch.float64)
    found = method.attribute(model, batch, {}, Noise(batch.uids))["map"].abs()
    assert found[x == 7].min() > 0.1
    assert found[x != 7].max() < 1e-6  # 0.1 is float32's


@pytest.mark.parametrize("rows", [1, 4, 10])
@pytest.mark.parametrize(
    "method",
    [Gradient(), InputXGradient(), IntegratedGradients(steps=6), SmoothGrad(samples=2), Occlusion()],
    ids=lambda m: type(m).__name__,
)
def test_never_more_rows_than_the_limit_and_all_are_counted(method, rows):
    batch, seen = texts(4), []
    model = text_classifier("lstm")(rows, torch.float64)
    model.until("embedding", batch.x)  # the first time it tries out the cut
    model.passed = 0
    model.module.fc.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    method.attribute(model, batch, {}, Noise(batch.uids, dtype=torch.float64))
    assert max(seen) <= rows
    assert rows == 1 or max(seen) > 1
    assert model.passed == sum(seen) + len(batch)  # those of the front


def test_the_embedding_must_be_one_vector_per_token():
    batch = texts(4)
    for layer, message in (("fc", r"fc gives \(4, 5\) for tokens \(4, 11\)"), (None, "no layer for the role 'embedd")):
        net = lstm()
        net.other = torch.nn.Embedding(3, 4)  # of two, nobody knows which one embeds the tokens
        model = Classifier(net, {"embedding": layer}, dtype=torch.float64)
        for method in (Gradient(), InputXGradient(), IntegratedGradients(), SmoothGrad(), Occlusion()):
            with pytest.raises(UserError, match=message):
                method.attribute(model, batch, {}, Noise(batch.uids))
