"""Copies of a net with randomised layers, for the sanity check of attribution methods.

Adebayo, Gilmer, Muelly, Goodfellow, Hardt & Kim, *Sanity Checks for Saliency Maps*, NeurIPS 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attrib.models.classifier import Classifier
from attrib.models.forms import copied
from attrib.models.variant import Randomise, Variant, WeightedLayer
from attrib.noise import Noise
from attrib.types import UserError

# New modules of these classes hold no random numbers, so they do not count as layers of their own.
FOLLOWERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU)
_CHUNK = 1 << 20  # numbers drawn at a time: a VGG's first linear layer has a hundred million


# ---- order ------------------------------------------------------------------------------------


class _Uses(TorchFunctionMode):
    """Records when each tensor is last read by an operation that returns a tensor."""

    def __init__(self, owners: Mapping[int, str]) -> None:
        super().__init__()
        self._owners, self._clock = owners, 0
        self.last: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Reading a parameter's shape, dtype or device does not count.
        if getattr(func, "__name__", "") != "__get__" and any(True for _ in _tensors(result)):
            for tensor in _tensors((args, kwargs)):
                if (owner := self._owners.get(id(tensor))) is not None:
                    self.last[owner], self._clock = self._clock, self._clock + 1
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def weighted_layers(net: nn.Module, x: Tensor) -> list[WeightedLayer]:
    """The net's layers with weights, from the output back to the input.

    The order is that of a forward pass of x (N, *input), reversed, and not that of names or registration; a layer that
    runs several times stands where it runs last. What does not run, such as an auxiliary head, is not listed.

    Raises UserError for a net compiled by torch.jit, whose operations cannot be seen.
    """
    owners: dict[int, str] = {}
    for path, module in net.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(f"{path or type(net).__name__} is compiled by torch.jit: its layers cannot be randomised")
        own = [*module.parameters(recurse=False)]
        if isinstance(module, FOLLOWERS):  # also one with running statistics but no parameters
            own += [*module.buffers(recurse=False)]
        for tensor in own:
            owners.setdefault(id(tensor), path)
    with torch.no_grad(), _Uses(owners) as uses:
        net(x[:1].clone())
    found: list[WeightedLayer] = []
    for path in sorted(uses.last, key=uses.last.__getitem__):
        if found and isinstance(net.get_submodule(path), FOLLOWERS):
            found[-1] = WeightedLayer(found[-1].path, (*found[-1].modules, path))
        else:
            found.append(WeightedLayer(path, (path,)))
    return found[::-1]


# ---- weights ----------------------------------------------------------------------------------


@torch.no_grad()
def reinitialise(net: nn.Module, layers: list[WeightedLayer], seed: int) -> None:
    """Give these layers of ``net`` new weights, in place. A tensor's weights depend on its name and ``seed`` alone."""
    for path in (path for layer in layers for path in layer.modules):
        module = net.get_submodule(path)
        for name, tensor in _state(module):
            tensor.copy_(_fresh(module, name, tensor, Noise([f"{path}.{name}"], seed)))


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    if isinstance(module, FOLLOWERS):
        yield from module.named_buffers(recurse=False)


def _fresh(module: nn.Module, name: str, old: Tensor, noise: Noise) -> Tensor:
    """New values for one tensor, from the distribution that its module's class draws them from.

    Normalisations become what they are in a new net: gain 1, offset 0, running mean 0 and variance 1. (The trained
    net's statistics would not fit the outputs of new weights anyway.) A parameter of an unknown class, such as a
    class token, is drawn from a normal distribution with the mean and standard deviation of its trained values.
    """
    if isinstance(module, nn.PReLU):
        return torch.full_like(old, module.init)
    if isinstance(module, FOLLOWERS):
        return torch.ones_like(old) if name in ("weight", "running_var") else torch.zeros_like(old)
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear)):
        places = 1 if isinstance(module, nn.Bilinear) else math.prod(module.weight.shape[2:])
        return _uniform(old, 1 / math.sqrt(module.weight.shape[1] * places), noise)
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return _uniform(old, 1 / math.sqrt(module.hidden_size), noise)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        value = _normal(old, noise)
        if module.padding_idx is not None:
            value[module.padding_idx] = 0
        return value
    if isinstance(module, nn.MultiheadAttention):
        if name == "in_proj_bias":
            return torch.zeros_like(old)
        # Glorot's initialisation, as in its class.
        if old.ndim == 2:
            return _uniform(old, math.sqrt(6 / sum(old.shape)), noise)
        return _normal(old, noise) / math.sqrt(old.shape[-1])  # bias_k, bias_v
    spread = old.float().std().item() if old.numel() > 1 else 0.0
    if not spread:  # a single number, or all the same
        return _normal(old, noise) * (old.float().abs().mean().item() or 1.0)
    return _normal(old, noise) * spread + old.float().mean().item()


def _uniform(like: Tensor, bound: float, noise: Noise) -> Tensor:
    return (_drawn(like, noise.uniform) * 2 - 1) * bound


def _normal(like: Tensor, noise: Noise) -> Tensor:
    return _drawn(like, noise.normal)


def _drawn(like: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
    count = like.numel()
    parts = [draw(min(_CHUNK, count - start))[0] for start in range(0, count, _CHUNK)]
    return torch.cat(parts).reshape(like.shape)


def randomised(original: Classifier, net: nn.Module, how: Randomise, x: Tensor) -> Classifier:
    """A copy of a classifier with randomised layers.

    original   the classifier
    net        the module that it was made from; it is not changed
    how        which layers are randomised
    x          (N, *input) inputs of the net, which show the order of its layers

    Raises UserError for layers that the net does not have.
    """
    with original.output.alone(original.module):
        like = x.to(original.device, original.dtype if x.is_floating_point() else None)
        found = weighted_layers(original.module, like)
    chosen = how.chosen(found)
    new = copied(net)
    reinitialise(new, chosen, how.seed)
    about = Variant(tuple(layer.path for layer in chosen), len(found), found.index(chosen[-1]) + 1, how)
    modules = sorted(path for layer in chosen for path in layer.modules)
    return type(original)(
        new,
        original.layers,
        rows=original.rows,
        device=original.device,
        dtype=original.dtype,
        # The original's key counts as well: its predictions may say which class is explained.
        spec={"randomised": {"of": original.key, "modules": modules, "seed": how.seed}},
        variant=about,
        original=original,
        output=original.output,
        fold=original.fold,
        compile=original.compile,
    )
