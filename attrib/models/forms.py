"""The forms in which a net may come: which are the same net in a wrapping, and which cannot be explained."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from attrib.types import UserError

COMPILED = "_orig_mod"  # where torch.compile keeps the net


def unwrapped(module: Any) -> nn.Module:
    """The net inside of DataParallel, DistributedDataParallel and torch.compile: how it runs, not what it computes.

    Raises UserError for what is no ``torch.nn.Module``.
    """
    while isinstance(module, DataParallel | DistributedDataParallel) or _compiled(module):
        module = module.get_submodule(COMPILED) if _compiled(module) else module.module
    if not isinstance(module, nn.Module):
        raise UserError(f"a net is a torch.nn.Module, not {type(module).__name__}")
    return module


def own_path(path: str, module: nn.Module) -> str:
    """A path in ``module`` as it is in ``private_copy(unwrapped(module))``; one that is so already stays."""
    while isinstance(module, DataParallel | DistributedDataParallel) or _compiled(module):
        prefix = COMPILED if _compiled(module) else "module"
        module = module.get_submodule(prefix)
        path = path if path in dict(module.named_modules()) else path.removeprefix(f"{prefix}.")
    return ".".join(part for part in path.split(".") if part != COMPILED)


def tensors(net: nn.Module) -> dict[str, Tensor]:
    """The state of a net by name, the same for a net with compiled parts.

    Raises UserError, which names the module, for a net that has no weights yet or none that are plain tensors.
    """
    name = type(net).__name__
    for path, module in net.named_modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(map(is_lazy, own)):
            raise UserError(
                f"{path or name} ({type(module).__name__}) has no weights yet, because no input has been seen; run the "
                "net once on one, and load its weights"
            )
        if any(one.is_meta for one in own):
            raise UserError(
                f"{path or name} ({type(module).__name__}) has the shapes of its weights, but no numbers: it is on the "
                'device "meta". Put the net on another (net.to_empty(device="cpu")), and load its weights'
            )
    if isinstance(net, torch.jit.ScriptModule):
        raise UserError(
            f"{name} is TorchScript, which is one piece: its layers can neither be read nor replaced. Give the "
            "torch.nn.Module that it was made from"
        )
    found: dict[str, Tensor] = {}
    for key, value in net.state_dict().items():
        if not isinstance(value, Tensor) or value.is_quantized:
            path = key.rpartition(".")[0]
            while path and not _has(net, path):
                path = path.rpartition(".")[0]
            owner = type(net.get_submodule(path)).__name__
            raise UserError(
                f"{path or name} ({owner}) keeps {key.removeprefix(path + '.')} as {_kind(value)}, not as a tensor of "
                "numbers, as quantised nets do: no gradient flows through it. Give the net that it was made from"
            )
        found[".".join(part for part in key.split(".") if part != COMPILED)] = value
    return found


def private_copy(net: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A frozen copy in eval mode, nothing of which is compiled. Raises UserError for a net that cannot be copied.

    Weights that hooks compute anew before each pass (pruned ones, the older weight and spectral norm) are plain ones.
    """
    name = type(net).__name__
    try:
        new = copied(net)
    except Exception as error:  # anything may hang on a user's net
        raise UserError(
            f"{name} cannot be copied ({type(error).__name__}: {error}); attributes that are no modules, parameters "
            "or buffers must be such as copy.deepcopy takes"
        ) from error
    for path, child in [*new.named_modules()]:
        if path and _compiled(child):
            parent, _, last = path.replace(f".{COMPILED}", "").rpartition(".")
            setattr(new.get_submodule(parent), last, unwrapped(child))
    new.requires_grad_(False)  # before a recurrent layer, in ``_apply``, keeps weights that are computed
    try:
        new = new._apply(lambda t: t.to(device, _precise(t, dtype))).eval()
    except NotImplementedError as error:  # what torch.export gave, in some versions
        raise UserError(f"{name} cannot be put into eval mode ({error}); give the net that it was made from") from error
    _with_plain_weights(new)
    for module in new.modules():
        if isinstance(module, nn.RNNBase):
            module.forward = MethodType(_recurrent, module)
    return new


def _precise(t: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tensor's kind in the precision of ``dtype``: of complex numbers a complex one.

    ``net.to(dtype)`` keeps the real parts alone.
    """
    return dtype.to_complex() if t.is_complex() else dtype if t.is_floating_point() else t.dtype


def copied(net: nn.Module) -> nn.Module:
    """``copy.deepcopy``, also of a net on which results of a pass hang, without the way back through it.

    Nets may keep activations, and hooks keep the weights that they computed.
    """
    with torch.no_grad():  # else the weights of a part that is TorchScript hang on the given net's
        return copy.deepcopy(net, _results_on(net))


def _results_on(net: nn.Module) -> dict[int, Any]:
    found: dict[int, Any] = {}
    seen: set[int] = set()

    def look(value: Any) -> None:
        if isinstance(value, Tensor) and not value.is_leaf:
            found[id(value)] = value.detach().clone()
        elif isinstance(value, list | tuple | dict) and id(value) not in seen:
            seen.add(id(value))
            for one in value.values() if isinstance(value, dict) else value:
                look(one)

    for module in net.modules():
        look(vars(module))
    return found


def _with_plain_weights(net: nn.Module) -> None:
    """Put what hooks would compute of weights in the place of the weights. A net in eval mode computes the same."""
    computed = []
    for module in net.modules():
        for hook in [*module._forward_pre_hooks.values()]:
            for kind, named, remove in _REWRITING:
                if isinstance(hook, kind):
                    hook(module, None)
                    name = getattr(hook, named)
                    computed.append((module, name, getattr(module, name).detach().clone(), remove))
    for module, name, value, remove in computed:  # once all are computed, as they may be of the same weights
        remove(module, name)
        setattr(module, name, nn.Parameter(value, requires_grad=False))


# Hooks that compute a weight before each pass: their class, where they say which, and what takes them away.
_REWRITING: tuple[tuple[type, str, Callable[[nn.Module, str], Any]], ...] = (
    (prune.BasePruningMethod, "_tensor_name", prune.remove),
    (WeightNorm, "name", remove_weight_norm),
    (SpectralNorm, "name", remove_spectral_norm),
)


def _recurrent(self: nn.RNNBase, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward."""
    with with_gradients(self):
        return type(self).forward(self, *args, **kwargs)


@contextmanager
def with_gradients(layer: nn.RNNBase) -> Iterator[None]:
    """Lets gradients through a recurrent layer in eval mode, where cuDNN refuses them.

    In training mode it does not, and without dropout its numbers are the same. The alternative, torch's own kernels,
    takes several launches for every step of a text.
    """
    if layer.training or not torch.is_grad_enabled() or layer.all_weights[0][0].device.type == "cpu":
        yield
        return
    dropout = layer.dropout
    layer.training, layer.dropout = True, 0.0
    try:
        yield
    finally:
        layer.training, layer.dropout = False, dropout


def _compiled(module: Any) -> bool:
    dynamo = sys.modules.get("torch._dynamo")  # without it nothing is compiled, and it takes two seconds to import
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def _has(net: nn.Module, path: str) -> bool:
    try:
        net.get_submodule(path)
    except AttributeError:
        return False
    return True


def _kind(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
