"""The device ``pretend:0``: an accelerator for machines without one.

torch believes in it, in Python and in C++; its numbers are those of the CPU. It refuses what CUDA refuses, and counts
kernels and the places at which the host waits for the device:

    pretend_device.install()                 # once per process
    model = Classifier(net, device="pretend")
    with pretend_device.watched() as seen:
        method.attribute(model, batch, {}, noise)
    assert seen.waits.total() < 5, seen.waits

Refused (``DeviceError``): tensors of the CPU among those of the device, except where CUDA takes them; ``.numpy()``
without ``.cpu()``; lengths on the device for packed sequences; generators of the CPU; products of integers; other
solvers of least squares than "gels"; gradients of cuDNN's recurrent nets in eval mode. An index out of range is an
``AcceleratorError``, and so is everything after it (``revive`` stands for a new process).

What it cannot show: speed, memory, races, and what cuBLAS and cuDNN refuse by themselves.
"""

from __future__ import annotations

import collections
import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import attrib

NAME = "pretend"
PACKAGE = f"{Path(attrib.__file__).parent}/"
aten = torch.ops.aten


class DeviceError(RuntimeError):
    """What CUDA refuses."""


# ---- what is counted -------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What happened on the device."""

    launches: collections.Counter[str] = field(default_factory=collections.Counter)  # operation -> kernels
    waits: collections.Counter[str] = field(default_factory=collections.Counter)  # kind and line -> times


_watching: list[Seen] = []


@contextlib.contextmanager
def watched() -> Iterator[Seen]:
    seen = Seen()
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)


def _line() -> str:
    """The innermost line of the package that is at work."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return "?" if frame is None else f"attrib/{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}"


def _waited(kind: str) -> None:
    for seen in _watching:
        seen.waits[f"{kind} at {_line()}"] += 1


# ---- its tensors -----------------------------------------------------------------------------------------


class Pretended(Tensor):
    """A tensor of the device; its numbers lie in ``on_cpu``."""

    on_cpu: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> Pretended:
        self = Tensor._make_wrapper_subclass(
            cls, on_cpu.shape, strides=on_cpu.stride(), storage_offset=on_cpu.storage_offset(), dtype=on_cpu.dtype,
            device=f"{NAME}:0",
        )  # fmt: skip
        self.on_cpu = on_cpu
        return self

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(op, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"{NAME}({self.on_cpu!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) not in memo:
            with torch.no_grad():
                new = self.detach().clone().requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):  # how nn.Parameter marks a tensor of another class
                new._is_param = True
            memo[id(self)] = new
        return memo[id(self)]


def _peeled(x: Any) -> Any:
    return x.on_cpu if isinstance(x, Pretended) else x


def _wrapped(x: Any) -> Any:
    return Pretended(x) if isinstance(x, Tensor) and not isinstance(x, Pretended) else x


# ---- what is refused -------------------------------------------------------------------------------------

COPIES = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
# A number of the CPU, a tensor of no dimensions, may stand among those of the device in element-wise operations
# and in these; but not as a limit of clamp.
TAKE_NUMBERS = {"masked_fill", "masked_fill_", "fill", "fill_", "full_like", "where"}
NO_NUMBERS = {aten.clamp.Tensor, aten.clamp_.Tensor, aten.clamp_min.Tensor, aten.clamp_max.Tensor}
FLOATS_ONLY = {
    "mm", "bmm", "mv", "addmm", "baddbmm", "addmv", "addbmm", "convolution", "avg_pool2d", "max_pool2d_with_indices",
    "im2col", "upsample_bilinear2d", "_cdist_forward",
}  # fmt: skip
ASSERTING = INDEXING | {
    "gather", "scatter", "scatter_", "scatter_add", "scatter_add_", "index_select", "index_add", "index_add_", "take",
    "embedding", "nll_loss_forward", "nll_loss2d_forward",
}  # fmt: skip
WAITING = {
    "nonzero", "nonzero_numpy", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "equal",
    "_local_scalar_dense", "masked_scatter", "_linalg_check_errors", "is_nonzero", "histc",
}  # fmt: skip
FREE = {"detach", "alias", "_local_scalar_dense", "empty_like", "new_empty", "lift_fresh"}
_lost: list[str] = []


def revive() -> None:
    """Where a real process would have to be started anew."""
    _lost.clear()


def lose(reason: str) -> None:
    """From now on the device answers with errors."""
    _lost.append(reason)


def _check_lost() -> None:
    if _lost:
        raise torch.AcceleratorError(f"CUDA error: {_lost[0]}")


def _check(op: Any, name: str, args: tuple, kwargs: dict) -> None:
    _check_lost()
    if op in COPIES:
        return
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    strangers = [x for x in tensors if not isinstance(x, Pretended)]
    if name == "_pack_padded_sequence":
        if isinstance(args[1], Pretended):
            raise DeviceError(f"'lengths' argument should be a 1D CPU int64 tensor, got one of {NAME} at {_line()}")
        strangers = [x for x in strangers if x is not args[1]]
    if name in INDEXING and isinstance(args[0], Pretended):
        indices = [x for x in strangers if any(x is i for i in args[1])]
        for _ in indices:
            _waited("copy of an index")
        strangers = [x for x in strangers if x.ndim and not any(x is i for i in indices)]
    elif (torch.Tag.pointwise in op.tags or name in TAKE_NUMBERS) and op not in NO_NUMBERS:
        changed = args[0] if name.endswith("_") and args else None
        strangers = [x for x in strangers if x.ndim or x is changed]
    if strangers:
        where = ", ".join(f"{x.device.type} {tuple(x.shape)}" for x in tensors)
        raise DeviceError(f"{op}: expected all tensors to be on the same device, got {where} at {_line()}")
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise DeviceError(f"{op}: expected a generator of {NAME}, got one of the CPU at {_line()}")
    if name in FLOATS_ONLY and any(isinstance(x, Tensor) and not x.is_floating_point() for x in args[:3]):
        raise DeviceError(f"{op}: not implemented for {args[0].dtype} at {_line()}")
    if "linalg_lstsq" in name and kwargs.get("driver") not in (None, "gels"):
        raise DeviceError(f"{op}: driver {kwargs['driver']!r}, only 'gels' is there at {_line()}")


def _count(op: Any, name: str, args: tuple, kwargs: dict, out: Any) -> None:
    if op in COPIES:
        source, result = (args[1], args[0]) if op is aten.copy_.default else (args[0], out)
        if isinstance(source, Pretended) != isinstance(result, Pretended):
            _waited("copy to the CPU" if isinstance(source, Pretended) else "copy to the device")
            return
    bits = (torch.bool, torch.uint8)
    if name in INDEXING and any(isinstance(i, Tensor) and i.dtype in bits for i in args[1]):
        _waited("boolean index")
    elif name in WAITING or (op is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None):
        _waited(name)
    if not op.is_view and name not in FREE:
        for seen in _watching:
            seen.launches[name] += 1


def _run(op: Any, args: tuple, kwargs: dict) -> Any:
    name = op._schema.name.removeprefix("aten::")
    _check(op, name, args, kwargs)
    device, inner = kwargs.get("device"), tree_map(_peeled, kwargs)
    if device is not None:
        inner["device"] = "cpu"
    try:
        out = op(*tree_map(_peeled, args), **inner)
    except (IndexError, RuntimeError) as error:
        if name in ASSERTING and re.search("out of (range|bounds)", str(error)):
            lose(f"device-side assert triggered: {error} at {_line()}")
            _check_lost()
        raise
    on_cpu = device is not None and torch.device(device).type == "cpu"
    if op is aten.copy_.default:
        result = args[0]
    elif on_cpu or not any(isinstance(x, Tensor) for x in tree_leaves(out)):
        result = out
    elif name == "_pack_padded_sequence":
        result = Pretended(out[0]), out[1]  # the sizes of its batches stay on the CPU
    else:
        result = return_and_correct_aliasing(op, args, kwargs, tree_map(_wrapped, out))
    _count(op, name, args, kwargs, result)
    return result


# ---- installing ------------------------------------------------------------------------------------------

_libraries: list[torch.library.Library] = []


class _Module:
    """``torch.pretend``."""

    def is_initialized(self) -> bool:
        return True

    is_available = is_initialized

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.zeros(8, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass


def install() -> None:
    """Make ``torch.device("pretend")`` a device of this process."""
    if _libraries:
        return
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    torch.autograd.set_multithreading_enabled(False)  # so that the stack shows who asked for gradients
    library = torch.library.Library("aten", "IMPL")
    _libraries.append(library)
    for op in _factories():
        library.impl(op.name().removeprefix("aten::"), _made(op), "PrivateUse1")
    # How torch.tensor(numbers, device=...) comes to the device.
    library.impl("_copy_from", lambda x, to, *_: _run(aten.copy_.default, (to, x), {}), "PrivateUse1")
    library.impl("_thnn_fused_lstm_cell", _lstm_cell, "AutogradPrivateUse1")
    library.impl("_thnn_fused_gru_cell", _gru_cell, "AutogradPrivateUse1")
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        setattr(torch._VF, name, _recurrent(getattr(torch._VF, name)))


def _factories() -> Iterator[Any]:
    """The operations that make a tensor of none."""
    for full in torch._C._dispatch_get_all_op_names():
        if full.startswith("aten::") and not full.endswith(("_out", ".out", ".names", ".names_out")):
            name, _, overload = full.removeprefix("aten::").partition(".")
            op = getattr(getattr(aten, name, None), overload or "default", None)
            if op is None or [str(r.type) for r in op._schema.returns] != ["Tensor"]:
                continue
            takes = {a.name: str(a.type) for a in op._schema.arguments}
            if "device" in takes and not any("Tensor" in kind for kind in takes.values()):
                yield op


def _made(op: Any) -> Callable[..., Tensor]:
    name = op._schema.name.removeprefix("aten::")

    def make(*args: Any, **kwargs: Any) -> Tensor:
        _check(op, name, args, kwargs)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
        out = Pretended(op(*args, **kwargs, device="cpu"))
        _count(op, name, args, kwargs, out)
        return out

    return make


def _lstm_cell(gates: Tensor, more: Tensor, cell: Tensor, bias: Any = None, more_bias: Any = None) -> tuple:
    for part in (more, bias, more_bias):
        gates = gates if part is None else gates + part
    i, f, g, o = gates.chunk(4, 1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell, gates


def _gru_cell(gates: Tensor, more: Tensor, hidden: Tensor, bias: Any = None, more_bias: Any = None) -> tuple:
    reset, update, new = (gates if bias is None else gates + bias).chunk(3, 1)
    more_reset, more_update, more_new = (more if more_bias is None else more + more_bias).chunk(3, 1)
    new = (new + (reset + more_reset).sigmoid() * more_new).tanh()
    return new + (update + more_update).sigmoid() * (hidden - new), gates


class _OneWay(torch.autograd.Function):
    """What cuDNN's recurrent nets give in eval mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise DeviceError("cudnn RNN backward can only be called in training mode")


def _recurrent(run: Callable[..., tuple]) -> Callable[..., tuple]:
    def recurrent(*args: Any) -> tuple:
        out = run(*args)
        training = args[7 if isinstance(args[3], (list, tuple)) else 6]  # of packed sequences, or of padded ones
        cudnn = isinstance(args[0], Pretended) and torch.backends.cudnn.enabled
        for seen in _watching if cudnn else ():
            seen.launches["cudnn"] += 1
        if cudnn and out[0].requires_grad and not training:
            return (_OneWay.apply(out[0]), *out[1:])
        return out

    return recurrent
