"""`python -m fastpeft_kernels.aot`: compile every kernel for every supported GPU, with none present.

Exits with 1 when a kernel breaks a rule of `fastpeft_kernels.common.aot`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from .common.aot import TARGETS, AotCase, AotResult, collect, compile_case, select

_HEADER = ("kernel", "target", "registers", "spills", "stack", "shared", "seconds", "verdict")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastpeft_kernels.aot", description=__doc__)
    parser.add_argument("--targets", type=_targets, default=TARGETS, help="such as sm_80,sm_90; all by default")
    parser.add_argument("--default-only", action="store_true", help="leave out configurations that only tuning picks")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; one per core by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE too")
    options = parser.parse_args(arguments)

    results = compile_all(options.targets, options.default_only, options.jobs)
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    bad = [result for result in results if result.problems]
    for result in bad:
        print(f"{result.family}.{result.case} on sm_{result.target}: {'; '.join(result.problems)}")
    skipped = sum(bool(result.skipped) for result in results)
    print(f"{len(results) - skipped} compiled, {skipped} skipped, {len(bad)} in breach of a rule")
    return 1 if bad or not results else 0


def compile_all(targets: tuple[int, ...], default_only: bool, jobs: int) -> list[AotResult]:
    """Compile the selected cases in `jobs` processes; results in the order of the cases."""
    work = [(family, case.name, target) for family, case, target in select(targets, default_only)]
    if jobs <= 1 or len(work) <= 1:
        return [_compile_named(item) for item in work]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_compile_named, work))


@lru_cache(maxsize=1)
def _collected() -> dict[tuple[str, str], AotCase]:
    return {(family, case.name): case for family, cases in collect().items() for case in cases}


def _compile_named(item: tuple[str, str, int]) -> AotResult:
    family, name, target = item
    return compile_case(family, _collected()[family, name], target)


def table(results: Iterable[AotResult]) -> str:
    """The results as aligned plain text."""
    rows = [_HEADER, *(_row(result) for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    return "\n".join(_aligned(row, widths) for row in rows)


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    text = {0, 1, len(_HEADER) - 1}
    cells = (cell.ljust(widths[i]) if i in text else cell.rjust(widths[i]) for i, cell in enumerate(row))
    return "  ".join(cells).rstrip()


def _row(result: AotResult) -> tuple[str, ...]:
    name, target = f"{result.family}.{result.case}", f"sm_{result.target}"
    if result.skipped:
        return (name, target, *[""] * 5, f"skipped: {result.skipped}")
    figures = (result.registers, result.spill_stores + result.spill_loads, result.stack, result.shared)
    verdict = "FAILED" if result.problems else "ok" if result.default else "ok (tuning only)"
    return (name, target, *map(str, figures), f"{result.seconds:.1f}", verdict)


def _targets(text: str) -> tuple[int, ...]:
    known = {f"sm_{target}": target for target in TARGETS}
    names = text.split(",")
    if wrong := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, got {','.join(wrong)}")
    return tuple(known[name] for name in names)


if __name__ == "__main__":
    sys.exit(main())
