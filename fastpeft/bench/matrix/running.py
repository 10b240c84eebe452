"""Cells in processes of their own, forked from one that has imported everything: a crash costs one family."""

from __future__ import annotations

import logging
import multiprocessing
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch

from ..records import Environment, RecordFile, environment, load
from .cells import BASES, CHOSEN, EXPERTS, Cell, Outcome, run
from .families import FAMILIES, batch
from .kept import PACKAGES, cell_of, keep

LIMIT_S = 120.0
"""Of one family over one base with one method."""


def here() -> Environment:
    """This machine, with the versions that matter."""
    found = environment("cpu")
    return replace(found, versions={name: v for name, v in found.versions.items() if name in PACKAGES})


def parts(chosen: Sequence[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    """What one process does: every family with the first method over the first base, over the second, and so on."""
    methods = (*CHOSEN, EXPERTS)
    in_order = sorted(chosen, key=lambda cell: (methods.index(cell.method), BASES.index(cell.base)))  # stable
    for (family, _, _), mine in groupby(in_order, lambda cell: (cell.family, cell.base, cell.method)):
        yield family, list(mine)


def run_all(chosen: Sequence[Cell], out: Path, seconds: float = float("inf"), limit_s: float = LIMIT_S) -> int:
    """Run cells one process after the other and append their records to `out`; returns how many were left undone.

    Args:
        chosen: in any order.
        out: a file of records.
        seconds: after these no process is started.
        limit_s: a process is killed then, and its cells are recorded as broken.
    """
    file = RecordFile(out, here())
    torch.set_num_threads(1)
    _warm()
    end = time.monotonic() + seconds
    context = multiprocessing.get_context("fork")
    left = len(chosen)
    for family, mine in parts(chosen):
        if time.monotonic() >= end:
            break
        process = context.Process(target=_child, args=(family, mine, file))
        process.start()
        process.join(limit_s)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        reason = f"killed after {limit_s:.0f} s" if code is None else f"the process ended with code {code}"
        done = {cell_of(record) for record in load(out)} if out.exists() else set()
        for cell in mine:
            if cell not in done:
                keep(file, cell, Outcome("broken", reason))
        left -= len(mine)
    return left


def _child(family: str, chosen: list[Cell], file: RecordFile) -> None:
    for cell, outcome in run(FAMILIES[family], chosen):
        record = keep(file, cell, outcome)
        share = f"{outcome.served.fused} of {outcome.served.layers}"
        print(f"{record.case:64} {record.metric} {share} {outcome.reason}", flush=True)


def _warm() -> None:
    """What would cost every process seconds: imports, and what is made at the first forward. No backward: after one,
    torch forks no more where it has a GPU."""
    import torch._dynamo
    import transformers
    from peft import LoraConfig, get_peft_model

    import fastpeft
    from fastpeft_kernels.native.extension import group_extension

    group_extension(wait=True)  # its thread must not be at work when a process is forked
    transformers.logging.set_verbosity_error()
    logging.getLogger("fastpeft").setLevel(logging.ERROR)  # what is not served, the record says
    warnings.simplefilter("ignore")
    model = FAMILIES["llama"].build()
    inputs = batch(model)
    adapted = fastpeft.accelerate(get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"])))  # type: ignore[arg-type]
    with torch.no_grad():
        adapted(**inputs)
