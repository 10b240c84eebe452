"""`python -m benchmarks report` and `python -m benchmarks compare A B`, from a checkout.

Without one: `python -m fastpeft.bench.report`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..reading import read
from .compare import Comparison, Pair, compare
from .rows import What
from .text import number, plain
from .writing import report, stale, write


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a stale report or a regression, 2 for wrong input."""
    options = _parser().parse_args(arguments)
    try:
        return _report(options) if options.command == "report" else _compare(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Pages and comparisons made of records.")
    commands = parser.add_subparsers(dest="command", required=True)
    reports = commands.add_parser("report", help="write docs/benchmarks.md, its pictures and its page")
    reports.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of records")
    reports.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the documentation")
    reports.add_argument("--check", action="store_true", help="write nothing; exit 1 when what lies there is stale")
    compares = commands.add_parser("compare", help="what got worse between two files or folders of records")
    compares.add_argument("before", type=Path, metavar="A")
    compares.add_argument("after", type=Path, metavar="B")
    compares.add_argument("--threshold", type=_threshold, default=1.10, help="ratio from which on (default: 1.10)")
    compares.add_argument("--peer", action="append", default=[], help="only this peer's figures; repeatable")
    compares.add_argument("--json", action="store_true", help="everything as JSON")
    return parser


def _threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return value


def _report(options: argparse.Namespace) -> int:
    made = report(options.results)
    if not options.check:
        print(f"{write(made, options.docs)} files in {options.docs}")
        return 0
    different = stale(made, options.docs)
    for name in different:
        print(f"{options.docs / name}: not what the records give; run `python -m benchmarks report`")
    return 1 if different else 0


def _compare(options: argparse.Namespace) -> int:
    result = compare(read(options.before), read(options.after), options.peer)
    if options.json:
        print(json.dumps(result.to_dict(options.threshold), indent=2, allow_nan=False))
    else:
        print("\n".join(lines(result, options.threshold)))
    return 1 if any(pair.regressed(options.threshold) for pair in result.pairs) else 0


def lines(result: Comparison, threshold: float) -> list[str]:
    """What is printed: regressions first, then what got better, what cannot be said, and what else to know."""
    regressions = [pair for pair in result.pairs if pair.regressed(threshold)]
    improvements = [pair for pair in reversed(result.pairs) if pair.improved(threshold)]
    unknown = [pair for pair in result.pairs if pair.unknown(threshold)]
    rest = len(result.pairs) - len(regressions) - len(improvements) - len(unknown)
    said = _block(f"worse by more than {threshold:g}, beyond the noise", regressions)
    said += _block("better by as much", improvements)
    said += _block("past the threshold, with too few samples to know the noise", unknown)
    said.append(f"{rest} of {len(result.pairs)} figures the same, within the noise or the threshold")
    said += _alone("only in A", result.gone) + _alone("only in B", result.new)
    return said + [plain(remark) for remark in result.remarks]


def _block(title: str, pairs: Sequence[Pair]) -> list[str]:
    return [f"{title}: {len(pairs)}", *(f"  {_line(pair)}" for pair in pairs)] if pairs else []


def _line(pair: Pair) -> str:
    noise = f" ({pair.bound[0]:.2f} to {pair.bound[1]:.2f})" if pair.bound else ""
    figures = f"{number(pair.before)} -> {number(pair.after)} {plain(pair.unit, 12)}"
    return f"{pair.worse:.2f}{noise}  {plain(pair.peer, 40)}, {_words(pair.what)}: {figures}"


def _words(what: What) -> str:
    return f"{plain(what.suite, 40)}, {plain(what.op, 40)}: {plain(what.label)}"


def _alone(title: str, keys: Iterable[tuple[What, str]]) -> list[str]:
    keys = list(keys)
    shown = [f"  {plain(peer, 40)}, {_words(what)}" for what, peer in keys[:10]]
    more = [f"  and {len(keys) - 10} more"] if len(keys) > 10 else []
    return [f"{title}: {len(keys)}", *shown, *more] if keys else []
