"""Insertion and deletion over words: parity with the released code, a slow re-derivation, every documented edge."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from contracts import metric_contract, seeded
from nets import golden
from sentences import (
    MASK,
    PAD,
    VOCABULARY,
    Sentence,
    bag_of_words,
    classifier,
    lstm,
    score_of,
    sentence,
    some_map,
    some_sentences,
    texts,
    word_order,
)
from torch import Tensor, nn

from attrib.metrics import InsertionDeletion
from attrib.metrics.insertion_deletion import EQUAL_STEPS
from attrib.metrics.words import REMOVALS
from attrib.models import Classifier
from attrib.models.text import DeepLSTM
from attrib.noise import Noise
from attrib.types import Batch, UserError


def score(metric: InsertionDeletion, batch: Batch, map: Tensor, model: Classifier | None = None) -> dict[str, Tensor]:
    return metric.score(model or classifier(lstm()), batch, map, Noise(batch.uids))


def golden_net() -> DeepLSTM:
    weights = golden("deeplstm")
    vocab_size, embedding_dim, hidden_dim, n_layers = weights["hyper"].tolist()
    net = DeepLSTM(vocab_size, embedding_dim, hidden_dim, n_layers=n_layers, pad_id=1)
    net.load_state_dict({k.removeprefix("sd."): torch.tensor(v) for k, v in weights.items() if k.startswith("sd.")})
    return net.eval()


@pytest.mark.parametrize("target", [0, 1])
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_released_code(step, target, dtype):
    data = golden("metric_nlp")
    batch = texts([sentence(*data[f"s{i}_tokens"].tolist()) for i in (0, 1)], torch.tensor([target, target]))
    map = torch.zeros(batch.x.shape)
    for i in (0, 1):
        map[i, : batch.lengths[i]] = torch.tensor(data[f"s{i}_heatmap"])
    model = Classifier(golden_net(), {"embedding": "embedding"}, dtype=dtype)
    found = score(InsertionDeletion(steps=None, step=step, fraction=0.4, as_released=True), batch, map, model)
    for i, counts in enumerate([(1, 2, 3, 4), (1, 2, 3)] if step == 1 else [(2, 4), (2, 3)]):
        for short, long in (("ins", "insertion"), ("del", "deletion")):
            key = f"s{i}_pb{step}_t{target}_{short}"
            assert abs(found[long][i].item() - data[f"{key}_auc"]) < 1e-5
            assert len(data[f"{key}_scores"]) == len(counts)
            stored = np.interp(np.arange(1, 101) / 100 * counts[-1], counts, data[f"{key}_scores"])
            np.testing.assert_allclose(found[f"{long}_curve"][i], stored, atol=1e-5)


def reference(
    metric: InsertionDeletion, net: nn.Module, text: Sentence, target: int, map: Tensor
) -> dict[str, tuple[list[float], list[float], float]]:
    """One sentence, one perturbed text at a time: fractions of the curve's width, scores, area."""
    words = word_order(text, map)
    limit = max(1, int(metric.fraction * len(words)))
    if metric.steps is None:
        counts = [*range(0, limit, metric.step), limit]
    else:
        counts = sorted({k * limit // metric.steps for k in range(metric.steps + 1)})
    if metric.as_released:
        counts = counts[1:]
    found = {}
    for name in ("insertion", "deletion"):
        scores = []
        for count in counts:
            missing = words[:count] if name == "deletion" else words[count:]
            scores.append(score_of(net, text, target, missing, metric.words, metric.output == "logit"))
        area = 0.0
        for k in range(1, len(counts)):
            width = 1 / len(counts) if metric.as_released else (counts[k] - counts[k - 1]) / limit
            area += width * (scores[k] + scores[k - 1]) / 2
        found[name] = ([count / limit for count in counts], scores, area)
    return found


@pytest.mark.parametrize("removal", REMOVALS)
@pytest.mark.parametrize("make", [bag_of_words, lstm])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"steps": 4, "output": "logit"},
        {"steps": 1},
        {"steps": None, "step": 2},
        {"steps": None, "step": 50, "fraction": 0.5},
        {"steps": 6, "fraction": 0.4},
        {"steps": None, "step": 1, "fraction": 0.4, "as_released": True},
        {"steps": 3, "as_released": True},
    ],
)
@pytest.mark.quick(every=3)
def test_equals_the_algorithm_one_word_at_a_time(fields, make, removal):
    metric, net = InsertionDeletion(words=removal, **fields), make()
    sentences = some_sentences(special=True)
    batch = texts(sentences)
    map = some_map(batch)
    found = score(metric, batch, map, classifier(net))
    steps = metric.steps or EQUAL_STEPS
    for i, text in enumerate(sentences):
        for name, (at, scores, area) in reference(metric, net, text, int(batch.target[i]), map[i]).items():
            assert abs(found[name][i].item() - area) < 1e-12, (name, i)
            stored = np.interp(np.arange(metric.as_released, steps + 1) / steps, at, scores)
            np.testing.assert_allclose(found[f"{name}_curve"][i], stored, atol=1e-12)
        assert found["insertion_deletion"][i] == found["insertion"][i] - found["deletion"][i]


@pytest.mark.parametrize("removal", REMOVALS)
@pytest.mark.parametrize("make", [bag_of_words, lstm])
@pytest.mark.quick(but=["lstm-zero"])
def test_contract(removal, make):
    sentences = [*some_sentences(special=True), *some_sentences(), sentence(special=True)]
    batch = texts(sentences)
    map = some_map(batch)
    map[3] = map[3].round()  # ties
    map[0] = batch.mask[0].double()  # more ties
    map[7] = 0.0
    map[5, 2] = torch.nan
    found = metric_contract(InsertionDeletion(words=removal), lambda rows: classifier(make(), rows), batch, map)
    for name, value in found.items():
        assert value[[5, 10]].isnan().all(), name  # a broken map, a text without words
        assert value[[0, 1, 2, 3, 4, 6, 7, 8, 9]].isfinite().all(), name
    assert found["insertion_curve"].shape == found["deletion_curve"].shape == (11, 101)


@pytest.mark.parametrize("fields", [{"steps": None, "step": 3}, {"as_released": True, "fraction": 0.4}])
def test_contract_of_other_conventions(fields):
    batch = texts(some_sentences())
    found = metric_contract(
        InsertionDeletion(**fields), lambda rows: classifier(bag_of_words(), rows), batch, some_map(batch)
    )
    assert found["insertion_curve"].shape == (5, 100 + (not fields.get("as_released", False)))


def test_true_importance_is_optimal_on_a_bag_of_words():
    """Without vectors of its tokens a word's contribution to a logit is known, and gone."""
    net = bag_of_words()
    batch = texts(some_sentences(special=True))
    token = (net.embedding.weight @ net.fc.weight.T).detach()  # (V, K)
    contribution = token[batch.x].gather(2, batch.target[:, None, None].expand(-1, batch.x.shape[1], 1)).squeeze(2)
    contribution = contribution.masked_fill(~batch.mask, 0.0)
    for removal in ("zero", "delete"):
        metric = InsertionDeletion(words=removal, output="logit")
        maps = (contribution, some_map(batch), -contribution)
        oracle, other, worst = (score(metric, batch, m, classifier(net)) for m in maps)
        for better, lesser in ((oracle, other), (other, worst)):
            several = [0, 2, 3]  # of one or two words there is little to order
            assert (better["insertion"] >= lesser["insertion"] - 1e-12).all()
            assert (better["insertion_deletion"] > lesser["insertion_deletion"])[several].all()
            assert (better["deletion"] < lesser["deletion"])[several].all()
        # The curves are partial sums: all words appear, or vanish, whatever the order.
        torch.testing.assert_close(oracle["insertion_curve"][:, -1], worst["deletion_curve"][:, 0])
        torch.testing.assert_close(oracle["insertion_curve"][:, 0], worst["deletion_curve"][:, -1])


def test_only_the_order_of_the_words_counts():
    batch = texts(some_sentences(special=True))
    map = some_map(batch)
    special = (batch.words < 0) & batch.mask
    ours, other = score(InsertionDeletion(), batch, map), score(InsertionDeletion(), batch, (map * 3) + 100.0 * special)
    for name in ours:
        torch.testing.assert_close(ours[name], other[name], rtol=0, atol=0)


def test_a_score_of_1_throughout_has_area_1_whatever_the_fraction():
    net = seeded(DeepLSTM(VOCABULARY, 4, 3, pad_id=PAD, mask_id=MASK))
    net.fc.weight.zero_()
    net.fc.bias.fill_(1000.0)
    batch = texts(some_sentences(), torch.ones(5).long())
    for fraction in (0.1, 0.4, 1.0):
        found = score(InsertionDeletion(fraction=fraction), batch, some_map(batch), classifier(net))
        for name in ("insertion", "deletion"):
            np.testing.assert_allclose(found[name], 1.0, atol=1e-12)


def test_a_text_of_one_word():
    """Deletion: the text, then nothing; insertion the same backwards."""
    net, text = bag_of_words(), sentence([7, 9], special=True)
    found = score(InsertionDeletion(words="mask"), texts([text]), torch.ones(1, 4), classifier(net))
    whole, empty = (score_of(net, text, 0, missing, "mask") for missing in ([], [0]))
    assert found["deletion"].item() == pytest.approx((whole + empty) / 2)
    assert found["insertion"].item() == pytest.approx((whole + empty) / 2)
    np.testing.assert_allclose(found["deletion_curve"][0], np.linspace(whole, empty, 101), atol=1e-12)
    released = score(InsertionDeletion(as_released=True), texts([text]), torch.ones(1, 4), classifier(net))
    assert released["deletion"].item() == released["insertion"].item() == 0.0  # a single point


def test_several_labels():
    net = bag_of_words(classes=3)
    batch = texts(some_sentences(), torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 1], [0, 0, 0]]))
    found = score(InsertionDeletion(words="delete"), batch, some_map(batch), classifier(net))
    logits = net(batch.x).detach()
    whole = [logits[0, [0, 2]].sigmoid().mean(), logits[1, 1].sigmoid(), logits[2].sigmoid().mean()]
    for i, value in enumerate(whole):
        assert found["deletion_curve"][i, 0].item() == pytest.approx(value.item())
    assert found["deletion"][:4].isfinite().all()
    assert found["deletion"][4].isnan()  # no label


def test_points():
    assert InsertionDeletion().replaced(3) == [k * 3 // 100 for k in range(101)]
    assert InsertionDeletion(steps=None, step=2, fraction=0.4).replaced(12) == [0, 2, 4]
    assert InsertionDeletion(steps=None, step=2, fraction=0.4, as_released=True).replaced(8) == [2, 3]
    assert InsertionDeletion(steps=None, step=2, fraction=0.4).replaced(1) == [0, 1]  # at least one word
    assert InsertionDeletion(steps=1, fraction=0.29).replaced(100) == [0, 29]
    assert InsertionDeletion(steps=4, as_released=True).replaced(2) == [1, 1, 1, 2]
    several = InsertionDeletion(steps=None, step=2).counts(torch.tensor([1, 5, 4]))
    assert several.tolist() == [[0, 1, 1, 1], [0, 2, 4, 5], [0, 2, 4, 4]]


def test_what_it_reads_and_judges():
    assert InsertionDeletion().roles == ("embedding",)
    assert InsertionDeletion(words="mask").roles == InsertionDeletion(words="delete").roles == ()
    assert InsertionDeletion.MODALITIES == ("image", "text", "audio")


def test_errors():
    for wrong in ({"fraction": 0.0}, {"fraction": 1.01}, {"fraction": float("nan")}, {"words": "blur"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            InsertionDeletion(**wrong)
    batch = texts(some_sentences())
    with pytest.raises(ValueError, match="does not fit texts"):
        score(InsertionDeletion(), batch, some_map(batch)[:, :-1])
    with pytest.raises(ValueError, match="expected \\(B, H, W\\)"):
        score(InsertionDeletion(), replace(batch, words=None), some_map(batch))


def test_images_stop_at_the_fraction_too():
    """A net that counts what is left: the score of deletion is the share of pixels, over the width of the curve."""

    class Share(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).mean(1, keepdim=True)

    batch = Batch(("a", "b"), torch.ones(2, 1, 10, 10), torch.zeros(2).long())
    map = torch.arange(200.0).view(2, 10, 10)
    metric = InsertionDeletion(steps=5, fraction=0.4, insertion_baseline="zero", output="logit")
    found = score(metric, batch, map, Classifier(Share(), dtype=torch.float64))
    np.testing.assert_allclose(found["deletion_curve"][0], [1.0, 0.92, 0.84, 0.76, 0.68, 0.6], atol=1e-12)
    np.testing.assert_allclose(found["insertion_curve"][0], [0.0, 0.08, 0.16, 0.24, 0.32, 0.4], atol=1e-12)
    np.testing.assert_allclose([found["deletion"], found["insertion"]], [[0.8, 0.8], [0.2, 0.2]], atol=1e-12)


@pytest.mark.parametrize("removal", REMOVALS)
def test_a_transformer(removal):
    """A net that cannot be cut by graph, and whose special tokens stay."""
    transformers = pytest.importorskip("transformers")
    from attrib.models.huggingface import HuggingFaceClassifier

    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=64, pad_token_id=PAD,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        net = HuggingFaceClassifier(seeded(transformers.BertForSequenceClassification(config)), PAD, MASK)
    path = net.default_layers["embedding"]
    sentences = some_sentences(special=True)
    batch = texts(sentences)
    found = metric_contract(
        InsertionDeletion(words=removal),
        lambda rows: classifier(net, rows, embedding=path),
        batch,
        some_map(batch),
    )
    if removal != "zero":
        for i, text in enumerate(sentences):
            every = sorted({word for _, word in text if word >= 0})
            x = [t if w < 0 else MASK for t, w in text if w < 0 or removal == "mask"]
            empty = net(torch.tensor([x]))[0].softmax(0)[batch.target[i]].item()
            assert found["deletion_curve"][i, -1].item() == pytest.approx(empty)
            assert len(every) == int(batch.words[i].max()) + 1
