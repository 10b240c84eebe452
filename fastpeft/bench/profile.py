"""Where the time of a training step goes, plain PEFT's and fastpeft's: Python functions, torch's operators, kernels.

Python is sampled while nothing else is measured, since torch's profiler slows the host down; the profiler looks at a
second run of the same steps. For each case and peer DIR gets a trace, which https://ui.perfetto.dev shows, and
`profile.jsonl` a line.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from .busy import counted
from .gpu_parts.steps import step_cases
from .sampling import sampled
from .steps import StepCase, build, make_batch, step_loss, train

_SHOWN = 12
_KEPT = 60


@dataclasses.dataclass(frozen=True)
class Profile:
    """Of one step, means over several.

    Attributes:
        wall_ms: while Python was sampled.
        busy_ms, launches: of the GPU; zero on a CPU.
        functions: by name, share of the samples in which Python was in this function, and in this or one it called.
        operators: by name, milliseconds of the host in torch's operator without what that calls, and calls.
        kernels: by name, milliseconds on the GPU, and calls.
    """

    wall_ms: float
    busy_ms: float
    launches: float
    functions: dict[str, tuple[float, float]]
    operators: dict[str, tuple[float, float]]
    kernels: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        lines = [f"{self.wall_ms:.1f} ms a step, GPU busy for {self.busy_ms:.1f} ms by {self.launches:.0f} launches"]
        for title, rows in (
            (
                "Python, % itself and with what it calls",
                {n: (100 * a, 100 * b) for n, (a, b) in self.functions.items()},
            ),
            ("torch's operators, ms of the host itself, calls", self.operators),
            ("kernels, ms, calls", self.kernels),
        ):
            if rows:
                lines.append(f"  {title}")
                lines += [f"    {a:8.2f} {b:8.1f}  {name[:90]}" for name, (a, b) in list(rows.items())[:_SHOWN]]
        return "\n".join(lines)


def profile_step(step: Callable[[], object], steps: int, device: str, trace: Path) -> Profile:
    """Profile `steps` calls twice, after one that does not count.

    Args:
        step: one training step.
        steps: calls of each run.
        device: "cuda" waits for the GPU, and profiles it too.
        trace: file for the profiler's trace, compressed if it ends in ".gz".
    """
    from torch.profiler import ProfilerActivity

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    step()
    wait()
    with sampled() as samples:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        wall_ms = (time.perf_counter() - start) / steps * 1e3
    with torch.profiler.profile(
        activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    ) as profiler:
        for _ in range(steps):
            step()
        wait()
    profiler.export_chrome_trace(str(trace))
    gpu = counted(profiler.profiler.kineto_results.events())
    rows = profiler.key_averages()
    return Profile(
        wall_ms,
        gpu.ms / steps,
        gpu.launches / steps,
        _largest(samples.shares()),
        _largest({row.key: (row.self_cpu_time_total / steps / 1e3, row.count / steps) for row in rows}),
        _largest({row.key: (row.self_device_time_total / steps / 1e3, row.count / steps) for row in rows}),
    )


def _largest(rows: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    ordered = sorted(rows.items(), key=lambda row: row[1], reverse=True)
    return {name: values for name, values in ordered[:_KEPT] if values[0] > 0}


def _peers(case: StepCase, device: str) -> dict[str, Callable[[], object]]:
    import fastpeft
    from fastpeft_kernels.native.extension import group_extension

    group_extension(wait=True)
    loss = partial(step_loss, batch=make_batch(case, device), case=case, device=device)
    model = build(case, device)
    return {
        "peft": partial(train, model, loss),
        "fastpeft": partial(train, fastpeft.accelerate(copy.deepcopy(model)), loss),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastpeft.bench.profile", description=__doc__)
    parser.add_argument("--only", action="append", metavar="TEXT", help="cases whose name holds it; --list shows all")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    parser.add_argument("--steps", type=int, default=10, help="of each run (default 10)")
    parser.add_argument("--out", type=Path, default=Path("profile"), metavar="DIR", help="default: profile")
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [case for case in step_cases(small=device == "cpu") if not case.compiled]
    cases = [case for case in cases if not given.only or any(text in case.name for text in given.only)]
    if given.list:
        print(*(case.name for case in cases), sep="\n")
        return 0
    if not cases or not given.only:
        parser.error("--only: expected a part of a case's name, of which --list shows all")
    given.out.mkdir(parents=True, exist_ok=True)
    for case in cases:
        for peer, step in _peers(case, device).items():
            trace = given.out / f"{case.name.replace(' ', '-')}-{peer}.json.gz"
            found = profile_step(step, given.steps, device, trace)
            with (given.out / "profile.jsonl").open("a") as file:
                file.write(json.dumps({"case": case.name, "peer": peer, **dataclasses.asdict(found)}) + "\n")
            print(f"\n{case.name}, {peer}: {found}\n  {trace}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
