"""Bytes of frozen weights in host memory, from where they are copied to the device ahead of each use."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("fastpeft")

PAGE = 4096
_pins = True
_pinned: set[int] = set()
"""Where pinned tensors begin. torch's own `is_pinned` asks about the beginning of the storage, which lies before."""


class Room:
    """Host memory that streamed weights may take.

    Args:
        limit: bytes; None for what is free.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.taken = limit, 0

    def has(self, nbytes: int) -> bool:
        """Whether that much may still be taken."""
        return nbytes <= (free_memory() if self.limit is None else self.limit - self.taken)

    def add(self, nbytes: int) -> None:
        """That much is taken; negative for given back."""
        self.taken += nbytes


def to_host(tensor: Tensor, room: Room) -> Tensor:
    """A contiguous tensor's values in host memory of their own, same shape and dtype.

    A tensor whose memory torch did not allocate (a file mapped into memory) stays the store itself where there is no
    room for another copy.
    """
    if is_mapped(tensor) and not room.has(tensor.nbytes):
        return tensor.detach()
    memory = torch.empty(_pages(tensor.nbytes) + PAGE, dtype=torch.uint8)
    first = -memory.data_ptr() % PAGE  # two pinned regions must not share a page
    host = memory[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    host.copy_(tensor.detach())
    room.add(tensor.nbytes)
    weakref.finalize(host, room.add, -tensor.nbytes).atexit = False
    return host


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor's memory is a file's, as far as torch tells: memory of the host that torch did not allocate."""
    return tensor.device.type == "cpu" and not tensor.untyped_storage().resizable()


@cache
def _libc() -> Any:
    return ctypes.CDLL(None)


def read_ahead(host: Tensor) -> None:
    """Have the system read a mapped file's part into memory, if it is not there; nobody waits for it."""
    advice = getattr(mmap, "MADV_WILLNEED", None)
    if advice is None or not is_mapped(host):
        return
    first = host.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = host.data_ptr() + host.nbytes - first
    _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), advice)  # advice: an error means none


def pin(host: Tensor) -> None:
    """Pin what `to_host` gave, for copies that the host does not wait for, as long as this tensor lives.

    torch's own pinned memory is rounded up to a power of two; this is not. Where the system refuses, the memory stays
    pageable, which is said once. A mapped file stays so too.
    """
    global _pins
    if not _pins or is_mapped(host) or is_pinned(host):
        return
    cudart = torch.cuda.cudart()
    error = int(cudart.cudaHostRegister(host.data_ptr(), _pages(host.nbytes), 0))
    if error:
        _pins = False
        logger.warning("streamed weights are copied from pageable host memory, which is slower: CUDA error %d", error)
        return
    _pinned.add(host.data_ptr())
    weakref.finalize(host, _unpin, cudart, host.data_ptr())


def is_pinned(host: Tensor) -> bool:
    """Whether `pin` pinned what `to_host` gave."""
    return host.data_ptr() in _pinned


def _unpin(cudart: Any, first: int) -> None:
    _pinned.discard(first)
    cudart.cudaHostUnregister(first)


def free_memory() -> int:
    """Bytes of host memory that are free, as the system sees it."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE
