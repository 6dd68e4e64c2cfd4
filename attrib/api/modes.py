"""The modes of torch that a caller may be in, which are none of what is computed here."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

import torch

from attrib.api.speech import to_callers
from attrib.models.float32 import all_bits
from attrib.types import SampleError, UserError

P = ParamSpec("P")
R = TypeVar("R")
_ONE = threading.RLock()


def undisturbed(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` as it is whatever the caller's modes.

    Without autocast and products of fewer bits, as ``precision`` says the arithmetic; without inference mode, in which
    no gradient ever flows; without a default device, as ``run.device`` says where things are computed. By one thread at
    a time, as torch.fx changes modules for all of them while it traces; with messages in the words of Python.
    """

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with _ONE, ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(all_bits())
            for device in ["cpu", *["cuda"] * torch.cuda.is_available()]:
                stack.enter_context(torch.autocast(device, enabled=False))
            # Where it is the CPU, no mode is needed, which would see each call of torch's. (torch 2.4's
            # ``get_default_device`` fails once a device has been set and left again.)
            if torch.empty(0).device.type != "cpu":
                stack.enter_context(torch.device("cpu"))
            try:
                return function(*args, **kwargs)
            except (UserError, SampleError) as error:
                error.args = (to_callers(str(error)),)
                raise

    return alone
