"""What a Classifier does with a net before its first number: copy it, try it on noise, make its layers hookable."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attrib.models.device_memory import of_the_device
from attrib.models.exam import Exam, examine
from attrib.models.forms import private_copy
from attrib.models.output import Output
from attrib.models.output_kinds import Classes
from attrib.noise import Noise
from attrib.types import UserError


@dataclass(frozen=True)
class Prepared:
    """A net that is ready. Without an input shape it was not tried yet, and all but ``net`` is None.

    probe    noise that went through it, (1, *input)
    outputs  its number of scores, K
    exam     what it did with the noise
    """

    net: nn.Module
    probe: Tensor | None = None
    outputs: int | None = None
    exam: Exam | None = None


def prepared(
    module: nn.Module,
    output: Output,
    device: torch.device,
    dtype: torch.dtype,
    input_shape: tuple[int, ...] | None,
    pairs: bool,
) -> Prepared:
    """A frozen copy of ``module``, without in-place operations, in which no module stands at two paths.

    ``pairs``: whether two rows may go through it at a time. Raises UserError for a net that is refused: by the exam,
    because it gives NaN, or because it computes something else without in-place operations.
    """
    net, name = private_copy(module, device, dtype), type(module).__name__
    if getattr(net, "num_outputs", None) == 1 and type(output.read) is Classes:
        raise UserError(
            f"{name} has one output; a classifier has a logit for each of its classes. If it is the logit of two "
            "classes, set model.output to {read: sigmoid}; if its probability, to {read: sigmoid, of: probability}; "
            "if it is a value, to {read: value}"
        )
    output.attach(net)
    if input_shape is None:
        _separate(net)
        return Prepared(net)
    probe, other = (Noise([uid], device=device, dtype=dtype).normal(*input_shape) for uid in ("probe", "other"))
    try:
        exam = examine(net, output, torch.cat((probe, 2 * other + 1)), "noise", pairs=pairs)
    except Exception as error:  # a user's net may raise anything
        if isinstance(error, UserError) or of_the_device(error):
            raise
        raise UserError(
            f"{name} cannot be run on an input of {(1, *input_shape)}: {type(error).__name__}: {error}"
        ) from error
    before = _scores(net, output, probe)
    if before.isnan().any():
        raise UserError(f"{name} gives NaN for noise of the shape {input_shape}; nothing of it can be explained")
    _separate(net)
    after = _scores(net, output, probe)
    if not _alike(before, after):
        worst = (before - after).abs().max().item()
        known = _remembered(net)
        if not _alike(after, _scores(net, output, probe)):
            news = [path for path, value in _remembered(net).items() if not torch.equal(value, known.get(path, _NAN))]
            kept = f"{', '.join(news[:3])} changes" if news else "something that it keeps changes"
            raise UserError(
                f"{name} computes something else in each run: on the same input its logits change by {worst:.2g}, and "
                f"{kept}. Let that change in training only (if self.training)"
            )
        raise UserError(
            f"{name} relies on in-place operations: without them its logits change by {worst:.2g}. Write the net "
            "without inplace=True."
        )
    return Prepared(net, probe, before.shape[1], exam)


_NAN = torch.tensor(torch.nan)  # equal to nothing


def _alike(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5 * one.abs().nan_to_num(posinf=0).max().item())


def _remembered(net: nn.Module) -> dict[str, Tensor]:
    """What a net may change while it runs, by name: its buffers, and the numbers and tensors among its attributes."""
    found = {}
    for path, module in net.named_modules():
        for name, value in (*vars(module).items(), *module.named_buffers(recurse=False)):
            if isinstance(value, int | float | Tensor):
                found[f"{path}.{name}".lstrip(".")] = torch.as_tensor(value).detach().clone()
    return found


@torch.no_grad()
def _scores(net: nn.Module, output: Output, probe: Tensor) -> Tensor:
    with output.alone(net):
        scores: Tensor = net(probe.clone())
    return scores


def _separate(net: nn.Module) -> None:
    """Switch in-place operations off, and give each path of a module without parameters one of its own.

    Such a module at two paths would share its hooks; one with parameters is shared on purpose (tied weights).
    """
    seen: set[int] = set()
    for path, child in list(net.named_modules(remove_duplicate=False)):
        if getattr(child, "inplace", False):
            child.inplace = False
        if id(child) in seen and not any(True for _ in child.parameters()):
            parent, _, name = path.rpartition(".")
            setattr(net.get_submodule(parent), name, copy.deepcopy(child))
        seen.add(id(child))
