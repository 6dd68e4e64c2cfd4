"""What a device says when it cannot go on: memory that ran out, or worse."""

from __future__ import annotations

import gc

import torch

# torch 2.8 or later; before, its text tells.
_ACCELERATOR: tuple[type[Exception], ...] = tuple(filter(None, [getattr(torch, "AcceleratorError", None)]))


def is_out_of_memory(error: BaseException) -> bool:
    """Also of the SampleError with which ``Classifier.chunked`` gives up."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        # cuBLAS, cuDNN and cuSOLVER say "..._STATUS_ALLOC_FAILED", cuDNN 9 also "..._ALLOCATION_FAILED".
        text in str(error)
        for text in ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED", "ALLOCATION_FAILED")
    )


def is_lost(error: BaseException) -> bool:
    """Whether the accelerator failed otherwise: an assertion in a kernel, an illegal access, a bus that is gone.

    Every later operation of the process fails then too, whatever it is about.
    """
    return (isinstance(error, _ACCELERATOR) or "CUDA error:" in str(error)) and not is_out_of_memory(error)


def of_the_device(error: BaseException) -> bool:
    """Whether an error says something of the device alone, and nothing of the net or the sample."""
    return is_out_of_memory(error) or is_lost(error)


def release_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more. Call it outside of ``except``, whose traceback keeps tensors alive."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
