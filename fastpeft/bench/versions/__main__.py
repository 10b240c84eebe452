"""The tests of the seams to transformers, peft, accelerate, bitsandbytes and TRL, over their supported versions.

python -m fastpeft.bench.versions --only transformers

Makes an environment a leg in --folder, runs the tests in it, and appends a record to --out. In the end the records go
into the committed record, and its table into the page. Ends with code 1 if a test failed. Needs a checkout and a
package index; torch is the installed one, but in the legs of torch, which take several gigabytes of downloads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..records import Record, append, load
from ..tables import insert
from .environments import ROOT, releases
from .legs import FLOORS, Leg, legs, names
from .page import versions_table
from .running import LIMIT_S, outcome, run_leg, torch_of

NAME = "versions"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not any(options.only in name for name in names()):
        parser.error(f"--only: expected a part of {', '.join(names())}, got {options.only!r}")
    now: list[Record] = []
    if not options.table:
        if not options.resume:
            options.out.unlink(missing_ok=True)
        for leg in chosen(options.only, done=_load(options.out)):
            print(
                f"\n== {leg.name}: {', '.join(f'{name} {version}' for name, version in leg.versions.items())}",
                flush=True,
            )
            record = run_leg(leg, options.folder, options.out, limit_s=options.limit)
            print(f"{record.metric} {record.settings['reason']}", flush=True)
        now = _load(options.out)
    kept = merged(_load(options.record), now)
    if now:
        fresh = options.record.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        for record in kept:
            append(fresh, record)
        fresh.replace(options.record)
    text = options.page.read_text(encoding="utf-8")
    options.page.write_text(insert(text, versions_table(kept), NAME), encoding="utf-8")
    failed = [f"{record.case}: {test}" for record in now for test in outcome(record).failed]
    print(*failed, sep="\n")
    return 0 if all(outcome(record).good for record in now) else 1


def chosen(only: str, done: Sequence[Record]) -> list[Leg]:
    """The legs whose name holds `only`, without those that were done with the same versions."""
    every = legs({name: releases(name) for name in (*FLOORS, "torch")})
    before = [(record.case, record.settings["versions"]) for record in done]
    return [leg for leg in every if only in leg.name and (leg.name, leg.versions) not in before]


def merged(before: Sequence[Record], now: Sequence[Record]) -> list[Record]:
    """The newest record of each leg and torch, in the order of the legs; legs that no longer exist are left out."""
    found = {(record.case, torch_of(record.environment)): record for record in [*before, *now]}
    return [record for name in names() for (case, _), record in sorted(found.items()) if case == name]


def _load(path: Path) -> list[Record]:
    return load(path) if path.exists() else []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastpeft.bench.versions", description=__doc__)
    parser.add_argument("--only", default="", help='legs whose name holds this text: "transformers", "all at their"')
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv" / "legs", help="of the environments")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/versions.jsonl"))
    parser.add_argument(
        "--record", type=Path, default=Path("benchmarks/results/cpu/versions.jsonl"), help="the committed"
    )
    parser.add_argument("--page", type=Path, default=Path("docs/reference/coverage.md"), help="document of the table")
    parser.add_argument("--resume", action="store_true", help="go on with the legs that --out has not")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds of a leg's tests")
    parser.add_argument("--table", action="store_true", help="run nothing; make the table anew from the record")
    return parser


if __name__ == "__main__":
    sys.exit(main())
