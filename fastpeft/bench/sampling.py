"""Which Python functions a program is in, by looking at its threads some thousand times a second."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_INTERVAL_S = 5e-4
_WAITING = ("_engine_run_backward", "synchronize")  # meanwhile another thread works, or the GPU


class Samples:
    """How often each function was the innermost one, and how often it was in the stack at all."""

    def __init__(self) -> None:
        self.count = 0
        self.innermost: Counter[str] = Counter()
        self.in_stack: Counter[str] = Counter()

    def add(self, frame: FrameType) -> None:
        """One sample of a thread that is in `frame`; none where it only waits for others."""
        if frame.f_code.co_name in _WAITING:
            return
        stack = list(_names(frame))
        self.count += 1
        self.innermost[stack[0]] += 1
        self.in_stack.update(set(stack))

    def shares(self) -> dict[str, tuple[float, float]]:
        """By function: its share of all samples as the innermost one, and in the stack."""
        return {name: (self.innermost[name] / self.count, n / self.count) for name, n in self.in_stack.items()}


@contextmanager
def sampled() -> Iterator[Samples]:
    """Samples this thread, and those that begin meanwhile: autograd's run the backward pass of a GPU."""
    samples, over = Samples(), threading.Event()
    before = set(sys._current_frames()) - {threading.get_ident()}

    def sample() -> None:
        before.add(threading.get_ident())
        while not over.wait(_INTERVAL_S):
            for ident, frame in sys._current_frames().items():
                if ident not in before:
                    samples.add(frame)

    thread, interval = threading.Thread(target=sample, daemon=True), sys.getswitchinterval()
    sys.setswitchinterval(_INTERVAL_S / 5)  # else mostly those are seen that hand Python's lock over by themselves
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval)


def _names(frame: FrameType | None) -> Iterator[str]:
    """From the innermost out: file with its folder, and function."""
    while frame is not None:
        yield f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}: {frame.f_code.co_name}"
        frame = frame.f_back
