"""Memory that ran out."""

from __future__ import annotations

import gc

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Also of the SampleError with which ``Classifier.chunked`` gives up."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        # cuBLAS, cuDNN and cuSOLVER say "..._STATUS_ALLOC_FAILED", cuDNN 9 also "..._ALLOCATION_FAILED".
        text in str(error)
        for text in ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED", "ALLOCATION_FAILED")
    )


def release_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more. Call it outside of ``except``, whose traceback keeps tensors alive."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
