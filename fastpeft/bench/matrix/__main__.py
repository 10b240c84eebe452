"""Every family of transformers in the matrix, held against plain PEFT and against the committed record.

python -m fastpeft.bench.matrix --only "llama: LoRA over dense"

Runs the cells and writes a record each to --out as it goes. Cells that were served or equal to PEFT in the committed
record and are no longer end it with code 1, and are named; otherwise, or with --accept, the cells go into the record
and its table into the page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..records import Record, append, load
from ..tables import insert
from .cells import cells
from .families import FAMILIES
from .kept import cell_of, lost
from .page import matrix_table
from .running import LIMIT_S, run_all

NAME = "matrix"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    before = load(options.record) if options.record.exists() else []
    if not options.table:
        if not options.resume:
            options.out.unlink(missing_ok=True)
        done = load(options.out) if options.out.exists() else []
        skipped = {cell_of(record) for record in [*done, *(before if options.missing else [])]}
        chosen = [c for name in FAMILIES for c in cells(name) if options.only in str(c) and c not in skipped]
        left = run_all(chosen, options.out, options.seconds, options.limit)
        now = load(options.out) if options.out.exists() else []
        missed = lost(before, now)
        for line in missed:
            print(f"lost: {line}")
        print(f"{len(now)} cells done, {left} left, {len(missed)} lost")
        if missed and not options.accept:
            return 1
        before = _kept(options.record, before, now)
    text = options.page.read_text(encoding="utf-8")
    options.page.write_text(insert(text, matrix_table(before), NAME), encoding="utf-8")
    return 0


def _kept(path: Path, before: list[Record], now: list[Record]) -> list[Record]:
    """The record with the new cells in it, in the order of the families."""
    found = {cell_of(record): record for record in [*before, *now]}
    ordered = [found[cell] for name in FAMILIES for cell in cells(name) if cell in found]
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    for record in ordered:
        append(fresh, record)
    if ordered:
        fresh.replace(path)
    return ordered


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastpeft.bench.matrix", description=__doc__)
    parser.add_argument("--only", default="", help="cells whose name, FAMILY: METHOD over BASE, MODE, holds this text")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/matrix.jsonl"))
    parser.add_argument(
        "--record", type=Path, default=Path("benchmarks/results/cpu/matrix.jsonl"), help="the committed"
    )
    parser.add_argument("--page", type=Path, default=Path("docs/reference/coverage.md"), help="document of the table")
    parser.add_argument("--resume", action="store_true", help="go on with the cells that --out has not")
    parser.add_argument("--missing", action="store_true", help="only the cells that the committed record has not")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no process after so many")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds of a process, a family with one method")
    parser.add_argument("--accept", action="store_true", help="take the cells into the record although some lost")
    parser.add_argument("--table", action="store_true", help="run nothing; make the table anew from the record")
    return parser


if __name__ == "__main__":
    sys.exit(main())
