"""A 2-d convolution whose weights stay as they are, as it is best computed on a CPU: forwards, and back to its input.

Forwards, oneDNN computes what follows it, a sum and an activation, in the same call, while the numbers are in the
processor's caches. It makes 0 of NaN there, so inputs must be ordinary numbers (``fused.harmless``). Back, the
gradient of a convolution of stride 1 is one as well, with its weights turned by half a turn and their channels
exchanged; oneDNN computes that faster than what torch calls for it. Activations that choose (ReLU) need only their own
output on the way back, so what is in front of them is not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from attrib.models.folding import has_hooks, is_torchs

# oneDNN's names -> torch's functions, and those on the way back that need only what the activation gave
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "hardtanh": F.relu6,
    "swish": F.silu,
    "hardswish": F.hardswish,
}
_BACK: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, y: torch.ops.aten.threshold_backward(grad, y, 0),
    "hardtanh": lambda grad, y: torch.ops.aten.hardtanh_backward(grad, y, 0.0, 6.0),
}
_NUMBERS = {"hardtanh": [0.0, 6.0]}
EXACT = ("none", *_BACK)  # in bfloat16, too: the others are rounded once where torch rounds twice


class FrozenConv(nn.Module):
    """A convolution, perhaps a sum with something of the same shape, and an activation.

    conv   zeros around the images; its weights are shared, and must not change any more
    then   the activation, by oneDNN's name, or "none"; with a sum "relu"
    """

    def __init__(self, conv: nn.Conv2d, then: str = "none") -> None:
        super().__init__()
        self.conv, self.then = conv, then
        assert not isinstance(conv.padding, str)
        self._layer = conv.padding, conv.stride, conv.dilation, conv.groups
        # With stride 1 the way back is a convolution, too, with this padding; below 0 it would have to cut off.
        self._around = [d * (k - 1) - p for k, p, d in zip(conv.kernel_size, conv.padding, conv.dilation, strict=True)]
        self._turns = set(conv.stride) == {1} and min(self._around) >= 0
        self._turned: Tensor | None = None
        self._padding: Callable[[int, int, int, int], int] | None = None
        if _pads_like_tf(conv):
            from timm.layers.padding import get_same_padding

            self._padding = get_same_padding

    @staticmethod
    def can_be(conv: nn.Module | None) -> TypeGuard[nn.Conv2d]:
        """Whether a module computes this: nothing more, nothing else, and of float32 or bfloat16."""
        if not isinstance(conv, nn.Conv2d) or not (is_torchs(conv, nn.Conv2d) or _pads_like_tf(conv)):
            return False
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros" or is_parametrized(conv) or has_hooks(conv):
            return False
        if not torch.backends.mkldnn.is_available():
            return False
        half: Callable[[], bool] = torch.ops.mkldnn._is_mkldnn_bf16_supported
        dtype = conv.weight.dtype
        return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(half()))

    def forward(self, x: Tensor, *other: Tensor) -> Tensor:
        if self.conv.weight.dtype == torch.bfloat16:
            x = x.to(torch.bfloat16)  # as torch.autocast does, which does not know oneDNN's operations
        if other and (other[0].dtype != x.dtype or other[0].shape != self._shape(x)):
            # A sum that broadcasts, of whose larger part oneDNN may read a piece, and does not say so.
            return _FUNCTIONS[self.then](_WithWayBack.apply(self, "none", x) + other[0])
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *other))):
            return self.computed(self.then, x, *other)
        within = self.then if self.then in EXACT else "none"
        found: Tensor = _WithWayBack.apply(self, within, x, *other)
        return found if within == self.then else _FUNCTIONS[self.then](found)

    def computed(self, then: str, x: Tensor, *other: Tensor) -> Tensor:
        """What oneDNN makes of images (N, C, H, W), without a way back."""
        x = self._padded(x)
        rest = self.conv.weight, self.conv.bias, *self._layer
        end = then, _NUMBERS.get(then, []), ""
        found: Tensor
        if other:
            found = torch.ops.mkldnn._convolution_pointwise.binary(x, *other, *rest, "add", 1.0, *end)
        else:
            found = torch.ops.mkldnn._convolution_pointwise(x, *rest, *end)
        return found

    def _padded(self, x: Tensor) -> Tensor:
        """x with the zeros around it that a net from TensorFlow has.

        ``F.pad`` would write zeros everywhere first, which takes a twentieth of EfficientNet-Lite0's time.
        """
        (top, bottom), (left, right) = self._sides(x.shape)
        if not (top or bottom or left or right):
            return x
        height, width = x.shape[2:]
        form = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        size = *x.shape[:2], top + height + bottom, left + width + right
        wide = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=form)
        for border in (wide[..., :top, :], wide[..., top + height :, :], wide[..., :left], wide[..., left + width :]):
            border.zero_()
        wide[..., top : top + height, left : left + width] = x
        return wide

    def _sides(self, size: torch.Size) -> list[tuple[int, int]]:
        """How many zeros are in front of and behind the rows and columns of images of this size, beside ``padding``."""
        if self._padding is None:
            return [(0, 0), (0, 0)]
        sides = zip(size[2:], self.conv.kernel_size, self.conv.stride, self.conv.dilation)
        return [(total // 2, total - total // 2) for total in (self._padding(*side) for side in sides)]

    def back(self, grad: Tensor, size: torch.Size) -> Tensor:
        """The gradient at the input, which is of this size, of one at the convolution's output."""
        (top, bottom), (left, right) = self._sides(size)
        height, width = size[2:]
        whole = self._back(grad, (*size[:2], top + height + bottom, left + width + right))
        return whole[..., top : top + height, left : left + width]

    def _back(self, grad: Tensor, size: tuple[int, ...]) -> Tensor:
        """``back`` to the input with the zeros around it, which is of this size."""
        padding, stride, dilation, groups = self._layer
        weight = self.conv.weight
        if not self._turns or torch.is_grad_enabled():  # gradients of gradients know torch's own operations
            # In bfloat16 oneDNN takes 1.6 to 70 times as long as in float32 for groups of one or two channels.
            dtype = torch.float32 if groups > 1 and weight.shape[1] < 4 else weight.dtype
            # The input gives nothing but its size and memory format.
            x = torch.empty(size, dtype=dtype, device=grad.device, memory_format=torch.channels_last)
            rest = None, stride, padding, dilation, False, (0, 0), groups, (True, False, False)
            return torch.ops.aten.convolution_backward(grad.to(dtype), x, weight.to(dtype), *rest)[0].to(grad.dtype)
        if self._turned is None:
            parts = weight.detach().unflatten(0, (groups, -1)).transpose(1, 2)  # (groups, in, out, k, k)
            self._turned = parts.flatten(0, 1).flip(2, 3).contiguous(memory_format=torch.channels_last)
        found: Tensor = torch.ops.mkldnn._convolution_pointwise(
            grad, self._turned, None, self._around, (1, 1), dilation, groups, "none", [], ""
        )
        return found

    def _shape(self, x: Tensor) -> tuple[int, ...]:
        """Of what the convolution gives for images (N, C, H, W)."""
        padding, stride, dilation, _ = self._layer
        padded = (n + sum(added) for n, added in zip(x.shape[2:], self._sides(x.shape), strict=True))
        sides = zip(padded, self.conv.kernel_size, padding, stride, dilation)
        return len(x), self.conv.out_channels, *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, p, s, d in sides)


def _pads_like_tf(conv: nn.Conv2d) -> bool:
    """Whether it is timm's layer of nets from TensorFlow, which pads as much as its input needs.

    It is known by its name, so that timm is imported only where there is one.
    """
    return f"{type(conv).__module__}.{type(conv).__qualname__}" == "timm.layers.conv2d_same.Conv2dSame"


class _WithWayBack(torch.autograd.Function):
    """A layer, or what is in front of its activation, with the way back to all but its weights."""

    @staticmethod
    def forward(ctx: Any, layer: FrozenConv, then: str, x: Tensor, *other: Tensor) -> Tensor:
        found = layer.computed(then, x, *other)
        ctx.layer, ctx.then, ctx.size = layer, then, x.shape
        if then != "none":
            ctx.save_for_backward(found)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.then != "none":
            grad = _BACK[ctx.then](grad, *ctx.saved_tensors)
        x = ctx.layer.back(grad, ctx.size) if ctx.needs_input_grad[2] else None
        return None, None, x, *(grad if needed else None for needed in ctx.needs_input_grad[3:])
