"""`python -m benchmarks.soak [--only WORK] [--share 1.0]`: the same again and again in one process, and what it holds.

10,000 training steps, 1,000 times `accelerate` and `restore`, 1,000 adapters, 100 models. Every figure of the process
must stay flat, by `flatness.growth`; the exit code is the number of those that don't. Writes record, table and figure
of docs/reliability.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fastpeft.bench.tables import insert
from fastpeft_kernels.native import native_library
from fastpeft_kernels.native.extension import group_extension

from .flatness import growth
from .reporting import figure, table
from .sampling import Sample, sample
from .works import WORKS, Work

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "cpu" / "soak.json"
PAGE, FIGURE = ROOT / "docs/reliability.md", ROOT / "docs/assets/reliability/soak.svg"
SAMPLES = 40


def measure(work: Work, units: int, samples: int = SAMPLES) -> dict[str, Any]:
    """Do so many units, and look at the process after each so many.

    Returns:
        The units done at each look, and every figure then.
    """
    group_extension(wait=True)
    native_library()
    seen: list[Sample] = []
    at: list[int] = []
    began = time.process_time()
    with tempfile.TemporaryDirectory() as place, _home(Path(place)) as folders:
        gc.collect()
        gc.freeze()  # what is there before the first unit is not looked at again and again
        try:
            for done, _ in enumerate(work(units, Path(place)), 1):
                if done * samples // units > len(seen):
                    seen.append(sample(folders))
                    at.append(done)
                    print(f"{done} of {units}", flush=True)
        finally:
            gc.unfreeze()
    return {
        "units": at,
        "figures": {name: [getattr(one, name) for one in seen] for name in Sample._fields},
        "cpu_s": round(time.process_time() - began),
    }


@contextmanager
def _home(place: Path) -> Iterator[tuple[Path, ...]]:
    """Caches and temporary files in folders of their own: other processes use the user's."""
    caches, temporary = place / "caches", place / "temporary"
    temporary.mkdir()
    before, tempfile.tempdir = tempfile.tempdir, str(temporary)
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(caches)), torch.backends.mkldnn.flags(enabled=False):
        # oneDNN keeps code for each shape that it meets, up to a thousand: nothing of ours
        try:
            yield caches, temporary
        finally:
            tempfile.tempdir = before


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--only", choices=WORKS, action="append")
    parser.add_argument("--share", type=float, default=1.0, help="of the units of each work")
    parser.add_argument("--table", action="store_true", help="run nothing; make table and figure anew from the record")
    options = parser.parse_args()
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    if not options.table:
        from fastpeft.bench.records import environment

        warnings.simplefilter("ignore")
        for name in options.only or WORKS:
            work, units = WORKS[name]
            record[name] = measure(work, round(units * options.share)) | {"environment": vars(environment("cpu"))}
            RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), table(record), "soak"), encoding="utf-8")
    figure(record, FIGURE)
    found = [growth(name, values) for one in record.values() for name, values in one["figures"].items()]
    return sum(not one.flat for one in found)


if __name__ == "__main__":
    sys.exit(main())
