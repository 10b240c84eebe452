"""`fastpeft bench`."""

from __future__ import annotations

import json
import os
import re
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastpeft.errors import RunFailed, UserError
from fastpeft.paths import can_be_made

from .shared import Quiet, Verbose, console, settle_logs

if TYPE_CHECKING:
    from fastpeft.bench.ops.case import OpCase
    from fastpeft.bench.ops.finding import Cases

EPILOG = """
Examples:

  fastpeft bench --quick

  fastpeft bench --op lora --case "Qwen3.*r=16" --peer fastpeft --peer peft --out runs/bench/ops.jsonl
"""


class Device(str, Enum):
    """What is measured."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class CaseDtype(str, Enum):
    """Dtypes in which there are cases."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def bench(
    op: Annotated[
        list[str] | None,
        typer.Option(help="What is measured; may come again. All ops if left out.", show_default=False),
    ] = None,
    case: Annotated[str, typer.Option(metavar="REGEX", help="Cases in whose name this is found.")] = "",
    peer: Annotated[
        list[str] | None, typer.Option(help="Who is measured; may come again. All if left out.", show_default=False)
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Samples of each time; 15, 5 or 40 as the depth is, if left out.", show_default=False),
    ] = None,
    device: Annotated[Device, typer.Option(help="auto: the GPU, where there is one.")] = Device.auto,
    dtype: Annotated[CaseDtype | None, typer.Option(help="Cases of this dtype alone.", show_default=False)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few small cases, in seconds.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Every case.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="A JSON Lines file, to which records are added as they are measured.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every record as JSON.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure ops beside PyTorch, PEFT and other libraries on this machine.

    Every peer's outputs and gradients are first held against float64; one that is off by more than twice PyTorch's own
    error is marked, by more than four times gets no time. The others are timed in turn, round by round, forward,
    backward and both. The table shows for each also what share of the machine's measured ceilings is reached, and its
    peak memory. Ctrl-C keeps what is there.

    Exits with 1 if fastpeft's own numbers are off. Let nothing else run meanwhile.
    """
    if quick and full:
        raise UserError("--full: expected one of --quick and --full, got both")
    import torch

    from fastpeft.bench.ops.finding import ops
    from fastpeft.bench.ops.run import Runner
    from fastpeft.bench.ops.table import table
    from fastpeft.bench.recorder import Recorder
    from fastpeft.bench.records import RecordFile, environment

    settle_logs(verbose, quiet)
    there = torch.cuda.is_available()
    if device is Device.cuda and not there:
        raise UserError("--device: expected 'cpu', got 'cuda', but torch sees no GPU")
    where = device.value if device is not Device.auto else "cuda" if there else "cpu"
    depth = "quick" if quick else "full" if full else "default"
    found = ops()
    chosen = _cases(found, op or list(found), where, depth, case, None if dtype is None else dtype.value, peer or [])
    if out is not None and (out.is_dir() or not can_be_made(out.parent)):
        raise UserError(f"--out: expected a file that can be written, got {str(out)!r}")
    say = partial(console(quiet).print, highlight=False, markup=False, soft_wrap=True)
    for name, (words, _) in found.items():
        say(f"{'*' if any(each.op == name for each in chosen) else ' '} {name:12} {words}")
    recorder = Recorder(RecordFile(out or os.devnull, environment(where)), "bench", where, depth)
    runner = Runner(recorder.add, where, depth, rounds, peer or [], say)
    try:
        runner.run(chosen)
    finally:
        records = runner.outcome.records
        print(json.dumps([each.to_dict() for each in records], indent=1) if as_json else table(records))
    if runner.outcome.failures:
        raise RunFailed("; ".join(runner.outcome.failures))
    if not any(record.metric == "time" for record in runner.outcome.records):
        raise RunFailed("nothing could be measured")


def _cases(
    found: dict[str, tuple[str, Cases]],
    names: list[str],
    device: str,
    depth: str,
    pattern: str,
    dtype: str | None,
    peers: list[str],
) -> list[OpCase]:
    """The cases asked for. Raises UserError where there is none, or where a name is not known."""
    for name in names:
        if name not in found:
            raise UserError(f"--op: expected one of {', '.join(found)}, got {name!r}")
    try:
        matches = re.compile(pattern).search
    except re.error as error:
        raise UserError(f"--case: expected a regular expression, got {pattern!r}: {error}") from error
    every = [case for name in names for case in found[name][1](device, depth)]
    named = [case for case in every if matches(case.name)]
    if not named:
        raise UserError(f"--case: expected what is found in a case's name, such as {every[0].name!r}, got {pattern!r}")
    dtypes = dict.fromkeys(str(case.dtype).removeprefix("torch.") for case in named)
    if dtype is not None and dtype not in dtypes:
        raise UserError(f"--dtype: expected one that these cases have, {' or '.join(dtypes)}, got {dtype!r}")
    known = dict.fromkeys(["torch", *(peer for case in named for peer in case.peers)])
    for peer in peers:
        if peer not in known:
            raise UserError(f"--peer: expected one that these cases have, {', '.join(known)}, got {peer!r}")
    return [case for case in named if dtype is None or str(case.dtype) == f"torch.{dtype}"]
