"""Peak memory of a training."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from types import TracebackType

import torch

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


def peak_of_step(step: Callable[[], object], device: str = "cuda") -> int:
    """Bytes of torch's allocator that a step takes at the most beside what lies there before.

    On a CPU from the profiler's record of allocations, with buffers that fastpeft keeps from call to call counted in.
    """
    if device != "cuda":
        return _peak_on_cpu(step)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


@contextmanager
def limited(device: str, size: int) -> Iterator[None]:
    """So many bytes for this process, as torch's allocator on the GPU sees to; as many as there are on a CPU."""
    if device != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _peak_on_cpu(step: Callable[[], object]) -> int:
    from torch.profiler import ProfilerActivity, profile

    from fastpeft_kernels.common.scratch import release_scratch

    release_scratch()
    collects = gc.isenabled()
    gc.disable()  # what others left must not be freed meanwhile
    try:
        with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
    finally:
        if collects:
            gc.enable()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    taken = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max([0, *taken])


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Without the lines that the profiler's C++ writes there at its beginning and end."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


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
