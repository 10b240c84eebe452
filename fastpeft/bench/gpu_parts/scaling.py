"""Time and memory of a step against tokens, rows, layers, rank, vocabulary and adapters, and the largest that fit."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from fastpeft.bench.recorder import Recorder

if TYPE_CHECKING:
    from fastpeft.bench.scaling import Scales

order = 60
time_limit_s = 300
needs = ("peft",)
MEMORY_GIB = 16.0
_MOST = {"tokens": 2**18, "rows": 2**10}


def run(recorder: Recorder, depth: str) -> None:
    import torch

    from fastpeft.bench.scaling import Scales
    from fastpeft.bench.steps import StepCase

    case = StepCase(
        "llama", "lora", torch.bfloat16, hidden=4096, layers=2, rows=1, tokens=2048, words=32_000, autocast=True
    )
    sizes = {
        "tokens": (512, 1024, 2048, 4096, 8192),
        "rows": (1, 2, 4, 8),
        "layers": (1, 2, 4, 8),
        "rank": (8, 16, 64, 256),
        "vocabulary": (8_000, 32_000, 128_000, 256_000),
        "adapters": (1, 2, 4, 8),
    }
    _run(recorder, Scales(case, sizes), {"quick": 5, "default": 9, "full": 30}[depth])


def dry_run(recorder: Recorder, depth: str) -> None:
    import torch

    from fastpeft.bench.scaling import CPU, Scales
    from fastpeft.bench.steps import StepCase

    case = StepCase("llama", "lora", torch.float32, hidden=64, layers=1, rows=2, tokens=16, words=100)
    tiny = {"tokens": (16, 32, 64), "rows": (1, 2, 4), "rank": (2, 4, 8), "vocabulary": (50, 100, 200)}
    _run(recorder, Scales(case, {axis: tiny.get(axis, (1, 2, 4)) for axis in CPU.sizes}), 1)


def _run(recorder: Recorder, scales: Scales, rounds: int) -> None:
    checks = [(axis, partial(_axis, recorder, scales, axis, rounds)) for axis in scales.sizes]
    largest = [(axis, partial(_largest, recorder, scales, axis)) for axis in _MOST] if recorder.device == "cuda" else []
    recorder.run_checks("scaling", [*checks, *((f"largest {axis}", check) for axis, check in largest)])


def _axis(recorder: Recorder, scales: Scales, axis: str, rounds: int) -> dict[str, float]:
    from fastpeft.bench.report.growth import fit
    from fastpeft.bench.scaling import measure

    peaks = measure(scales, axis, rounds, recorder.add, recorder.device)
    fits = {peer: fit(points) for peer, points in peaks.items()}
    return {f"peak_exponent_{peer}": found.exponent for peer, found in fits.items() if found}


def _largest(recorder: Recorder, scales: Scales, axis: str) -> dict[str, float]:
    """By real steps."""
    from fastpeft.bench.scaling import BATCH, CONTEXT, keep_largest

    found = {peer: _most(scales, axis, peer, recorder.device) for peer in ("peft", "fastpeft")}
    keep_largest(recorder.add, scales.case, CONTEXT if axis == "tokens" else BATCH, MEMORY_GIB, found, "tried")
    return {f"{axis}_{peer}": size for peer, size in found.items()}


def _most(scales: Scales, axis: str, peer: str, device: str) -> float:
    import torch

    import fastpeft
    from fastpeft.bench.largest import fits_on_gpu, largest
    from fastpeft.bench.steps import build, make_batch

    model = build(scales.case, device)
    if peer == "fastpeft":
        fastpeft.accelerate(model)

    def step(size: int) -> None:
        batch = make_batch(scales.at(axis, size), device)
        try:
            with torch.autocast(device, torch.bfloat16, enabled=scales.case.autocast):
                model(**batch).loss.backward()
        finally:
            model.zero_grad(set_to_none=True)

    first = scales.sizes[axis][0]
    step(first)  # finds the siblings
    return largest(lambda size: fits_on_gpu(partial(step, size), MEMORY_GIB * 2**30), first, _MOST[axis])
