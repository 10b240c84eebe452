"""A layer's projections forward and backward, beside frozen products, PEFT and others."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from fastpeft.bench.recorder import Recorder

if TYPE_CHECKING:
    from fastpeft.bench.layer import Result
    from fastpeft.bench.layer_work import Case, Size

order = 70
time_limit_s = 240
needs = ("peft",)

ROUNDS = {"quick": 5, "default": 15, "full": 40}


def run(recorder: Recorder, depth: str) -> None:
    from fastpeft.bench.layer_work import Size

    _run(recorder, cases(Size()), ROUNDS[depth])


def dry_run(recorder: Recorder, depth: str) -> None:
    from fastpeft.bench.layer_work import Case, Size

    small = Size(hidden=64, intermediate=128, kv=32, rows=2, tokens=16)
    chosen = (("layer", "dense", True), ("layer", "nf4", False), ("linears", "nf4", True), ("linear", "dense", False))
    some = [Case(work, base, 8, autocast, small) for work, base, autocast in chosen]
    _run(recorder, some, 2)


def cases(size: Size) -> list[Case]:
    """What is most wanted comes first, should the time run out."""
    from fastpeft.bench.layer_work import Case

    works = (("layer", True), ("linears", True), ("linear", True), ("layer", False))
    return [
        Case(work, base, rank, with_autocast, size)
        for work, with_autocast in works
        for rank in (16, 64)
        for base in ("dense", "nf4")
    ]


def _run(recorder: Recorder, wanted: list[Case], rounds: int) -> None:
    from fastpeft.bench import layer
    from fastpeft.bench.timer import device_clock

    if importlib.util.find_spec("bitsandbytes") is None:
        print("bitsandbytes is not installed: nothing was measured over 4-bit bases")
        wanted = [case for case in wanted if case.base == "dense"]
    clock = device_clock(recorder.device)
    results: list[Result] = []

    def checks() -> Iterator[tuple[str, Callable[[], Any]]]:
        for case in wanted:
            yield case.name, partial(_case, recorder, case, rounds, clock, results)

    try:
        recorder.run_checks("layer", checks())
    finally:
        print(layer.table(results))


def _case(
    recorder: Recorder, case: Case, rounds: int, clock: Callable[[Any], float], results: list[Result]
) -> dict[str, float]:
    from fastpeft.bench import layer

    wall_rounds = min(rounds, 5) if case.work == "layer" and case.rank == 16 else 0
    result = layer.measure(case, recorder.device, rounds, wall_rounds, clock)
    results.append(result)
    add = partial(recorder.add, case=case.name, op="layer")
    settings = {
        "rank": case.rank,
        "tokens": case.size.all_tokens,
        "hidden": case.size.hidden,
        "intermediate": case.size.intermediate,
    }
    for peer, samples in result.ms.items():
        error = result.error.get(peer)
        fields = {} if error is None else {"error": error, "budget": layer.TOLERANCE}
        add(peer=peer, metric="forward and backward", unit="ms", samples=samples, settings=settings, **fields)
    for metric, unit, by_peer in (
        ("forward and backward, wall", "ms", result.wall_ms),
        ("peak memory", "MiB", result.peak_mib),
        ("kept for backward", "MiB", result.kept_mib),
    ):
        for peer, value in by_peer.items():
            add(peer=peer, metric=metric, unit=unit, samples=value, settings=settings)
    for peer, reason in result.left_out.items():
        print(f"    {peer} left out: {reason}")
        add(peer=peer, metric="left out", unit="1", samples=1.0, settings={**settings, "reason": reason})
    ours = [name for name in result.broken if name.startswith("fastpeft")]
    assert not ours, "; ".join(f"{name}: {result.left_out[name]}" for name in ours)
    ratios = {"to_products": result.ratio("fastpeft", layer.PRODUCTS), "to_peft": result.ratio("fastpeft", "peft")}
    return {name: value for name, value in ratios.items() if value is not None}
