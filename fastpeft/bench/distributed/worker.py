"""The legs of one number of processes, in one of them: `torchrun ... -m fastpeft.bench.distributed.worker FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from .legs import LEGS
from .training import train


def main(folder: Path) -> None:
    """Write what each leg gave to FOLDER/N.json, of N processes; torchrun says how many there are."""
    torch.set_num_threads(1)
    rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if processes > 1:
        dist.init_process_group("gloo")
    found = [train(leg, rank, folder) for leg in LEGS if leg.processes == processes]
    if rank == 0:
        (folder / f"{processes}.json").write_text(json.dumps(found))
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
