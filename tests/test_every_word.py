"""Text nets that read their words by more than one layer: found out, and no other net is taken for one."""

from __future__ import annotations

import pytest
import torch
from tiny_huggingface import TOWER, WORDS, random_weights, tokenizer
from torch import Tensor, nn

import attrib
from attrib.metrics import Eraser
from attrib.models import Classifier, HuggingFaceClassifier
from attrib.models.every_word import check_every_word
from attrib.types import Batch, UserError

transformers = pytest.importorskip("transformers")
ENDS = dict(pad_token_id=0, bos_token_id=17, eos_token_id=16, decoder_start_token_id=16)
TEXTS = ["the film was good", "a bad photo of the cat"]


class Net(nn.Module):
    pad_id, mask_id = 0, 1

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.other = nn.Embedding(24, 6), nn.Embedding(24, 6)
        self.head = nn.Linear(6, 3)
        random_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        real = (x != 0).unsqueeze(2)
        places = torch.arange(x.shape[1], device=x.device).cos().view(1, -1, 1)
        return self.head((torch.tanh(self.vectors(x) * places) * real).sum(1))

    def vectors(self, x: Tensor) -> Tensor:
        """(N, T) -> (N, T, 6)."""
        raise NotImplementedError


class TwoTables(Net):
    def vectors(self, x: Tensor) -> Tensor:
        return self.embedding(x) + 0.1 * self.other(x)


class OneHot(Net):
    def vectors(self, x: Tensor) -> Tensor:
        return self.embedding(x) + nn.functional.one_hot(x, 24)[..., 4:10]


class Positions(Net):
    """Those of RoBERTa, which count what is no padding."""

    def vectors(self, x: Tensor) -> Tensor:
        return self.embedding(x) + self.other((x != 0).long().cumsum(1))


class Segments(Net):
    """The second one begins behind the token 3."""

    def vectors(self, x: Tensor) -> Tensor:
        return self.embedding(x) + self.other((x == 3).long().cumsum(1))


class Weighted(Net):
    """By how rare a word is."""

    def vectors(self, x: Tensor) -> Tensor:
        return self.embedding(x) * self.other(x)[..., :1].exp()


class Untraceable(TwoTables):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else super().forward(x) + 1


class TwoBags(Net):
    """It does not heed the order of the words."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.EmbeddingBag(24, 6, mode="sum")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x)).sum(1) + self.other(x))


IDS = [torch.tensor([5, 6, 6, 9, 8]), torch.tensor([4, 7])]
HERE = {"embedding": "embedding"}


@pytest.mark.parametrize(
    ("kind", "way"), [(TwoTables, "other"), (OneHot, "no nn.Embedding"), (Untraceable, "other"), (TwoBags, "other")]
)
def test_a_second_way_of_the_words_is_refused(kind, way):
    message = rf"model\.layers\.embedding: {kind.__name__} reads the words not by embedding alone but also .*{way}"
    with pytest.raises(UserError, match=message):
        attrib.explain(kind(), IDS, method="integrated_gradients", target=1, layers=HERE)
    explanation = attrib.explain(kind(), IDS, method="random", target=1, layers=HERE)  # which reads no layer
    with pytest.raises(UserError, match=message):
        explanation.evaluate(Eraser(words="zero"))
    assert (explanation.evaluate(Eraser(words="delete"))["state"] == "ok").all()


class AtTheEnd(Net):
    """Reads the place of the token that ends a text, as CLIP does."""

    def forward(self, x: Tensor) -> Tensor:
        z = (self.vectors(x) * (x != 0).unsqueeze(2)).cumsum(1)
        return self.head(z[torch.arange(len(x), device=x.device), (x == 2).int().argmax(1)])

    def vectors(self, x: Tensor) -> Tensor:
        return self.embedding(x) + torch.arange(x.shape[1], device=x.device).view(1, -1, 1)


class TwoMarkers(AtTheEnd):
    """And the token 3 between two texts, from which it counts the second one's places."""

    def vectors(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return super().vectors(x) * (places - (x == 3).int().argmax(1, keepdim=True)).cos().unsqueeze(2)


@pytest.mark.parametrize("kind", [Positions, Segments, Weighted, AtTheEnd, TwoMarkers])
def test_tables_of_other_things_are_none(kind):
    ids = [torch.tensor([4, 5, 3, 6, 9, 8, 2]), torch.tensor([4, 7, 9, 2])]
    found = attrib.explain(kind(), ids, method="integrated_gradients", target=1, layers=HERE)
    assert (found.evaluate(Eraser(words="zero"))["state"] == "ok").all()


def test_a_text_of_equal_words_says_nothing_and_the_next_one_does():
    attrib.explain(TwoTables(), [torch.tensor([5, 5, 5])], method="gradient", target=1, layers=HERE)
    with pytest.raises(UserError, match="not by embedding alone"):
        attrib.explain(TwoTables(), [torch.tensor([5, 5, 5]), IDS[1]], method="gradient", target=1, layers=HERE)


class Ended(Net):
    """Knows the end of a text by what pads, which is a word as well."""

    def vectors(self, x: Tensor) -> Tensor:
        return self.embedding(x) + (x != 0).sum(1).view(-1, 1, 1) + (x[:, -1:] == 0).unsqueeze(2)


def test_a_word_that_is_also_the_padding_stays_where_it_is():
    batch = Batch(
        ("a",), torch.tensor([[0, 5, 6, 7]]), torch.tensor([1]), None, torch.tensor([4]), torch.arange(4)[None]
    )
    assert check_every_word(Classifier(Ended(), HERE), "embedding", batch)


class Particular(TwoTables):
    """Takes texts that end with a 7 alone."""

    def forward(self, x: Tensor) -> Tensor:
        if (x[:, -1] != 7).any():
            raise ValueError("a text ends with 7")
        return super().forward(x)


def test_a_text_that_the_net_does_not_take_with_other_words_says_nothing():
    batch = Batch(("a",), torch.tensor([[5, 6, 7]]), torch.tensor([1]), None, torch.tensor([3]), torch.arange(3)[None])
    model = Classifier(Particular(), HERE)
    assert not check_every_word(model, "embedding", batch)
    assert model.passed == 0


def bart() -> nn.Module:
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)
    layers = dict(encoder_layers=1, decoder_layers=1, d_model=16)
    config = transformers.BartConfig(
        vocab_size=len(WORDS), max_position_embeddings=20, num_labels=3, **layers, **heads, **ENDS
    )
    return random_weights(transformers.BartForSequenceClassification(config)).eval()


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, num_labels=3, **ENDS
    )
    return random_weights(transformers.T5ForSequenceClassification(config)).eval()


def ending() -> object:
    from tokenizers.processors import TemplateProcessing

    made, end = tokenizer(), WORDS[16]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 16)])
    made.model_max_length = 12
    return made


@pytest.mark.parametrize("build", [bart, t5])
def test_a_decoder_that_reads_the_words_itself(build):
    """Texts of unequal length, of which the longer one has no end where it is cut."""
    message = r"not by net\.\w+\.encoder\.embed_tokens alone but also by net\.\w+\.decoder\.embed_tokens: "
    with pytest.raises(UserError, match=message):
        attrib.explain(build(), TEXTS, method="integrated_gradients", target=1, tokenizer=ending())
    found = attrib.explain(build(), TEXTS, method="random", target=1, tokenizer=ending())
    assert (found.evaluate(Eraser())["state"] == "ok").all()


def test_a_table_that_only_lends_its_weights_is_named():
    model = Classifier(HuggingFaceClassifier(bart(), 0, 2), {"embedding": "net.model.shared"})
    with pytest.raises(UserError, match=r"never runs, and lends its weights to net\.model\.encoder\.embed_tokens and "):
        model.until("embedding", torch.tensor([[3, 4, 5, 16]]))


def test_bert_has_one():
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=12, num_labels=3, **TOWER)
    net = random_weights(transformers.BertForSequenceClassification(config)).eval()
    made = tokenizer()
    made.model_max_length = 12
    attrib.explain(net, TEXTS, method="integrated_gradients", target=1, tokenizer=made)


def test_characters_that_are_hashed_have_no_table_of_words():
    config = transformers.CanineConfig(**TOWER, num_hash_buckets=16, max_position_embeddings=40, num_labels=3)
    net = HuggingFaceClassifier(random_weights(transformers.CanineForSequenceClassification(config)).eval(), 0, 2)
    with pytest.raises(UserError, match=r"no layer for the role 'embedding'.*HashBucketCodepointEmbedder_0"):
        Classifier(net, net.default_layers).roles.path("embedding")


def test_the_net_is_not_examined_on_what_it_is_told_instead():
    model, words = Classifier(Positions(), HERE), torch.arange(4)[None]
    batch = Batch(("a",), torch.tensor([[4, 5, 6, 7]]), torch.tensor([1]), None, torch.tensor([4]), words)
    assert check_every_word(model, "embedding", batch)
    assert model.exam is None


class Placed(Net):
    """Reads vectors by the places of their words."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.vectors(x)
        return self.head((torch.tanh(z) * torch.arange(1, z.shape[1] + 1).cos().view(1, -1, 1)).sum(1))


class Reversed(Placed):
    """As an LSTM that reads backwards may have it."""

    def vectors(self, x: Tensor) -> Tensor:
        return self.embedding(x.flip(1))


class Shifted(Placed):
    """As a decoder has it: the token that begins a text stands in front of its words."""

    def vectors(self, x: Tensor) -> Tensor:
        return self.embedding(torch.cat((torch.full_like(x[:, :1], 2), x[:, :-1]), 1))


class TokensFirst(Placed):
    """As recurrent layers of torch want it, whose texts come second."""

    def vectors(self, x: Tensor) -> Tensor:
        return self.embedding(x.t()).transpose(0, 1)


class WithoutTheFirst(Placed):
    def vectors(self, x: Tensor) -> Tensor:
        return self.embedding(x[:, 1:])


SQUARE = torch.tensor([[5, 3, 9], [7, 4, 8], [11, 5, 6]])  # as many texts as tokens


@pytest.mark.parametrize("method", ["occlusion", "lrp_epsilon", "cd", "iba"])
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Reversed, "Reversed gives embedding the words in another order: .* place 0 .* place 2, not its own"),
        (Shifted, "Shifted gives embedding the words in another order: .* place 0 .* place 1, not its own"),
        (TokensFirst, r"gives \(3, 1, 6\) for tokens \(1, 3\); the tokens come first there"),
        (WithoutTheFirst, r"gives \(1, 2, 6\) for tokens \(1, 3\); it must be the layer that gives one vector per"),
    ],
)
def test_a_table_that_has_the_words_elsewhere_is_refused(kind, why, method):
    layers = {"bottleneck": "embedding"} if method == "iba" else HERE
    fit = SQUARE if method == "iba" else None
    if method == "iba" and kind in (TokensFirst, WithoutTheFirst):  # it is refused while it is fitted
        why = "not one row per sample|has no place for each of the 3 tokens"
    with pytest.raises(UserError, match=why):
        attrib.explain(kind(), SQUARE, 1, method, fit=fit, layers=layers)
    if method == "occlusion":
        maps = torch.rand(3, 3)
        with pytest.raises(UserError, match=why):
            attrib.evaluate(kind(), SQUARE, maps, Eraser(words="zero"), target=1, layers=HERE)


class Coded(Net):
    """Its one table is not the only way of its words."""

    def __init__(self) -> None:
        super().__init__()
        del self.other
        self.register_buffer("codes", torch.arange(24.0)[:, None].mul(torch.arange(1, 7)).cos())

    def vectors(self, x: Tensor) -> Tensor:
        return self.embedding(x) + self.codes[x]


@pytest.mark.parametrize("layers", [None, HERE])
def test_a_metric_that_finds_the_table_itself_heeds_the_other_way(layers):
    with pytest.raises(UserError, match="Coded reads the words not by embedding alone"):
        attrib.evaluate(Coded(), IDS, torch.rand(2, 5), Eraser(words="zero"), target=1, layers=layers)


class FewerWords(Net):
    """Rare words are all one."""

    def vectors(self, x: Tensor) -> Tensor:
        return self.embedding(x.clamp(max=5))


def test_words_that_are_alike_to_the_table_are_no_others():
    found = attrib.explain(FewerWords(), [torch.tensor([7, 6, 9, 3, 8])], 1, "occlusion", layers=HERE)
    assert found.map.abs().min() > 0
