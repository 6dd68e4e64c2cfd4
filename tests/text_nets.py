"""Small text nets for the tests of methods, and a batch of texts of different lengths."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from contracts import seeded
from torch import Tensor, nn

from attrib.models import Classifier
from attrib.models.text import DeepLSTM, real_tokens
from attrib.types import Batch

WORDS, K = 12, 5
PAD, UNKNOWN = 1, 0


class MeanEmbedding(nn.Module):
    """The mean of the embedded and squashed tokens, and an MLP: (N, T) -> (N, K)."""

    pad_id, mask_id = PAD, UNKNOWN

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(WORDS, 6), nn.Linear(6, 8), nn.Linear(8, K)

    def forward(self, x: Tensor) -> Tensor:
        real = real_tokens(x, self.pad_id).unsqueeze(-1)
        mean = (torch.tanh(self.embedding(x)) * real).sum(1) / real.sum(1)
        return self.head(torch.tanh(self.hidden(mean)))


class Around(MeanEmbedding):
    """A second table goes around the embedding, so that the rear needs much of each sample's own."""

    def __init__(self) -> None:
        super().__init__()
        self.around = nn.Embedding(WORDS, 6)

    def forward(self, x: Tensor) -> Tensor:
        real, around = real_tokens(x, self.pad_id).unsqueeze(-1), self.around(x)
        mean = (torch.tanh(self.embedding(x) * around) * real).sum(1) / real.sum(1)
        return self.head(torch.tanh(self.hidden(mean)) * around[:, 0].sum(1, keepdim=True))


class PerToken(MeanEmbedding):
    """A hidden layer that reads a vector of each token."""

    def forward(self, x: Tensor) -> Tensor:
        real = real_tokens(x, self.pad_id).unsqueeze(-1)
        return self.head((torch.tanh(self.hidden(self.embedding(x))) * real).sum(1) / real.sum(1))


class Untraceable(MeanEmbedding):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() >= 0 else super().forward(x) * 2


def lstm() -> DeepLSTM:
    return DeepLSTM(WORDS, embedding_dim=6, hidden_dim=5, num_classes=K, pad_id=PAD, mask_id=UNKNOWN)


NETS = {"lstm": lstm, "mean": MeanEmbedding, "around": Around, "per_token": PerToken, "untraceable": Untraceable}
BOTTLENECK = {"lstm": "rnn_2", "per_token": "hidden"}


def text_net(name: str) -> nn.Module:
    return seeded(NETS[name](), 2.0 if name == "lstm" else 0.9)  # four LSTMs forget small differences


def text_classifier(name: str) -> Callable[[int, torch.dtype], Classifier]:
    roles = {"embedding": "embedding", "bottleneck": BOTTLENECK.get(name, "embedding")}
    return lambda rows, dtype: Classifier(text_net(name), roles, rows=rows, dtype=dtype)


def texts(n: int, seed: int = 0) -> Batch:
    """Token ids between special tokens at the ends, every third word in two pieces, of different lengths.

    More padding than the longest needs; the last is [CLS] word [SEP].
    """
    r = np.random.RandomState(seed)
    lengths = torch.tensor([*r.randint(5, 10, n - 1), 3])
    x, words = torch.full((n, 11), PAD), torch.full((n, 11), -1)
    for row, index, length in zip(x, words, lengths.tolist(), strict=True):
        row[:length] = torch.tensor(r.randint(2, WORDS, length))
        index[1 : length - 1] = torch.tensor([0, 1, 1, 2, 3, 4, 4, 5, 6])[: length - 2]
    uids = tuple(f"{seed}/{i}" for i in range(n))
    return Batch(uids, x, torch.tensor(r.randint(0, K, n)), lengths=lengths, words=words)
