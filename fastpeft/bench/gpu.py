"""`make gpu`: every check and benchmark that needs a GPU, in one run.

A part is a module of `fastpeft.bench.gpu_parts`, light to import, with

- `order: int`, parts run by it; `time_limit_s: int`, after which the part is killed;
- `run(recorder, depth)`, which measures and raises where something is wrong; depth is "quick", "default" or "full";
- optionally `dry_run(recorder, depth)`: the same on a CPU, on small stand-ins;
- optionally `parallel = True`, where no times count and all work is in checks given to the recorder: several processes
  then share these, as many as --jobs says, because most of their time goes to compiling kernels.

Its name is `name` if it has one, else the module's. Each part runs in a process of its own, so that one that crashes or
hangs costs only itself. What it measured goes to OUT/<part>.jsonl at once, what it printed to OUT/<part>.log, and what
became of it to OUT/run.json. All parts share --total seconds; a part for which less than a minute is left is skipped.
--resume goes on with what is missing: parts that did not pass, without their checks that did.

Exit code: 0 when all parts passed, 1 when one did not or was not reached, 2 when there is no GPU or no package
that all need, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastpeft.bench.parts import GO_ON, OUT_OF_TIME, Outcome, Part, Run, discover, run_part
from fastpeft.bench.records import source_state
from fastpeft.bench.supervising import Budget, supervise
from fastpeft.hints import nearest
from fastpeft.requirements import missing

DEPTHS = ("quick", "default", "full")
TOTAL_S = {"quick": 600.0, "default": 1200.0}
_ASK_GPU = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    parts = discover(options.parts)
    if options.run_part:  # the child process of one part
        part, share = parts[options.run_part], tuple(options.share)
        return run_part(part, options.out, options.depth, options.dry_run, options.commit, share, options.checks)
    chosen = _chosen(parser, parts, options.only)
    if options.list:
        print(
            "\n".join(f"{part.name:24} limit {part.time_limit_s:5} s  {part.summary or part.broken}" for part in chosen)
        )
        return 0
    gpu = "" if options.dry_run else gpu_name()
    if not (gpu or options.dry_run):
        print("No NVIDIA GPU that torch can use was found: nothing was run. --dry-run tries the parts on the CPU.")
        return 2
    if absent := missing():
        print(f"Not installed, and needed everywhere: {', '.join(absent)}: nothing was run.")
        return 2
    aside = "runs/gpu-dry-run" if options.dry_run else "runs/gpu-checks" if options.checks else ""
    out = options.out or Path(aside or f"benchmarks/results/{slug(gpu)}")
    commit = options.commit or source_state()[0]
    earlier = options.earlier or Path("benchmarks/results", slug(gpu))
    run = Run(out, options.depth, options.dry_run, commit, options.parts, options.jobs, options.checks, earlier)
    print(f"{len(chosen)} parts on {gpu or 'the CPU (dry run)'}, depth {options.depth}, into {out}", flush=True)
    limited = [replace(part, time_limit_s=min(part.time_limit_s, options.limit)) for part in chosen]
    unlimited = float("inf") if options.dry_run else TOTAL_S.get(options.depth, float("inf"))
    outcomes, interrupted = _run_all(run, limited, options.total or unlimited, options.resume)
    print(table(outcomes))
    return 130 if interrupted else int(any(outcome.wrong for outcome in outcomes))


def _run_all(run: Run, parts: Sequence[Part], total_s: float, resume: bool) -> tuple[list[Outcome], bool]:
    """What became of the parts, and whether an interruption kept the rest from their turn."""
    outcomes: list[Outcome] = []
    earlier = {part.name: run.earlier_outcome(part.name) for part in parts} if resume else {}
    passed = {name: outcome for name, outcome in earlier.items() if outcome and outcome.status == "passed"}
    budget = Budget(total_s)
    for i, part in enumerate(parts):
        if part.name in passed:
            print(f"{part.name}: done before", flush=True)
            outcomes.append(passed[part.name])
            continue
        seconds = budget.seconds(part, [later for later in parts[i + 1 :] if later.name not in passed])
        try:
            outcomes.append(_run(run, part, seconds, resume))
        except KeyboardInterrupt:
            outcomes.append(run.keep(run.outcome(part.name, "interrupted", 0.0, GO_ON)))
            return outcomes, True
    return outcomes, False


def _run(run: Run, part: Part, seconds: float | None, resume: bool) -> Outcome:
    earlier = run.earlier_outcome(part.name)
    if seconds is None:
        print(f"{part.name}: skipped: {OUT_OF_TIME}", flush=True)
        outcome = run.outcome(part.name, "skipped", 0.0, OUT_OF_TIME)
        return outcome if earlier else run.keep(outcome)  # what it has may be gone on with
    print(f"{part.name}: started {time.strftime('%H:%M:%S')}, limit {seconds:.0f} s", flush=True)
    run.keep(run.outcome(part.name, "interrupted", 0.0, GO_ON))  # should this process be killed
    outcome = run.keep(supervise(run, replace(part, time_limit_s=seconds), resume and earlier is not None))
    print(f"{part.name}: {outcome.status} after {outcome.seconds:.0f} s {outcome.reason}".rstrip(), flush=True)
    if outcome.status in ("failed", "timed out"):
        print(run.end_of_log(part.name), flush=True)
    return outcome


def table(outcomes: Sequence[Outcome]) -> str:
    """One line a part."""
    width = max(len(outcome.name) for outcome in outcomes)
    lines = [f"{'part':{width}}  {'status':11}  seconds  records"]
    lines += [
        f"{o.name:{width}}  {o.status:11}  {o.seconds:7.0f}  {o.records:7}  {o.reason}".rstrip() for o in outcomes
    ]
    return "\n".join(lines)


def gpu_name() -> str:
    """Name of torch's current GPU, or "". Asked in another process, so that this one takes no GPU memory."""
    done = subprocess.run([sys.executable, "-c", _ASK_GPU], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def slug(name: str) -> str:
    """A folder's name for a GPU: "NVIDIA H200" becomes "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _chosen(parser: argparse.ArgumentParser, parts: dict[str, Part], only: list[str] | None) -> list[Part]:
    for name in only or ():
        if name not in parts:
            near = nearest(name, parts)
            parser.error(f"--only: expected one of {', '.join(parts)}, got {name}" + (f"; {near}?" if near else ""))
    return [part for name, part in parts.items() if not only or name in only]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastpeft.bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", choices=DEPTHS, default="default")
    parser.add_argument("--only", action="append", metavar="PART", help="run this part; may be given more than once")
    parser.add_argument("--checks", default="", metavar="REGEX", help="only checks in whose name this is found")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="by default benchmarks/results/<name of the GPU>, for a whole run, else a folder in runs/",
    )
    parser.add_argument(
        "--earlier",
        type=Path,
        metavar="DIR",
        help="records of earlier runs, whose checks come last; by default benchmarks/results/<name of the GPU>",
    )
    parser.add_argument("--resume", action="store_true", help="only what has not passed at this depth and commit")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, those parts that have a stand-in")
    parser.add_argument("--list", action="store_true", help="list the parts and stop")
    parser.add_argument("--commit", help="recorded in place of what git says, as for a copied tree")
    parser.add_argument("--parts", default="fastpeft.bench.gpu_parts", metavar="PACKAGE", help="package of the parts")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes that share checks")
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="S", help="at most S seconds a part")
    parser.add_argument(
        "--total",
        type=float,
        metavar="S",
        help="at most S seconds in all; by default 600 for quick, 1200 for default, no limit for full or a dry run",
    )
    parser.add_argument("--run-part", metavar="PART", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
