"""Several processes with a default group of gloo, forked from this one, which has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT_S = 180


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
