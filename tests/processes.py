"""Processes forked from this one, which has imported everything already: one by itself, several in a group of gloo."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT_S = 180


class Forked:
    """One process, as subprocess.Popen has it with pipes: `work()` gives its exit code."""

    def __init__(self, work: Callable[[], int]) -> None:
        pipes = [os.pipe() for _ in range(2)]
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            signal.alarm(LIMIT_S)
            try:
                for number, (_, writing) in enumerate(pipes, start=1):
                    os.dup2(writing, number)
                sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY))
                sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
                code = work()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        for _, writing in pipes:
            os.close(writing)
        self.stdout, self.stderr = (os.fdopen(reading) for reading, _ in pipes)

    def wait(self) -> int:
        """Its exit code, negative where a signal ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def together(count: int, work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What `work(rank)` gives in each of `count` processes; raises if one of them ends otherwise."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_child, args=(rank, count, work, folder)) for rank in range(count)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(LIMIT_S)
    late = [each for each in ranks if each.is_alive()]
    for each in late:
        each.kill()
        each.join()
    codes = [each.exitcode for each in ranks]
    assert codes == [0] * count, f"exit codes {codes}"
    return [pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in range(count)]


def _child(rank: int, count: int, work: Callable[[int], Any], folder: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count))
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=count)
    (folder / f"rank{rank}").write_bytes(pickle.dumps(work(rank)))
    dist.destroy_process_group()
