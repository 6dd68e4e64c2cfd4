"""Contextual decomposition of transformers and of whatever else the graph of a net shows; CD-T; one capture per net."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from test_cd_rules import OF, check, each, net, pair, rule, share
from torch import Tensor, nn

from attrib.decomposition import Decomposer, decompose
from attrib.decomposition.plan import Plan
from attrib.decomposition.table import TRANSFORMER_RULES
from attrib.methods.cd import CD
from attrib.models import Classifier
from attrib.models.graph import Graph
from attrib.noise import Noise
from attrib.types import Batch, UserError
from attrib.units import Partition

F64 = torch.float64


class Ids(nn.Module):
    """A text net of transformers, from ids to logits; 0 is padding."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.net = inner

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(input_ids=ids, attention_mask=(ids != 0).long()).logits


def texts(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 50, "num_labels": 3, "pad_token_id": 0}
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    options = {
        "Bert": small,
        "Roberta": small,
        "DistilBert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
        "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2},
        "Llama": {**small, "num_key_value_heads": 1},
    }[kind]
    config = getattr(transformers, f"{kind}Config")(**common, **options)
    return Ids(getattr(transformers, f"{kind}ForSequenceClassification")(config))


def pictures(kind: str) -> nn.Module:
    timm = pytest.importorskip("timm")
    tiny = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "num_classes": 3}
    if kind == "swin":
        return timm.models.SwinTransformer(**tiny, window_size=2, depths=(2, 1), num_heads=(2, 2))
    if kind == "deit":
        return timm.models.deit.VisionTransformerDistilled(**tiny, depth=2, num_heads=2)
    return timm.models.VisionTransformer(**tiny, depth=2, num_heads=2, init_values=0.5)


def lively(module: nn.Module) -> nn.Module:
    """With random weights large enough that attention is not the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * (0.4 if value.ndim > 1 else 0.2))
            if value.ndim == 1 and name.endswith("weight"):
                value += 1
    return module.eval().requires_grad_(False)


def case(kind: str, dtype: torch.dtype) -> tuple[Classifier, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    if kind in ("vit", "deit", "swin"):
        x = torch.randn(2, 3, 16, 16, generator=generator).to(dtype)
        return Classifier(lively(pictures(kind)), dtype=dtype), x, torch.rand(2, 4, 16, 16, generator=generator) > 0.5
    x = torch.randint(3, 50, (2, 6), generator=generator)
    x[1, 4:] = 0
    return Classifier(lively(texts(kind)), dtype=dtype), x, torch.rand(2, 4, 6, generator=generator) > 0.5


KINDS = ("vit", "deit", "swin", "Bert", "Roberta", "DistilBert", "GPT2", "Llama")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.quick("vit", "GPT2")
def test_transformers_are_complete(kind: str) -> None:
    """The irrelevant part of every mask on its own; by our rules and by CD-T's."""
    for dtype, limit in ((F64, 1e-6 if kind == "Llama" else 1e-9), (torch.float32, 1e-4)):  # Llama's norms: float32
        model, x, masks = case(kind, dtype)
        for decomposer in (Decomposer(model), Decomposer(model, rules=TRANSFORMER_RULES)):
            found = decompose(model, x, masks, decomposer=decomposer, checks=4)
            assert found.error.max() <= limit
            assert found.relevant.std(1).min() > 0
            torch.testing.assert_close(found.logits, model.logits(x))
            every = decompose(model, x, masks, decomposer=decomposer, both=True, tolerance=limit)
            torch.testing.assert_close(every.relevant, found.relevant, rtol=1e-3, atol=limit * 100)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["swin", "GPT2"])
@pytest.mark.quick("swin")
def test_windows_and_steps_in_the_rows_do_not_mix_samples(kind: str) -> None:
    model, x, masks = case(kind, F64)
    found = decompose(model, x, masks)
    assert Plan.of(model.graph(x)).apart
    single = [decompose(model, x[[i]], masks[[i], j : j + 1]).relevant for i in range(2) for j in range(4)]
    torch.testing.assert_close(torch.cat(single).reshape(2, 4, 3), found.relevant)


@pytest.mark.filterwarnings("ignore")
def test_positions_that_are_counted_from_the_ids_are_no_tokens() -> None:
    """RoBERTa's: its embedding of positions is a constant, as BERT's is."""
    model, x, masks = case("Roberta", F64)
    model.module.net.roberta.embeddings.word_embeddings.weight.zero_()
    found = decompose(model, x, masks).relevant  # nothing is left that a mask could divide
    torch.testing.assert_close(found, found[:, :1].expand_as(found))


def test_one_capture_per_net(monkeypatch: pytest.MonkeyPatch) -> None:
    captures, of = [], Graph.of
    monkeypatch.setattr(Graph, "of", lambda *given: captures.append(1) or of(*given))
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    model = Classifier(layers, dtype=F64, rows=5)
    for n in (1, 2, 4):
        batch = Batch(tuple("abcd"[:n]), torch.randn(n, 3, 8, 8).double(), torch.zeros(n, dtype=torch.long))
        CD(units=Partition(side=2)).attribute(model, batch, {}, Noise(batch.uids))
    assert len(captures) == 1


# ---- what the graph makes possible ------------------------------------------------------------------


def maxout(x: Tensor) -> Tensor:
    return torch.maximum(x[:, :2], x[:, 2:])


def test_the_larger_of_two_by_the_values_of_shapley() -> None:
    def expected(r: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        a = (maxout(r) + maxout(r + q) - maxout(q)) / 2
        return a, maxout(r + q) - a

    check(net(maxout), *pair(4, 3), expected)


def test_what_a_comparison_chooses_is_chosen_by_the_whole() -> None:
    def expected(r: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        chosen = (r + q)[:, :2] > 0.1
        r, q = r[:, 2:], q[:, 2:]
        return torch.where(chosen, r, torch.zeros_like(r)), torch.where(chosen, q, torch.full_like(q, -2.0))

    check(net(lambda x: torch.where(x[:, :2] > 0.1, x[:, 2:], -2.0)), *pair(4, 3), expected)
    check(
        net(lambda x: x[:, 2:] * (x[:, :2] > 0.1)),
        *pair(4, 3),
        lambda r, q: tuple(p[:, 2:] * ((r + q)[:, :2] > 0.1) for p in (r, q)),
    )


DIVIDED = {
    "sum": (lambda x: x / x.abs().sum(1, keepdim=True), lambda w: w.abs().sum(1, keepdim=True)),
    "normalize": (lambda x: F.normalize(x, dim=1), lambda w: w.square().sum(1, keepdim=True).sqrt()),
    "by hand": (lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 0.1),
                lambda w: (w.square().mean(1, keepdim=True) + 0.1).sqrt()),
    "power": (lambda x: x * (x.pow(2).mean(1, keepdim=True) + 0.1) ** -0.5,
              lambda w: (w.square().mean(1, keepdim=True) + 0.1).sqrt()),
    "var_mean": (lambda x: x / torch.var_mean(x, 1, keepdim=True)[0].sqrt(), lambda w: w.var(1, keepdim=True).sqrt()),
}  # fmt: skip


@pytest.mark.parametrize("name", DIVIDED)
@pytest.mark.quick(every=2)
def test_a_divisor_is_that_of_the_whole(name: str) -> None:
    op, divisor = DIVIDED[name]
    check(net(op), *pair(4, 3), lambda r, q: (r / divisor(r + q), q / divisor(r + q)))


def test_local_response_norm() -> None:
    def divisor(w: Tensor) -> Tensor:
        out = torch.empty_like(w)
        for c in range(w.shape[1]):
            near = w[:, max(0, c - 1) : c + 2]
            out[:, c] = (2.0 + 0.3 * near.square().sum(1) / 3) ** 0.75
        return out

    norm = nn.LocalResponseNorm(3, alpha=0.3, beta=0.75, k=2.0)
    check(net(norm), *pair(4, 3, 2), lambda r, q: (r / divisor(r + q), q / divisor(r + q)))


@pytest.mark.parametrize("op", [torch.sqrt, lambda x: x**0.3, torch.log1p])
def test_a_function_that_is_not_defined_everywhere_keeps_its_ratio(op) -> None:
    x, factors = pair(4)
    x, module = x.abs(), net(lambda x: op(x))
    x[0, 0] = 0.0
    for both in (False, True):
        relevant, irrelevant = rule(module, x, factors, both)
        for i, s in enumerate(OF.tolist()):
            for j, value in enumerate(x[s].tolist()):
                ratio = float(op(x[s, j])) / value if value else 0.0
                assert relevant[i, j].item() == pytest.approx(ratio * value * factors[i, j].item(), abs=1e-12)
        torch.testing.assert_close(relevant + irrelevant, op(x)[OF])


def test_a_gated_linear_unit() -> None:
    def expected(r: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        (a, b), (c, d) = r.chunk(2, 1), q.chunk(2, 1)
        gate = (b.sigmoid() - 0.5 + (b + d).sigmoid() - d.sigmoid()) / 2
        gate, _ = share(gate, (b + d).sigmoid() - 0.5 - gate, torch.full_like(b, 0.5), 0.5)
        return a * gate, (a + c) * (b + d).sigmoid() - a * gate

    x, factors = pair(4, 3)
    check(net(lambda x: F.glu(x, 1)), x, torch.where(factors == 0, 0.3, factors), expected)


CHOSEN = {
    "max": lambda x: x.max(1)[0], "min": lambda x: x.min(1)[0], "amin": lambda x: x.amin(1),
    "median": lambda x: x.median(1).values, "sort": lambda x: x.sort(1)[0], "topk": lambda x: x.topk(2, 1)[0],
    "kthvalue": lambda x: x.kthvalue(2, 1)[0],
    "argmax": lambda x: x.gather(1, x.argmax(1, keepdim=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.quick(every=2)
def test_numbers_are_chosen_by_the_whole(name: str) -> None:
    op = CHOSEN[name]

    def expected(r: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        w = r + q
        out = op(w)
        parts = torch.empty(2, *out.shape, dtype=F64)
        for place in torch.cartesian_prod(*(torch.arange(n) for n in out.shape)).tolist():
            column = w[place[0], :, place[-1]] if w.ndim == 3 else w[place[0]]
            (at,) = (column == out[tuple(place)]).nonzero().T.tolist()
            for part, values in zip(parts, (r, q), strict=True):
                part[tuple(place)] = values[place[0], at[0], place[-1]]
        return parts[0], parts[1]

    check(net(op), *pair(4, 3), expected)


def test_a_state_to_begin_with() -> None:
    class Started(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.first = nn.RNN(3, 4, batch_first=True), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x, self.first(x[:, 0])[None])[0].flatten(1)

    module = net(Started())
    x, factors = pair(5, 3)
    one, other = rule(module, x, factors, False), rule(module, x, factors, True)
    torch.testing.assert_close(one[0] + one[1], module(x)[OF])
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", [
    lambda x: x + x.new_zeros(x.shape[0], 1) + x.size(0) * 0.0,
    lambda x: torch.stack([x, 2 * x]).sum(0),
    lambda x: torch.cat([x, 3 * x], 0).view(2, x.shape[0], -1).sum(0),
    lambda x: x.transpose(0, 1).reshape(-1, 1).tanh().view(4, -1).t(),
])  # fmt: skip
@pytest.mark.quick("<lambda>1")
def test_rows_in_any_order_inside_the_net(op) -> None:
    """Two copies one after the other, columns before rows: then each row is computed with a whole of its own."""
    x, factors = pair(4)
    module = net(op)
    for both in (False, True):
        got = rule(module, x, factors, both)
        torch.testing.assert_close(got[0] + got[1], module(x)[OF])
        one = [rule_of_one(module, x[s], factors[i]) for i, s in enumerate(OF.tolist())]
        torch.testing.assert_close(got[0], torch.cat(one))


def rule_of_one(module: nn.Module, x: Tensor, factors: Tensor) -> Tensor:
    return Decomposer(module).rows(x[None], factors[None], torch.tensor([0]))[0]


# ---- CD-T -------------------------------------------------------------------------------------------


def by_cdt(module: nn.Module, x: Tensor, factors: Tensor, both: bool) -> tuple[Tensor, Tensor]:
    relevant, whole = Decomposer(module, rules=TRANSFORMER_RULES).rows(x, factors, OF, both)
    return relevant, whole - relevant


@pytest.mark.parametrize("both", [False, True])
def test_cdt_gives_the_relevant_part_what_it_adds_to_the_other(both: bool) -> None:
    x, factors = pair(3, 4)
    for op, f in ((F.gelu, lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2), (torch.tanh, math.tanh)):
        relevant, irrelevant = by_cdt(net(lambda x, op=op: op(x)), x, factors, both)
        q = x[OF] * (1 - factors)
        torch.testing.assert_close(irrelevant, each(f, q), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(relevant, each(f, x[OF]) - each(f, q), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("both", [False, True])
def test_cdt_shares_the_bias_of_a_layer_norm_by_what_comes_in(both: bool) -> None:
    x, factors = pair(4, 6)
    module = net(nn.LayerNorm(6))
    weight, bias = module[1].weight, module[1].bias
    got = by_cdt(module, x, factors, both)
    for i, s in enumerate(OF.tolist()):
        r, q = x[s] * factors[i], x[s] * (1 - factors[i])
        for j in range(4):
            spread = math.sqrt(((x[s, j] - x[s, j].mean()) ** 2).mean() + 1e-5)
            for part, other, found in ((r[j], q[j], got[0]), (q[j], r[j], got[1])):
                own = part.abs() / (part.abs() + other.abs())
                wanted = (part - part.mean()) / spread * weight + bias * own
                torch.testing.assert_close(found[i, j], wanted, rtol=1e-10, atol=1e-12)


def test_a_form_without_a_rule_is_refused_with_its_module() -> None:
    with pytest.raises(UserError, match=r"no rule for erfinv yet.*\(at 1 \(Op\)\)"):
        rule(net(lambda x: torch.erfinv(x.tanh())), *pair(4), False)
