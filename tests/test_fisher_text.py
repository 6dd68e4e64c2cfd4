"""Functional information of texts: at the embedding, over real tokens only."""

from __future__ import annotations

import dataclasses

import nets
import numpy as np
import pytest
import torch
from contracts import fit_contract, method_contract, seeded
from text_nets import text_classifier, text_net, texts
from torch import Tensor

from attrib.methods.fisher import ABOUT, FunctionalInformation
from attrib.methods.parts.covariance import Covariance
from attrib.models import Classifier, HuggingFaceClassifier
from attrib.models.text import DeepLSTM
from attrib.noise import Noise
from attrib.types import Batch
from attrib.units import Partition


def bert(**sizes: int) -> HuggingFaceClassifier:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3, max_position_embeddings=16,
        hidden_size=16, pad_token_id=0, **sizes,
    )  # fmt: skip
    with torch.random.fork_rng():
        return HuggingFaceClassifier(transformers.BertForSequenceClassification(config), pad_id=0, mask_id=1)


def slow(method, score, x: Tensor, words: Tensor, sigma: Tensor, noise: Noise) -> dict[str, Tensor]:
    """One text (T, E) without padding, one draw at a time; ``score(x)`` gives the probability of the target.

    sigma  (E, E), or (T, E, E): of each place
    """
    root, found, g = torch.linalg.cholesky(sigma), dict.fromkeys(ABOUT, 0.0), []
    for _ in range(method.samples):
        eps = noise.normal(*x.shape, ragged=0)[0]
        z = (x + method.var_spread**0.5 * (root @ eps[..., None])[..., 0]).requires_grad_()
        f = score(z)
        (grad,) = torch.autograd.grad(f, z)
        g.append(grad)
        f, moved = f.detach(), (sigma @ grad[..., None])[..., 0]
        local, sets = (moved * grad).sum(1) / f, torch.zeros(len(x), dtype=x.dtype)
        for word in range(int(words.max()) + 1):
            sets[words == word] = local[words == word].mean()
        for name, value in {
            "functional_information": grad.square().sum(1) / f,
            "covariance_functional_information": local,
            "set_information": sets,
            "covariance_gradients": moved.sum(1),
            "smooth_grad": grad.sum(1),
            "smooth_grad_sq": grad.square().sum(1),
        }.items():
            found[name] = found[name] + value / method.samples
    return found | {"var_grad": torch.stack(g).var(0).sum(1)}


def spd(n: int) -> Tensor:
    a = torch.tensor(np.random.RandomState(0).randn(n, n + 2))
    return a @ a.T / n


def check_slowly(model: Classifier, batch: Batch, size: int, kind: str = "matrix") -> None:
    covariance, sigma, places = Covariance(kind, jitter=0.0), spd(size), batch.x.shape[1]
    given = sigma
    if kind == "stack":
        given = sigma = torch.stack([sigma * (t + 1) for t in range(places)])
    elif kind == "places":
        given = torch.arange(1, places + 1).double()
        sigma = given[:, None, None] * torch.eye(size).double()
    method = FunctionalInformation(tuple(ABOUT), 4, 0.3, covariance)
    found = method.attribute(model, batch, covariance.given(given), Noise(batch.uids, 3, dtype=torch.float64))
    for i, (uid, length) in enumerate(zip(batch.uids, batch.lengths.tolist())):
        front = model.until("embedding", batch.x[i : i + 1, :length])
        net, rest, target = model.rear("embedding"), front.rest, batch.target[i]

        def score(z: Tensor, net=net, rest=rest, target=target) -> Tensor:
            return net(z[None], *rest).softmax(1)[0, target]

        own = sigma if sigma.ndim == 2 else sigma[:length]
        expected = slow(method, score, front.z[0], batch.words[i, :length], own, Noise([uid], 3, dtype=torch.float64))
        for name, value in expected.items():
            torch.testing.assert_close(found[name][i, :length], value, rtol=1e-6, atol=1e-12)
            assert (found[name][i, length:] == 0).all()
            assert (found[f"stderr_{name}"][i, length:] == 0).all()


@pytest.mark.parametrize("net", ["lstm", "around", "untraceable"])
def test_the_slow_reference(net):
    check_slowly(text_classifier(net)(7, torch.float64), texts(4), 6)


@pytest.mark.parametrize("kind", ["stack", "places"])
def test_the_slow_reference_with_a_covariance_of_each_place(kind):
    check_slowly(text_classifier("lstm")(7, torch.float64), texts(4), 6, kind)


def test_the_slow_reference_on_a_transformer():
    model = Classifier(seeded(bert(vocab_size=12)), {"embedding": "net.bert.embeddings.word_embeddings"}, rows=7)
    model = Classifier(model.module, model.roles.named, rows=7, dtype=torch.float64)
    batch = texts(4)
    batch = Batch(batch.uids, batch.x.where(batch.mask, 0), batch.target % 3, lengths=batch.lengths, words=batch.words)
    check_slowly(model, batch, 16)


def full_length(batch: Batch) -> dict[str, Tensor]:
    """The same texts with 20 tokens each."""
    x = torch.tensor(np.random.RandomState(5).randint(2, 12, (len(batch), 20)))
    return {"x": x, "lengths": torch.full((len(batch),), 20), "words": torch.arange(20).expand(len(batch), -1)}


MEASURES = ("functional_information", "covariance_functional_information", "set_information", "var_grad")


@pytest.mark.parametrize("net", ["lstm", "around", "untraceable"])
@pytest.mark.parametrize(
    "fields",
    [
        {"covariance": Covariance("low_rank", rank=2), "labels": "all"},
        {"covariance": Covariance("channels"), "tolerance": 0.3, "samples": 14},
        {"covariance": Covariance("sample_channels"), "labels": 2, "levels": 2},
        {"covariance": Covariance("stack")},
        {"covariance": Covariance("matrix", per_class=True, shrinkage=0.2), "reduce": "abs_sum"},
    ],
    ids=lambda fields: fields["covariance"].kind,
)
@pytest.mark.quick("channels-*", "low_rank-around", "sample_channels-untraceable", "stack-around", "matrix-untraceable")
def test_the_contract(net, fields):
    method = FunctionalInformation(**({"measures": (*MEASURES, "smooth_grad"), "samples": 3} | fields))
    known = texts(24, seed=1)
    if method.covariance.kind == "stack":  # places as far as the longest text that the contract makes
        known = dataclasses.replace(known, **full_length(known))
    state = fit_contract(method.fit, text_classifier(net), known) if method.fit else {}
    method_contract(method, text_classifier(net), texts(4), state)


def test_the_contract_on_a_transformer():
    def build_model(rows: int, dtype: torch.dtype) -> Classifier:
        return Classifier(net, {"embedding": "net.bert.embeddings.word_embeddings"}, rows=rows, dtype=dtype)

    net, batch = seeded(bert(vocab_size=12)), texts(4)
    batch = Batch(batch.uids, batch.x.where(batch.mask, 0), batch.target % 3, lengths=batch.lengths, words=batch.words)
    method_contract(FunctionalInformation(MEASURES, 3, labels=2), build_model, batch, {})


def test_several_labels_of_an_lstm_are_those_of_each():
    """Whether torch vectorises its backward pass or not."""
    model, batch = text_classifier("lstm")(64, torch.float64), texts(4)
    every = FunctionalInformation(MEASURES, 3, labels=(0, 1, 2, 3, 4))
    found = every.attribute(model, batch, {}, Noise(batch.uids, dtype=torch.float64))
    for label in range(5):
        asked = Batch(batch.uids, batch.x, torch.full((4,), label), lengths=batch.lengths, words=batch.words)
        one = FunctionalInformation(MEASURES, 3).attribute(model, asked, {}, Noise(batch.uids, dtype=torch.float64))
        for name in MEASURES:
            torch.testing.assert_close(found[f"{name}_by_label"][..., label], one[name])


def test_pairs_of_words():
    batch, model = texts(4), text_classifier("lstm")(64, torch.float64)

    def explain(levels: int) -> Tensor:
        method = FunctionalInformation(("set_information",), 3, units=Partition("words"), levels=levels)
        return method.attribute(model, batch, {}, Noise(batch.uids, dtype=torch.float64))["set_information"]

    one, two = explain(1), explain(2) - explain(1)
    for row, pairs, words in zip(one, two, batch.words):
        for pair in range(int(words.max()) // 2 + 1):
            inside = (words >= 0) & (words // 2 == pair)
            torch.testing.assert_close(pairs[inside], row[inside].mean().expand(int(inside.sum())))
        assert (row[words < 0] == 0).all()  # special tokens are no words


# ---- the released code ----------------------------------------------------------------------------------


def test_the_released_map_of_bert_is_rounding():
    """Their code sums a token's gradient before squaring. BERT's LayerNorm makes that sum zero.

    So their stored map is of the order 1e-15, and cannot be compared number by number: what can be is that
    the same happens here when asked for, and that the sum of squares, with the same noise, is that of a
    direct computation on the transformer itself.
    """
    golden = nets.golden("fisher_bert")
    net = bert(vocab_size=50)
    weights = {k[3:]: torch.tensor(v) for k, v in golden.items() if k.startswith("sd.")}
    assert not net.net.load_state_dict(weights, strict=False).unexpected_keys
    net.double().eval()
    x, mask, label = torch.tensor(golden["x"]).double(), torch.tensor(golden["attention_mask"]), int(golden["label"])
    net.net.get_input_embeddings().weight.data[10:16] = x
    model = Classifier(net, {"embedding": "net.bert.embeddings.word_embeddings"}, dtype=torch.float64)
    length = int(mask.sum())
    ids = torch.where(mask == 1, torch.arange(10, 16), 0)
    batch = Batch(
        ("a",), ids, torch.tensor([label]), lengths=torch.tensor([length]), words=torch.where(mask == 1, 0, -1)
    )

    class Stored:
        def __init__(self) -> None:
            self.draws = iter(torch.tensor(golden["noise"]).double())

        def normal(self, *shape: int, ragged: int | None = None) -> Tensor:
            return next(self.draws)[None]

    covariance = Covariance("scalar", jitter=0.0)
    state = covariance.given(x.var())  # as theirs, over the masked token too

    def explain(**fields) -> Tensor:
        method = FunctionalInformation(samples=4, covariance=covariance, **fields)
        return method.attribute(model, batch, state, Stored())["functional_information"][0]

    expected = torch.zeros(6).double()
    for eps in torch.tensor(golden["noise"]).double():
        z = (x + (0.15 * x.var()).sqrt() * eps)[None].requires_grad_()
        f = net.net(inputs_embeds=z, attention_mask=mask).logits.softmax(1)[0, label]
        (grad,) = torch.autograd.grad(f, z)
        expected += (grad[0].square().sum(1) / f).detach() / 4
    found = explain()
    torch.testing.assert_close(found[:length], expected[:length], rtol=1e-9, atol=0)
    assert found[length] == 0
    assert golden["functional_information"].max() < 1e-9 * found.max()
    assert explain(as_released=True).max() < 1e-9 * found.max()


def test_a_text_of_one_token_and_a_text_net_of_the_package():
    net = seeded(DeepLSTM(12, embedding_dim=6, hidden_dim=5, num_classes=2, pad_id=1, mask_id=0), 2.0)
    model = Classifier(net, {"embedding": "embedding"}, dtype=torch.float64)
    x = torch.tensor([[4, 1, 1], [5, 6, 7]])
    words = torch.tensor([[0, -1, -1], [0, 1, 2]])
    batch = Batch(("a", "b"), x, torch.tensor([0, 1]), lengths=torch.tensor([1, 3]), words=words)
    found = FunctionalInformation(MEASURES, 3).attribute(model, batch, {}, Noise(batch.uids, dtype=torch.float64))
    assert all(value.isfinite().all() for value in found.values())
    assert all(found[name][0, 0] > 0 for name in MEASURES)


def test_the_net_is_not_asked_more_often_than_needed():
    """One pass per draw, whatever the measures."""
    net, batch = text_net("lstm"), texts(4)
    for measures in (MEASURES[:1], tuple(ABOUT)):
        model = Classifier(net, {"embedding": "embedding"}, dtype=torch.float64)
        before = model.passed
        FunctionalInformation(measures, 5).attribute(model, batch, {}, Noise(batch.uids, dtype=torch.float64))
        assert model.passed - before == 4 + 4 * 5  # the embedding, and five draws
