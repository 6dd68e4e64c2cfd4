"""Critics of texts for InputIBA's GAN: an LSTM over the layer's tokens.

Zhang et al., *Fine-Grained Neural Network Explanation by Identifying Input Features with Predictive
Information*, NeurIPS 2021; the architecture is that of the authors' code. ``wgan`` trains them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib.methods.parts.layout import TextLayout
from attrib.methods.parts.wgan import SLOPE, uniform
from attrib.noise import Noise

_WIDTH = 128  # of the layer between the LSTM and the output


def critic_shapes(channels: int) -> dict[str, tuple[int, ...]]:
    """The shapes of one critic's parameters for tokens of so many channels, in the order in which they are drawn."""
    gates = 4 * channels
    return {
        "rnn.weight_ih": (gates, channels), "rnn.weight_hh": (gates, channels),
        "rnn.bias_ih": (gates,), "rnn.bias_hh": (gates,),
        "linear1.weight": (_WIDTH, channels), "linear1.bias": (_WIDTH,),
        "linear2.weight": (1, _WIDTH), "linear2.bias": (1,),
    }  # fmt: skip


class LSTMCritics:
    """B critics of a text layer: an LSTM as wide as the layer, and two linear layers that read its last state.

    The last state is that of the text's last real token, so padding after it is not seen. A vector (B, C)
    is a sequence of length one.

    parameters   see ``critic_shapes``, each with B in front
    lengths      (B,) tokens of each text
    """

    def __init__(self, parameters: dict[str, Tensor], lengths: Tensor) -> None:
        self.parameters, self.lengths = parameters, lengths.clamp(min=1)
        self.tokens = self.lengths.tolist()

    @classmethod
    def initial(cls, noise: Noise, places: TextLayout, like: Tensor) -> LSTMCritics:
        """Drawn as torch.nn's layers do, uniform within 1 / sqrt(width of the layer before).

        ``like`` (B, *layer) gives B, the device and the dtype.
        """
        parameters: dict[str, Tensor] = {}
        for name, shape in critic_shapes(like.shape[-1]).items():
            bound = 1 / math.sqrt(_WIDTH if name.startswith("linear2") else like.shape[-1])
            parameters[name] = uniform(noise, shape, like).mul_(2 * bound).sub_(bound)
        lengths = places.mask.sum(1)
        return cls(parameters, lengths if places.real is not None else torch.ones_like(lengths))

    def __call__(self, z: Tensor) -> Tensor:
        """(B, n, T, C), or (B, n, C) -> (B, n)."""
        p, z = self.parameters, z if z.ndim == 4 else z.unsqueeze(2)
        weights = [p[f"rnn.{name}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        # On a GPU: all samples together, step by step. On a CPU torch's own LSTM is faster, one text after another,
        # each at its own length.
        if z.device.type == "cpu":
            rows = zip(z, self.tokens, *weights, strict=True)
            x = torch.stack([_end_of_one(one[:, :length], w) for one, length, *w in rows])
        else:
            x = _ends(z[:, :, : max(self.tokens)], self.lengths, *weights)
        x = F.leaky_relu(torch.baddbmm(p["linear1.bias"].unsqueeze(1), x, p["linear1.weight"].mT), SLOPE)
        return torch.baddbmm(p["linear2.bias"].unsqueeze(1), x, p["linear2.weight"].mT).squeeze(2)


def _end_of_one(z: Tensor, weights: list[Tensor]) -> Tensor:
    """(n, T, C) and the weights of one LSTM -> (n, C) its last state."""
    begin = z.new_zeros(1, len(z), z.shape[2])
    return torch.lstm(z, (begin, begin), weights, True, 1, 0.0, False, False, True)[1][0]


def _ends(z: Tensor, lengths: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor) -> Tensor:
    """(B, n, T, C) and the weights of B LSTMs -> (B, n, C) the state after each text's last token."""
    samples, n, steps, channels = z.shape
    gates = torch.baddbmm((bias_ih + bias_hh).unsqueeze(1), z.transpose(1, 2).flatten(1, 2), weight_ih.mT)
    cell = hidden = z.new_zeros(samples, n, channels)
    ends: list[Tensor] = []
    for gate in gates.unflatten(1, (steps, n)).unbind(1):
        into, forget, new, out = torch.baddbmm(gate, hidden, weight_hh.mT).chunk(4, dim=2)
        cell = forget.sigmoid() * cell + into.sigmoid() * new.tanh()
        hidden = out.sigmoid() * cell.tanh()
        ends.append(hidden)
    return torch.stack(ends, dim=1)[torch.arange(samples, device=z.device), lengths - 1]
