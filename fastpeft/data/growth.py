"""How much memory files of rows take: a program of its own, which gets no more than it is told and may end for it.

    python growth.py parquet FILE MOST [FILE MOST ...]

Counted row by row: what a file says of its own size may be wrong, and a few hundred bytes may stand for gigabytes in a
single step of its reader, whose errors of memory end the process. What it prints is FINE, GROWS or an error, a line for
each file in turn; none from the one on that ended it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

FINE, GROWS = "fine", "grows"
SPARE = 2 << 30
"""Bytes for threads and libraries, which set aside addresses that they may never use."""
STEP = 1024
"""Rows that are looked at together."""


def sizes(kind: str, file: str) -> Iterator[int]:
    """Bytes of the rows in each step.

    Args:
        kind: "parquet", or "arrow" for what `datasets` saves: of that only what is not read in place counts, as what is
            compressed.
    """
    if kind == "parquet":
        from pyarrow.parquet import ParquetFile

        with ParquetFile(file) as rows:
            yield from (batch.nbytes for batch in rows.iter_batches(batch_size=STEP, use_threads=False))
        return
    import pyarrow

    before = pyarrow.total_allocated_bytes()
    with pyarrow.memory_map(file) as mapped, _opened(mapped) as batches:
        for _ in batches:
            yield max(0, pyarrow.total_allocated_bytes() - before)


@contextlib.contextmanager
def _opened(mapped: Any) -> Iterator[Iterator[Any]]:
    """Of a stream or a file of batches."""
    import pyarrow

    try:
        with pyarrow.ipc.open_stream(mapped) as stream:
            yield iter(stream)
    except pyarrow.ArrowInvalid:
        with pyarrow.ipc.open_file(mapped) as whole:
            yield (whole.get_batch(place) for place in range(whole.num_record_batches))


def _limit(more: int) -> None:
    """Of this process, where the system has such limits."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + more, hard))


def answer(kind: str, file: str, most: int) -> str:
    import pyarrow

    _limit(SPARE + 3 * most + os.path.getsize(file))  # pages and levels beside the rows that they make
    found = 0
    try:
        for size in sizes(kind, file):
            found += size
            if found > most:
                return GROWS
    except MemoryError:
        return GROWS
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        return " ".join(str(error).split())[:300] or type(error).__name__
    return FINE


def main(kind: str, *pairs: str) -> None:
    import pyarrow.parquet  # before any limit: libraries are not what is counted

    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    pyarrow.set_io_thread_count(1)
    for file, most in zip(pairs[::2], pairs[1::2], strict=True):
        print(answer(kind, file, int(most)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
