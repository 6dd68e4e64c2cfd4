"""Recurrent networks over words: token ids (N, T), padded on the right, to logits (N, K).

The nets find the lengths themselves (``real_tokens``), and padding changes nothing: a sentence has
the same logits alone and in any batch. Every layer's sequence output (N, T, H) is the output of a
module, so that it can have a role; all classifiers read it, and nothing that goes around it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from attrib.models.forms import with_gradients
from attrib.types import UserError


def real_tokens(x: Tensor, pad_id: int) -> Tensor:
    """(N, T) ids -> (N, T) bool: everything up to the last token that is not padding, and always the first."""
    real = (x != pad_id).flip(1).cumsum(1).gt(0).flip(1)
    return torch.cat((torch.ones_like(real[:, :1]), real[:, 1:]), 1)


def last_step(z: Tensor, lengths: Tensor) -> Tensor:
    """(N, T, H), (N,) -> (N, H): each row at its last real token."""
    return z.gather(1, (lengths - 1)[:, None, None].expand(-1, -1, z.size(2))).squeeze(1)


@torch.library.custom_op(
    "attrib::padded_lstm",
    mutates_args=(),
    schema="(Tensor z, Tensor lengths, Tensor[] weights, int layers, bool both_ways) -> Tensor",
)
def padded_lstm(z: Tensor, lengths: Tensor, weights: list[Tensor], layers: int, both_ways: bool) -> Tensor:
    """What ``Recurrent`` gives in eval mode, as one call in the graph of a net, for texts of any length."""
    zero = z.new_zeros((1 + both_ways) * layers, len(z), weights[1].shape[1])
    train = torch.is_grad_enabled() and z.device.type != "cpu"  # see ``forms.with_gradients``; there is no dropout
    if both_ways:
        packed = pack_padded_sequence(z, lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, *_ = torch._VF.lstm(packed.data, packed.batch_sizes, (zero, zero), weights, True, layers, 0.0, train, True)
        packed = PackedSequence(out, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        return pad_packed_sequence(packed, batch_first=True, total_length=z.shape[1])[0]
    out, *_ = torch._VF.lstm(z, (zero, zero), weights, True, layers, 0.0, train, False, True)
    return _without_padding(out, lengths)


def _without_padding(out: Tensor, lengths: Tensor) -> Tensor:
    padding = torch.arange(out.shape[1], device=out.device) >= lengths[:, None]
    return out.masked_fill(padding[:, :, None], 0.0)


@padded_lstm.register_fake
def _(z: Tensor, lengths: Tensor, weights: list[Tensor], layers: int, both_ways: bool) -> Tensor:
    return z.new_empty(*z.shape[:2], (1 + both_ways) * weights[1].shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, lengths, weights, ctx.layers, ctx.both_ways = inputs
    ctx.save_for_backward(z, lengths, *weights)


def _back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, list[Tensor], None, None]:
    z, lengths, *weights = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (z, *weights)]
        out = padded_lstm._init_fn(leaves[0], lengths, leaves[1:], ctx.layers, ctx.both_ways)
        at_z, *at_weights = torch.autograd.grad(out, leaves, grad)
    return at_z, None, at_weights, None, None


padded_lstm.register_autograd(_back, setup_context=_keep)


class Recurrent(nn.LSTM):
    """An LSTM from padded sequences to padded sequences, zero on padding; weights named as in ``nn.LSTM``."""

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bidirectional: bool = False, dropout: float = 0.0
    ) -> None:
        dropout = dropout if num_layers > 1 else 0.0  # it is between the layers
        super().__init__(
            input_size, hidden_size, num_layers, batch_first=True, bidirectional=bidirectional, dropout=dropout
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.flatten_parameters()  # a copy's weights lie apart, of which cuDNN would warn at every call

    def forward(self, z: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        """(N, T, E), real tokens (N,) -> (N, T, H), with both directions (N, T, 2H).

        A length of 0 counts as 1.
        """
        lengths, steps = lengths.clamp(min=1), z.shape[1]
        if torch.compiler.is_compiling() and not self.training:
            return padded_lstm(z, lengths, list(self._flat_weights), self.num_layers, self.bidirectional)
        with with_gradients(self):
            if self.bidirectional:
                packed = pack_padded_sequence(z, lengths.cpu(), batch_first=True, enforce_sorted=False)
                return pad_packed_sequence(super().forward(packed)[0], batch_first=True, total_length=steps)[0]
            # Padding lies behind what is real, which therefore cannot see it; packing would only cost time
            # (measured on a CPU, forward and backward: up to 2.7 times as much).
            out = super().forward(z)[0]
        return _without_padding(out, lengths)


def _check_classes(num_classes: int) -> None:
    if num_classes < 2:
        raise UserError(f"model.num_classes must be at least 2, not {num_classes}; two classes have two logits")


class DeepLSTM(nn.Module):
    """The four LSTMs on top of each other of InputIBA's text experiments.

    Zhang et al., *Fine-Grained Neural Network Explanation by Identifying Input Features with
    Predictive Information*, NeurIPS 2021. Modules are named as in its code, so its weights load by name.

    With two classes ``fc`` has one output s, whose sigmoid is the probability of class 1; the logits
    are (-s/2, s/2), whose softmax is that sigmoid. The classifier reads the last step of rnn_4's
    sequence output; the original reads the hidden state beside it, which is the same number, but
    then nothing that replaces rnn_4's output reaches the logits.

    pad_id   id of padding
    mask_id  id of the word that hides another one (<unk>)
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int = 100,
        hidden_dim: int = 256,
        num_classes: int = 2,
        n_layers: int = 1,
        dropout: float = 0.5,
        pad_id: int = 1,
        mask_id: int = 0,
    ) -> None:
        super().__init__()
        _check_classes(num_classes)
        self.pad_id, self.mask_id = pad_id, mask_id
        self.embedding = nn.Embedding(vocab_size, embedding_dim, padding_idx=pad_id)
        self.rnn_1 = Recurrent(embedding_dim, hidden_dim, n_layers, dropout=dropout)
        self.rnn_2 = Recurrent(hidden_dim, hidden_dim, n_layers, dropout=dropout)
        self.rnn_3 = Recurrent(hidden_dim, hidden_dim, n_layers, dropout=dropout)
        self.rnn_4 = Recurrent(hidden_dim, hidden_dim, n_layers, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(hidden_dim, 1 if num_classes == 2 else num_classes)

    def forward(self, x: Tensor) -> Tensor:
        lengths = real_tokens(x, self.pad_id).sum(1)
        z = self.dropout(self.embedding(x))
        z = self.rnn_1(z, lengths)
        z = self.rnn_2(z, lengths)
        z = self.rnn_3(z, lengths)
        z = self.rnn_4(z, lengths)
        scores = self.fc(self.dropout(last_step(z, lengths)))
        return torch.cat((-scores, scores), 1) / 2 if self.fc.out_features == 1 else scores


class BiLSTM(nn.Module):
    """A bidirectional LSTM and a linear layer.

    pooling  what the linear layer reads of the sequence (N, T, 2H): "last" is where each direction
             ends (last real token forwards, first token backwards); "mean" and "max" are over real tokens
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int = 100,
        hidden_dim: int = 128,
        num_classes: int = 2,
        n_layers: int = 1,
        dropout: float = 0.5,
        pad_id: int = 1,
        mask_id: int = 0,
        pooling: Literal["last", "mean", "max"] = "last",
    ) -> None:
        super().__init__()
        _check_classes(num_classes)
        if pooling not in ("last", "mean", "max"):
            raise UserError(f"model.pooling must be last, mean or max, not {pooling!r}")
        self.pad_id, self.mask_id, self.pooling = pad_id, mask_id, pooling
        self.embedding = nn.Embedding(vocab_size, embedding_dim, padding_idx=pad_id)
        self.rnn = Recurrent(embedding_dim, hidden_dim, n_layers, bidirectional=True, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2 * hidden_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        real = real_tokens(x, self.pad_id)
        lengths = real.sum(1)
        z = self.rnn(self.dropout(self.embedding(x)), lengths)
        if self.pooling == "last":
            forwards, backwards = z.chunk(2, 2)
            pooled = torch.cat((last_step(forwards, lengths), backwards[:, 0]), 1)
        elif self.pooling == "mean":
            pooled = z.masked_fill(~real[:, :, None], 0.0).sum(1) / lengths[:, None]
        else:
            pooled = z.masked_fill(~real[:, :, None], -torch.inf).amax(1)
        return self.fc(self.dropout(pooled))


class AcdLSTM(nn.Module):
    """The one-layer sentiment LSTM of contextual decomposition; modules are named as in its code.

    Murdoch, Liu & Yu, *Beyond Word Importance: Contextual Decomposition to Extract Interactions from
    LSTMs*, ICLR 2018; Singh, Murdoch & Yu, *Hierarchical interpretations for neural network
    predictions*, ICLR 2019.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int = 300,
        hidden_dim: int = 150,
        num_classes: int = 2,
        pad_id: int = 1,
        mask_id: int = 0,
    ) -> None:
        super().__init__()
        _check_classes(num_classes)
        self.pad_id, self.mask_id = pad_id, mask_id
        self.embed = nn.Embedding(vocab_size, embedding_dim, padding_idx=pad_id)
        self.lstm = Recurrent(embedding_dim, hidden_dim)
        self.hidden_to_label = nn.Linear(hidden_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        lengths = real_tokens(x, self.pad_id).sum(1)
        return self.hidden_to_label(last_step(self.lstm(self.embed(x), lengths), lengths))
