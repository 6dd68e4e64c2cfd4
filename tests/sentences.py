"""Small texts with known words, nets that read them, and one sentence at a time without some of its words."""

from __future__ import annotations

import numpy as np
import torch
from contracts import seeded
from torch import Tensor, nn

from attrib.models import Classifier
from attrib.models.text import DeepLSTM
from attrib.types import Batch

MASK, PAD, CLS, SEP, VOCABULARY = 0, 1, 2, 3, 40

Sentence = list[tuple[int, int]]  # (token id, number of its word or -1)


def sentence(*words: int | list[int], special: bool = False) -> Sentence:
    """Words, given by their one token or by their pieces; with [CLS] and [SEP] around them."""
    pieces = [(word, [tokens] if isinstance(tokens, int) else tokens) for word, tokens in enumerate(words)]
    inner = [(token, word) for word, tokens in pieces for token in tokens]
    return [(CLS, -1), *inner, (SEP, -1)] if special else inner


def some_sentences(special: bool = False) -> list[Sentence]:
    """Lengths from one word to 14, words of one to three pieces."""
    r = np.random.RandomState(4)
    made = []
    for n in (9, 1, 14, 5, 2):
        words = [[int(t) for t in r.randint(4, VOCABULARY, r.randint(1, 4))] for _ in range(n)]
        made.append(sentence(*words, special=special))
    return made


def texts(sentences: list[Sentence], target: Tensor | None = None) -> Batch:
    width = max(len(s) for s in sentences)
    x, words = torch.full((len(sentences), width), PAD), torch.full((len(sentences), width), -1)
    for i, s in enumerate(sentences):
        x[i, : len(s)] = torch.tensor([token for token, _ in s])
        words[i, : len(s)] = torch.tensor([word for _, word in s])
    lengths = torch.tensor([len(s) for s in sentences])
    target = torch.arange(len(sentences)) % 2 if target is None else target
    return Batch(tuple(f"t{i}" for i in range(len(sentences))), x, target, lengths=lengths, words=words)


def some_map(batch: Batch, seed: int = 0) -> Tensor:
    """A signed map without ties, zero on padding."""
    values = torch.tensor(np.random.RandomState(seed).randn(len(batch), 50)[:, : batch.x.shape[1]])
    return values.masked_fill(~batch.mask, 0.0)


class BagOfWords(nn.Module):
    """Every token adds its vector, and the classes are linear in their sum: the truth about it is known."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.pad_id, self.mask_id = PAD, MASK
        self.embedding, self.fc = nn.Embedding(VOCABULARY, 6), nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        real = (x != self.pad_id)[:, :, None]
        return self.fc((self.embedding(x) * real).sum(1))


def bag_of_words(classes: int = 2) -> BagOfWords:
    return seeded(BagOfWords(classes))


def lstm() -> DeepLSTM:
    """Reads the words in their order."""
    return seeded(DeepLSTM(VOCABULARY, 8, 6, pad_id=PAD, mask_id=MASK), scale=2.0)


def classifier(net: nn.Module, rows: int = 64, embedding: str = "embedding") -> Classifier:
    return Classifier(net, {"embedding": embedding}, rows=rows, dtype=torch.float64)


def word_order(text: Sentence, map: Tensor) -> list[int]:
    """The words, that of the largest sum first."""
    values: dict[int, float] = {}
    for (_, word), value in zip(text, map.tolist(), strict=False):
        if word >= 0:
            values[word] = values.get(word, 0.0) + value
    return sorted(values, key=lambda word: -values[word])


@torch.no_grad()
def score_of(
    net: nn.Module, text: Sentence, target: int, missing: list[int], removal: str, logit: bool = False
) -> float:
    """One sentence through the net, written out again without its missing words."""
    zeros: list[int] = []
    ids: list[int] = []
    for token, word in text:
        gone = word in missing
        if gone and removal == "delete":
            continue
        if gone and removal == "zero":
            zeros.append(len(ids))
        ids.append(MASK if gone and removal == "mask" else token)

    def blank(_module: nn.Module, _inputs: object, z: Tensor) -> Tensor:
        z = z.clone()
        for position in zeros:
            z[0, position] = 0.0
        return z

    handle = net.get_submodule("embedding").register_forward_hook(blank)
    logits = net(torch.tensor([ids or [PAD]]))[0]
    handle.remove()
    return (logits if logit else logits.softmax(0))[target].item()
