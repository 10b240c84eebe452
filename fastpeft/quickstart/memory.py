"""Memory of a training: its peak, and what one forward keeps for its backward."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20
METHODS = {
    "cuda": "torch.cuda.max_memory_allocated",
    "cpu": "highest resident set during training minus that before",
}
_STATUS = Path("/proc/self/status")
_SAMPLING_SECONDS = 0.005


class PeakMemory:
    """A context; `mib` is what its body took at the most.

    On a GPU: `torch.cuda.max_memory_allocated`, model and all. On a CPU: by how much the process's resident set rose at
    its highest over what it was on entry, after freed memory has been given back to the system. The kernel keeps the
    highest value (VmHWM); where it does not let us reset that, a thread looks every 5 ms.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mib = 0.0
        self.method = METHODS[device.type]

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        _give_back_free_memory()
        self._before = _resident()
        self._sampler = None if _reset_highest() else _Sampler()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.mib = torch.cuda.max_memory_allocated(self.device) / MIB
            return
        highest = _status_bytes("VmHWM") if self._sampler is None else self._sampler.stop()
        self.mib = max(0, highest - self._before) / MIB


class _Sampler(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._highest, self._stopped = 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._stopped.wait(_SAMPLING_SECONDS):
            self._highest = max(self._highest, _resident())

    def stop(self) -> int:
        self._stopped.set()
        self.join()
        return max(self._highest, _resident())


def _resident() -> int:
    if _STATUS.exists():
        return _status_bytes("VmRSS")
    import psutil  # type: ignore[import-untyped]

    rss = psutil.Process().memory_info().rss
    assert isinstance(rss, int)
    return rss


def _status_bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _reset_highest() -> bool:
    """Have the kernel forget the highest resident set so far; False where it cannot or may not."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _status_bytes("VmHWM") < _resident() + MIB


def _give_back_free_memory() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # no glibc
        return


def bytes_kept_for_backward(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that one forward leaves behind for its backward.

    All storage that was made during the forward and is still alive when it has returned its loss, whoever holds it;
    parameters and buffers are left out. Nothing else may refer to the forward's outputs.

    Args:
        model: for its parameters and buffers.
        forward: one forward with gradients; returns the loss.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    with _StorageLog() as log:
        loss = forward()
        kept = sum(size for key, (ref, size) in log.made.items() if key not in own and not ref.expired())
    del loss
    return kept


class _StorageLog(TorchDispatchMode):
    """Weak references to the storage of everything that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(returned):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                # A weak reference keeps the address from being used again, so it can be a key.
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return returned
