"""Weights that are computed from other tensors, and how such a layer gets those of a new one.

``torch.nn.utils.parametrize`` keeps a weight as *originals*, from which a chain of modules computes it whenever it is
read; the older ``torch.nn.utils.weight_norm`` and ``spectral_norm`` do so in a hook. To draw the originals as if they
were weights would give weights that no new layer has. So the weight itself is drawn, as that of a plain layer of the
class, and the originals become what they are when the parametrization is put on such a layer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from attrib.noise import Noise, global_states
from attrib.types import UserError

# module, name of one of its weights, a tensor with that weight's shape -> new values, which also depend on a stream
Draw = Callable[[nn.Module, str, Tensor, Noise], Tensor]

_STEPS = 15  # of the power method, as many as torch takes for a new layer
_PARTS = ".parametrizations."


def layer_of(net: nn.Module, path: str) -> str:
    """The path of the layer to which the module at ``path`` belongs: itself, unless it computes a layer's weight."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        layer = ".".join(parts[:i])
        if part == "parametrizations" and is_parametrized(net.get_submodule(layer)):
            return layer
    return path


def computed(module: nn.Module) -> set[str]:
    """The names of a module's own parameters that are not its weights, but what a hook computes a weight from."""
    found = set[str]()
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            found |= {f"{hook.name}_g", f"{hook.name}_v"}
        elif isinstance(hook, SpectralNorm):
            found.add(f"{hook.name}_orig")
    return found


def made_by_hooks(module: nn.Module) -> set[str]:
    """The names of the weights that are no parameters, because a hook computes them in every pass."""
    return {hook.name for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm | SpectralNorm)}


@torch.no_grad()
def renew(path: str, module: nn.Module, draw: Draw, seed: int) -> None:
    """Give the module at ``path`` new values for each weight that is computed, in place.

    Raises UserError, which names the weight, where a parametrization takes no new weight or does not let it through.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm):
            _renew_hooked(path, module, hook, draw, seed)
    if is_parametrized(module):
        for name, chain in module.parametrizations.items():  # type: ignore[operator, union-attr]
            _renew_chain(path, module, name, chain, draw, seed)


def _renew_hooked(path: str, module: nn.Module, hook: WeightNorm | SpectralNorm, draw: Draw, seed: int) -> None:
    old = getattr(module, f"{hook.name}_v" if isinstance(hook, WeightNorm) else f"{hook.name}_orig")
    stream = f"{path}.{hook.name}"
    old.copy_(draw(module, hook.name, old, Noise([stream], seed)))
    if isinstance(hook, WeightNorm):
        getattr(module, f"{hook.name}_g").copy_(torch.norm_except_dim(old, 2, hook.dim))
        weight = hook.compute_weight(module)
    else:
        for vector in ("u", "v"):
            _direction(getattr(module, f"{hook.name}_{vector}"), Noise([f"{stream}_{vector}"], seed))
        for _ in range(_STEPS):
            weight = hook.compute_weight(module, do_power_iteration=True)
    setattr(module, hook.name, weight)


def _renew_chain(path: str, module: nn.Module, name: str, chain: ParametrizationList, draw: Draw, seed: int) -> None:
    stream, before = f"{path}.{name}", getattr(module, name).clone()
    parts = list(chain)
    for i, part in enumerate(parts):  # their own parameters, such as those of a low-rank update
        for inner, sub in part.named_modules():
            if layer_of(part, inner) == inner:
                where = ".".join(filter(None, (f"{path}{_PARTS}{name}.{i}".lstrip("."), inner)))
                for own, tensor in sub.named_parameters(recurse=False):
                    if own not in computed(sub):
                        tensor.copy_(draw(sub, own, tensor, Noise([f"{where}.{own}"], seed)))
                renew(where, sub, draw, seed)
    originals = [*chain.parameters(recurse=False)]
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    # Among other things, torch's orthogonal parametrization completes its basis with the global generator.
    with global_states(int.from_bytes(digest[:7], "big"), before.device):
        if originals:  # else they are buffers, which stay
            _assign(stream, module, name, chain, draw, seed)
        _settle(stream, chain, parts, seed)
    after = getattr(module, name)
    if not after.isfinite().all():
        raise UserError(f"{stream.lstrip('.')} cannot be randomised: {_names(parts)} gives numbers that are not finite")
    # A normalisation's weight is 1 in every new net, and an orthogonal 1 x 1 matrix is 1 or -1.
    if originals and after.numel() > 1 and torch.equal(before, after) and before.unique().numel() > 1:
        raise UserError(
            f"{stream.lstrip('.')} cannot be randomised: {_names(parts)} gives the trained weight whatever it is "
            f"computed from. {_REMOVE}"
        )


_REMOVE = (
    "Make the trained weight a plain parameter, with torch.nn.utils.parametrize.remove_parametrizations(layer, name), "
    "or randomise other layers"
)


def _assign(stream: str, module: nn.Module, name: str, chain: ParametrizationList, draw: Draw, seed: int) -> None:
    """Let the originals be what torch makes of a new layer's weight when the chain is registered on it.

    That is: through ``right_inverse`` from the last parametrization to the first; one that has none takes the weight
    itself. Where this gives no originals, as the logarithm of a negative weight does not, they are drawn as parameters
    of an unknown class are.
    """
    effective = getattr(module, name)
    originals = _originals(chain)
    value = draw(module, name, effective, Noise([stream], seed)).to(effective.device, effective.dtype)
    parts = list(chain)
    for part in reversed(parts):
        if hasattr(part, "right_inverse"):
            try:
                value = part.right_inverse(value)  # type: ignore[operator]
            except NotImplementedError:  # torch then takes it to be the identity
                pass
            except Exception as error:  # it may be a user's
                raise UserError(
                    f"{stream.lstrip('.')} cannot be randomised: {type(part).__name__}.right_inverse takes no weight "
                    f"of a new layer ({type(error).__name__}: {error}). {_REMOVE}"
                ) from error
    values = [value] if isinstance(value, Tensor) else list(value)
    fits = len(values) == len(originals) and all(
        new.shape == old.shape and bool(new.isfinite().all()) for new, old in zip(values, originals)
    )
    for i, original in enumerate(originals):
        if fits:
            original.copy_(values[i])
        else:
            original.copy_(draw(chain, "original", original, Noise([f"{stream}.original{i}"], seed)))


def _settle(stream: str, chain: ParametrizationList, parts: list[nn.Module], seed: int) -> None:
    """Let what a parametrization keeps beside its parameters fit the new weight, as a spectral norm's vectors must.

    It is updated in training mode, torch's and others' alike. Masks and other buffers stay.
    """
    for i, part in enumerate(parts):
        if not any(True for _ in part.buffers()):
            continue
        if isinstance(part, _SpectralNorm):
            for name, vector in part.named_buffers():
                _direction(vector, Noise([f"{stream}.{i}.{name}"], seed))
        given = _given(chain, parts[:i])
        modes = [(module, module.training) for module in part.modules()]
        try:
            part.train()
            for _ in range(_STEPS):
                part(*given)
        finally:
            for module, mode in modes:
                module.training = mode


def _given(chain: ParametrizationList, before: list[nn.Module]) -> list[Tensor]:
    """What the parametrization behind these gets."""
    given = _originals(chain)
    for part in before:
        given = [part(*given)]
    return given


def _originals(chain: ParametrizationList) -> list[Tensor]:
    names = ["original"] if chain.is_tensor else [f"original{i}" for i in range(chain.ntensors)]
    return [getattr(chain, name) for name in names]


def _direction(vector: Tensor, noise: Noise) -> None:
    drawn = noise.normal(math.prod(vector.shape))[0].reshape(vector.shape)
    vector.copy_(drawn / drawn.norm())


def _names(parts: list[nn.Module]) -> str:
    return ", ".join(type(part).__name__ for part in parts)
