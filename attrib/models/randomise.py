"""Copies of a net with randomised layers, for the sanity check of attribution methods.

Adebayo, Gilmer, Muelly, Goodfellow, Hardt & Kim, *Sanity Checks for Saliency Maps*, NeurIPS 2018.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attrib.models.calls import OF_SHAPE, EachCall
from attrib.models.classifier import Classifier
from attrib.models.forms import copied, unwrapped
from attrib.models.parametrised import computed, layer_of, made_by_hooks, renew
from attrib.models.variant import Randomise, Variant, WeightedLayer
from attrib.noise import Noise
from attrib.types import UserError

# New modules of these classes hold no random numbers, so they do not count as layers of their own.
FOLLOWERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU)
_CHUNK = 1 << 20  # numbers drawn at a time: a VGG's first linear layer has a hundred million


# ---- order ------------------------------------------------------------------------------------


# Of what gives no tensor, these read a parameter's values, not only its shape, dtype or device.
_VALUES = frozenset(("tolist", "numpy", "__array__"))


class _Uses(TorchFunctionMode):
    """Records when each tensor is last read by a function that returns a tensor."""

    def __init__(self, owners: Mapping[int, str], clock: Iterator[int]) -> None:
        super().__init__()
        self._owners, self._clock = owners, clock
        self.last: dict[str, int] = {}
        self.others: list[nn.Parameter] = []  # parameters that have no owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _VALUES or any(True for _ in _tensors(result)):
            for tensor in _tensors((args, kwargs)):
                owner = self._owners.get(id(tensor))
                if owner is None and isinstance(tensor, nn.Parameter):
                    self.others.append(tensor)
                # An attribute (W.T, W.data) is no reading yet: ``_Reads`` sees what is done with it.
                elif owner is not None and name != "__get__":
                    self.last[owner] = next(self._clock)
        return result


class _Reads(EachCall):
    """Records when the numbers of each tensor are last read, in whatever way.

    Torch's functions do not show all: not what is done with W.T and other attributes, with views that were made before
    the pass, by a compiled function of torch.jit, or by torch.func with its own tensors in the place of parameters.
    """

    def __init__(self, owned: Iterable[tuple[Tensor, str]], clock: Iterator[int]) -> None:
        super().__init__()
        self._clock, self._made = clock, set[int]()
        self._spans: dict[int, list[tuple[int, int, str]]] = {}  # of storages
        for tensor, owner in owned:
            if (span := _span(tensor)) is not None:
                self._spans.setdefault(span[0], []).append((*span[1:], owner))
        self.last: dict[frozenset[str], int] = {}  # owners that have the numbers; several for tied weights

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # this would be recorded as well
            if not func.is_view and func._schema.name.removeprefix("aten::") not in OF_SHAPE:
                for tensor in _tensors((args, kwargs)):
                    if owners := self.owners(tensor):
                        self.last[owners] = next(self._clock)
            result = func(*args, **(kwargs or {}))
            self._made |= _storages(result) - _storages((args, kwargs))
        return result

    def owners(self, tensor: Tensor) -> frozenset[str]:
        if (span := _span(tensor)) is None or span[0] not in self._spans:
            return frozenset()
        return frozenset(owner for start, end, owner in self._spans[span[0]] if start < span[2] and span[1] < end)

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor has the memory of one that was given, or of what an operation gave."""
        return _storages(tensor) <= self._spans.keys() | self._made


def _storages(value: Any) -> set[int]:
    return {span[0] for tensor in _tensors(value) if (span := _span(tensor)) is not None}


def _span(tensor: Tensor) -> tuple[int, int, int] | None:
    """Which storage holds a tensor, and from where to where; None if it holds no numbers as others do."""
    try:
        storage = tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # a sparse one, or one of a library's own
        return None
    if not storage or not tensor.numel():
        return None
    start = int(tensor.storage_offset()) * tensor.itemsize
    places = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1
    return storage, start, start + int(places) * tensor.itemsize


def _tensors(value: Any, deep: bool = False) -> Iterator[Tensor]:
    """The tensors in tuples, lists and dicts; ``deep``: also the parameters of modules in them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item, deep)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()), deep)
    elif deep and isinstance(value, nn.Module):
        yield from value.parameters()


def weighted_layers(net: nn.Module, x: Tensor) -> list[WeightedLayer]:
    """The net's layers with weights, from the output back to the input.

    The order is that of a forward pass of x (N, *input), reversed, and not that of names or registration; a layer that
    runs several times stands where it runs last. What does not run, such as an auxiliary head, is not listed.

    What computes a layer's weight (torch.nn.utils.parametrize) belongs to the layer.

    Raises UserError for a net that reads no weights or some that no module holds, or that is compiled by torch.jit,
    whose operations cannot be seen.
    """
    owned: dict[int, tuple[Tensor, str]] = {}
    for path, module in net.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(f"{path or type(net).__name__} is compiled by torch.jit: its layers cannot be randomised")
        own = [*module.parameters(recurse=False)]
        if isinstance(module, FOLLOWERS):  # also one with running statistics but no parameters
            own += [*module.buffers(recurse=False)]
        for tensor in own:
            owned.setdefault(id(tensor), (tensor, layer_of(net, path)))
    if not net.training:
        net.train().eval()  # to forget what it may have kept of parameters in eval mode, as timm's LeViT does
    clock = itertools.count()
    reads, uses = _Reads(owned.values(), clock), _Uses({key: owner for key, (_, owner) in owned.items()}, clock)
    try:
        with torch.no_grad(), reads, uses:
            net(x[:1].clone())
        seen = True
    except Exception:  # of the net, or an operation that takes functions, as flex_attention does: no mode sees it
        uses.last.clear()
        with torch.no_grad(), uses:
            net(x[:1].clone())
        reads.last.clear()
        seen = False
    buffers = {id(tensor) for tensor in net.buffers()}  # which stay as they are
    _check_hidden(net, [p for p in uses.others if id(p) not in buffers and not (seen and reads.knows(p))])
    last = dict(uses.last)
    for owners, time in reads.last.items():
        if not owners & uses.last.keys():  # else the functions have shown which of them it is, and when
            last.update((owner, max(time, last.get(owner, 0))) for owner in owners)
    if not seen:
        _check_rest(net, x, {owner for _, owner in owned.values()} - last.keys())
    if not last:
        raise UserError(f"{type(net).__name__} reads no parameters in a forward pass: there is nothing to randomise")
    found: list[WeightedLayer] = []
    for path in sorted(last, key=last.__getitem__):
        if found and isinstance(net.get_submodule(path), FOLLOWERS):
            found[-1] = WeightedLayer(found[-1].path, (*found[-1].modules, path))
        else:
            found.append(WeightedLayer(path, (path,)))
    return found[::-1]


@torch.no_grad()
def _check_rest(net: nn.Module, x: Tensor, paths: set[str]) -> None:
    """Raises UserError if the net's output depends on parameters of these modules, although it was not seen to."""
    before = [*_tensors(net(x[:1].clone()))]
    for path in sorted(paths):
        changed = copy.deepcopy(net)
        reinitialise(changed, [WeightedLayer(path, (path,))], 0)
        if not all(map(torch.equal, before, _tensors(changed(x[:1].clone())))):
            raise UserError(
                f"{path or type(net).__name__}: its parameters are read in a way that cannot be followed, so where it "
                "stands among the layers is not known. Pass them to torch's functions as they are"
            )


def _check_hidden(net: nn.Module, hidden: list[nn.Parameter]) -> None:
    """Raises UserError if the net reads parameters that no module holds: they would stay as they were trained."""
    if not hidden:
        return
    keys = {id(parameter) for parameter in hidden}
    places = [
        place for place, value in _attributes(net) if keys & {id(tensor) for tensor in _tensors(value, deep=True)}
    ]
    where = ", ".join(places) or f"a parameter of shape {tuple(hidden[0].shape)}"
    raise UserError(
        f"{where} of {type(net).__name__} is read in a forward pass, but is no part of it for torch, so it would not "
        "be randomised. Keep parameters in nn.ParameterList or nn.ParameterDict, modules in nn.ModuleList or "
        "nn.ModuleDict"
    )


def _check_views(net: nn.Module) -> None:
    """Raises UserError for a view of a parameter among a module's attributes: in a copy it keeps the old numbers."""
    reads = _Reads(((parameter, name) for name, parameter in net.named_parameters()), itertools.count())
    for place, value in _attributes(net):
        for tensor in _tensors(value):
            if not isinstance(tensor, nn.Parameter) and (names := reads.owners(tensor)):
                raise UserError(
                    f"{place} of {type(net).__name__} is a view of the parameter {min(names)}: in a randomised copy it "
                    "would keep the trained numbers. Make the view in the forward pass"
                )


def _attributes(net: nn.Module) -> Iterator[tuple[str, Any]]:
    """What modules hold beside parameters, buffers and modules, but for weights that a hook makes in every pass."""
    for path, module in net.named_modules():
        left_out = {"_parameters", "_buffers", "_modules", *made_by_hooks(module)}
        for name, value in vars(module).items():
            if name not in left_out:
                yield ".".join(filter(None, (path, name))), value


# ---- weights ----------------------------------------------------------------------------------


@torch.no_grad()
def reinitialise(net: nn.Module, layers: list[WeightedLayer], seed: int) -> None:
    """Give these layers of ``net`` new weights, in place. A tensor's weights depend on its name and ``seed`` alone."""
    for path in (path for layer in layers for path in layer.modules):
        module = net.get_submodule(path)
        for name, tensor in _state(module):
            tensor.copy_(_fresh(module, name, tensor, Noise([f"{path}.{name}"], seed)))
        renew(path, module, _fresh, seed)


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    hooked = computed(module)
    yield from (item for item in module.named_parameters(recurse=False) if item[0] not in hooked)
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

    Raises UserError for layers that the net does not have, and for one that cannot be randomised.
    """
    _check_views(unwrapped(net))
    with original.output.alone(original.module):
        like = x.to(original.device, original.dtype if x.is_floating_point() else None)
        found = weighted_layers(original.module, like)
    chosen = how.chosen(found)
    new = unwrapped(copied(net)).train()  # not eval, in which a net may keep what it computed of old weights
    reinitialise(new, chosen, how.seed)
    about = Variant(tuple(layer.path for layer in chosen), len(found), found.index(chosen[-1]) + 1, how)
    modules = sorted(path for layer in chosen for path in layer.modules)
    return type(original)(
        new,
        original.roles.named,
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
