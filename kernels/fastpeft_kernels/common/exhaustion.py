"""Errors that say that memory ran out."""

from __future__ import annotations

import torch

_SIGNS = ("out of memory", "DefaultCPUAllocator: can't allocate memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
"""torch's CUDA and MPS allocators, the driver and Triton; torch's CPU allocator; cuBLAS and its like; cuDNN."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the host, had no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
