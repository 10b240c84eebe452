"""Bytes of frozen weights in host memory, from where they are copied to the device ahead of each use."""

from __future__ import annotations

import logging
import os
import weakref

import torch
from torch import Tensor

logger = logging.getLogger("fastpeft")

PAGE = 4096
_pins = True


def to_host(tensor: Tensor, pin: bool) -> Tensor:
    """A contiguous tensor's values in host memory of their own, same shape and dtype.

    Args:
        tensor: contiguous, on any device.
        pin: the memory is to be pinned, for copies that the host does not wait for. Where the system refuses, it stays
            pageable; said once.

    A tensor whose memory torch did not allocate (a file mapped into memory) stays the store itself where the host has
    no room for another copy.
    """
    if tensor.device.type == "cpu" and not tensor.untyped_storage().resizable() and tensor.nbytes > free_memory():
        return tensor.detach()
    size = -(-tensor.nbytes // PAGE) * PAGE
    memory = torch.empty(size + PAGE, dtype=torch.uint8)
    first = -memory.data_ptr() % PAGE  # two pinned regions must not share a page
    memory = memory[first : first + size]
    if pin:
        _pin(memory)
    host = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    host.copy_(tensor.detach())
    return host


def free_memory() -> int:
    """Bytes of host memory that are free, as the system sees it."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _pin(memory: Tensor) -> None:
    """torch's own pinned memory is rounded up to a power of two; this is not."""
    global _pins
    if not _pins:
        return
    cudart = torch.cuda.cudart()
    error = int(cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if error:
        _pins = False
        logger.warning("streamed weights are copied from pageable host memory, which is slower: CUDA error %d", error)
        return
    # the storage, not this view of it, is what frees the memory
    weakref.finalize(memory.untyped_storage(), cudart.cudaHostUnregister, memory.data_ptr())
