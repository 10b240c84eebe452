"""Where the host decides: few tokens, small models, many adapters; a step beside what the GPU is busy for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fastpeft.bench.recorder import Recorder

if TYPE_CHECKING:
    from fastpeft.bench.steps import StepCase

order = 57
time_limit_s = 150
needs = ("peft",)

ADAPTERS = 8


def run(recorder: Recorder, depth: str) -> None:
    _run(recorder, {"quick": 7, "default": 15, "full": 40}[depth], small=False)


def dry_run(recorder: Recorder, depth: str) -> None:
    _run(recorder, 1, small=True)


def _run(recorder: Recorder, rounds: int, small: bool) -> None:
    checks = [(case.name, partial(_case, recorder, case, rounds, mixed)) for case, mixed in _cases(small)]
    recorder.run_checks("host", checks)


def _cases(small: bool) -> Iterator[tuple[StepCase, bool]]:
    """(case, whether rows have different adapters)."""
    import torch

    from fastpeft.bench.steps import StepCase

    bf16, fp32 = torch.bfloat16, torch.float32
    cases = [
        (StepCase("llama", "lora", bf16, hidden=4096, rows=1, autocast=True), False),
        (StepCase("llama", "qlora", bf16, hidden=4096, rows=1), False),
        (StepCase("bert", "lora", fp32, hidden=1024, rows=16, tokens=512, autocast=True), False),
        (StepCase("t5", "lora", fp32, hidden=1024, rows=16, tokens=512, autocast=True), False),
        (StepCase("llama", "lora", bf16, hidden=4096, layers=2, rows=ADAPTERS, tokens=1024, autocast=True), True),
    ]
    packs = importlib.util.find_spec("bitsandbytes") is not None
    for case, mixed in cases:
        if packs or case.method != "qlora":
            yield (replace(case, hidden=64, layers=1, tokens=16) if small else case), mixed


def _case(recorder: Recorder, case: StepCase, rounds: int, mixed: bool) -> dict[str, float]:
    from fastpeft.bench.busy import busy
    from fastpeft.bench.steps import build
    from fastpeft.bench.timer import interleaved, ratio
    from fastpeft_kernels.native.extension import group_extension

    group_extension(wait=True)
    model: Any = build(case, recorder.device)
    steps = _mixed(model, case, recorder.device) if mixed else _beside_peft(model, case, recorder.device)
    name = f"{case.name} {ADAPTERS} adapters" if mixed else case.name
    samples = interleaved(steps, rounds, device=recorder.device)
    add = partial(recorder.add, case=name, op="host")
    figures = {}
    for peer, times in samples.items():
        add(peer=peer, metric="step time", unit="ms", samples=times)
        if recorder.device == "cuda":
            found = busy(steps[peer])
            add(peer=peer, metric="busy", unit="ms", samples=found.ms)
            add(peer=peer, metric="launches", unit="1", samples=found.launches)
            figures[f"{peer.replace(' ', '_')}_busy_ms"] = found.ms
    ours, theirs = list(steps)[::-1]
    return figures | {"time_ratio": ratio(samples, ours, theirs)}


def _beside_peft(model: Any, case: StepCase, device: str) -> dict[str, Callable[[], None]]:
    import copy

    import fastpeft

    return {
        "peft": _step(model, case, device),
        "fastpeft": _step(fastpeft.accelerate(copy.deepcopy(model)), case, device),
    }


def _mixed(model: Any, case: StepCase, device: str) -> dict[str, Callable[[], None]]:
    import fastpeft

    for index in range(1, ADAPTERS):
        model.add_adapter(f"adapter {index}", model.peft_config["default"])
    names = ["default", *(f"adapter {index}" for index in range(1, ADAPTERS))]
    fastpeft.accelerate(model)
    mixed = partial(fastpeft.mixed_batch, model, names)
    return {"one adapter": _step(model, case, device), "mixed": _step(model, case, device, mixed)}


def _step(model: Any, case: StepCase, device: str, around: Callable[[], Any] = nullcontext) -> Callable[[], None]:
    import torch

    from fastpeft.bench.steps import make_batch

    batch = make_batch(case, device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=case.autocast), around():
            model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    return step
