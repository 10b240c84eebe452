"""What a process holds: its memory, Python's objects, what torch and we register, and what the system counts of it."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import weakref
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module

_CONTAINERS = (dict, list, set, deque, weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)  # fmt: skip


class Sample(NamedTuple):
    """At one moment, behind `gc.collect` and glibc's `malloc_trim`.

    Attributes:
        resident_kib: of the process, in memory.
        heap_kib: that glibc's allocator has given out: tensors, and what C++ keeps.
        blocks: that Python's allocator has given out.
        objects: that Python's collector watches; those that were frozen do not count, nor do their tensors and hooks.
        tensors: among them.
        hooks: on all modules that live, and on all modules as such.
        registered: entries of all containers and caches at the top of our modules; finalizers.
        descriptors: open files and the like.
        threads: of the process.
        cache_kib: in the folders that are given.
    """

    resident_kib: float
    heap_kib: float
    blocks: float
    objects: float
    tensors: float
    hooks: float
    registered: float
    descriptors: float
    threads: float
    cache_kib: float


def sample(folders: tuple[Path, ...]) -> Sample:
    """Of this process, on Linux with glibc.

    Args:
        folders: of caches; those that are not there hold nothing.
    """
    for _ in range(3):  # what finalizers let go of, too
        gc.collect()
    _LIBC.malloc_trim(0)
    heap, blocks = _heap_kib(), sys.getallocatedblocks()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024
    descriptors, threads = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task"))
    objects = gc.get_objects()
    count = len(objects)
    tensors = hooks = 0
    for one in objects:
        kind = type(one)  # isinstance would ask some of them for their class
        tensors += issubclass(kind, torch.Tensor)
        hooks += sum(len(getattr(one, name)) for name in _HOOKS) if issubclass(kind, nn.Module) else 0
    hooks += sum(len(value) for name, value in vars(torch_module).items() if name.startswith("_global_") and value)
    del objects
    kept = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()) / 1024
    return Sample(
        resident, heap, blocks, count, tensors, hooks, sum(_registered()), descriptors - 1, threads, kept
    )  # fmt: skip


def _registered() -> Iterator[int]:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("fastpeft", "fastpeft_kernels"):
            for variable, value in vars(module).items():
                if variable.startswith("__"):
                    continue
                if isinstance(value, _CONTAINERS):
                    yield len(value)
                elif callable(info := getattr(value, "cache_info", None)):
                    yield info().currsize
    yield len(weakref.finalize._registry)  # type: ignore[attr-defined]


_MALLINFO = (
    "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
)  # fmt: skip


class _Mallinfo(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in _MALLINFO)


_LIBC: Any = ctypes.CDLL("libc.so.6")
_LIBC.mallinfo2.restype = _Mallinfo


def _heap_kib() -> float:
    info = _LIBC.mallinfo2()
    return float(info.uordblks + info.hblkhd) / 1024
