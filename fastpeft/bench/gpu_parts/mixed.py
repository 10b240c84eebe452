"""A step on a batch whose rows have eight adapters, by whoever makes its products, beside one adapter for all rows."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from functools import partial
from typing import Any

from fastpeft.bench.recorder import Recorder

order = 40
time_limit_s = 120
needs = ("peft",)

ADAPTERS = 8


def run(recorder: Recorder, depth: str) -> None:
    _run(recorder, {"quick": 7, "default": 15, "full": 40}[depth], hidden=4096, tokens=1024)


def dry_run(recorder: Recorder, depth: str) -> None:
    _run(recorder, 1, hidden=64, tokens=16)


def _run(recorder: Recorder, rounds: int, hidden: int, tokens: int) -> None:
    methods = ["lora", "qlora"] if importlib.util.find_spec("bitsandbytes") else ["lora"]
    recorder.run_checks(
        "lora",
        ((f"mixed batch of {ADAPTERS} {m}", partial(_case, recorder, m, rounds, hidden, tokens)) for m in methods),
    )


def _case(recorder: Recorder, method: str, rounds: int, hidden: int, tokens: int) -> dict[str, float]:
    """Two layers of the width, a row of the batch for each adapter, bf16; forward and backward."""
    import torch

    import fastpeft
    from fastpeft.bench.busy import busy, keep
    from fastpeft.bench.steps import StepCase, build, make_batch
    from fastpeft.bench.timer import interleaved, ratio
    from fastpeft_kernels.lora.keys import MIXED, rank_backends
    from fastpeft_kernels.tuning.choosing import forced

    case = StepCase(
        "llama", method, torch.bfloat16, hidden, layers=2, rows=ADAPTERS, tokens=tokens, rank=16, autocast=True
    )
    model: Any = build(case, recorder.device)
    config = model.peft_config["default"]
    for index in range(1, ADAPTERS):
        model.add_adapter(f"adapter {index}", config)
    names = ["default", *(f"adapter {index}" for index in range(1, ADAPTERS))]
    batch = make_batch(case, recorder.device)
    fastpeft.accelerate(model)

    def step(mixed: bool, choice: dict[str, str]) -> None:
        several = fastpeft.mixed_batch(model, names) if mixed else nullcontext()
        chosen = forced(choice) if choice else nullcontext()
        with torch.autocast(recorder.device, torch.bfloat16), several, chosen:
            model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    steps = {"one adapter": partial(step, False, {}), "mixed": partial(step, True, {})}
    for backend in rank_backends(torch.device(recorder.device)):
        steps[f"mixed, {backend}"] = partial(step, True, {MIXED: backend})
    samples = interleaved(steps, rounds, device=recorder.device)
    add = partial(recorder.add, case=f"{case.name} {ADAPTERS} adapters", op="lora")
    for peer, times in samples.items():
        add(peer=peer, metric="step time", unit="ms", samples=times)
    if recorder.device == "cuda":
        keep(add, {peer: busy(step) for peer, step in steps.items()})
    ratios = {name.replace(", ", "_"): ratio(samples, name, "one adapter") for name in steps if name != "one adapter"}
    return {f"time_ratio_of_one_adapter{name.removeprefix('mixed')}": value for name, value in ratios.items()}
