"""Training steps of fastpeft beside plain PEFT (and bitsandbytes) on whole small models, verified first."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from fastpeft.bench.recorder import Recorder

if TYPE_CHECKING:
    from fastpeft.bench.steps import StepCase

order = 55
time_limit_s = 480
needs = ("peft",)


def run(recorder: Recorder, depth: str, small: bool = False) -> None:
    cases: Iterable[StepCase] = step_cases(small)
    if small and depth == "quick":  # compiling for a CPU takes longer than all else
        cases = (case for case in cases if not case.compiled)
    recorder.run_checks("lora", ((case.name, partial(_case, recorder, case, depth)) for case in cases))


dry_run = partial(run, small=True)


def step_cases(small: bool) -> Iterator[StepCase]:
    """One of each kind first, should the time run out. `small` is for a CPU."""
    import torch

    from fastpeft.bench.steps import StepCase

    bf16, fp32 = torch.bfloat16, torch.float32
    cases = [
        StepCase("llama", "lora", fp32, autocast=True),
        StepCase("llama", "qlora", bf16),
        StepCase("llama", "lora", bf16, autocast=True, words=128256),
        StepCase("bert", "lora", fp32, autocast=True),
        StepCase("t5", "lora", fp32, autocast=True),
        StepCase("llama", "qlora", bf16, rows=1),
        StepCase("llama", "lora", bf16, autocast=True, rows=1),
        StepCase("llama", "lora", bf16, autocast=True, dropout=0.05),
        StepCase("llama", "lora", fp32, autocast=True, checkpointing=True),
        StepCase("llama", "dora", bf16, autocast=True),
        StepCase("moe", "lora", bf16, autocast=True),
        StepCase("moe-128", "lora", bf16, autocast=True),
        StepCase("llama", "lora", torch.float16),
        StepCase("llama", "dora", bf16, autocast=True, rank=384),
        StepCase("llama", "qdora", bf16, autocast=True),
        StepCase("llama", "qlora", fp32, autocast=True),
        StepCase("llama", "lora", bf16, compiled="default"),
        StepCase("llama", "lora", bf16, autocast=True, rows=1, compiled="reduce-overhead"),
        StepCase("t5", "lora", fp32, autocast=True, compiled="reduce-overhead"),
        StepCase("bert", "qlora", bf16),
        StepCase("t5", "qlora", bf16),
        StepCase("llama", "lora", bf16),
        StepCase("llama", "lokr", bf16, autocast=True, rank=8),
        StepCase("llama", "vera", bf16, autocast=True, rank=256),
    ]
    cases += [
        StepCase(family, "lora", dtype, autocast=dtype == bf16, dropout=dropout)
        for family in ("bert", "t5")
        for dtype, dropout in ((bf16, 0.0), (torch.float16, 0.0), (bf16, 0.05))
    ]
    in_4_bits = importlib.util.find_spec("bitsandbytes") is not None
    if not in_4_bits:
        print("bitsandbytes is not installed: no 4-bit model is stepped")
    return (_sized(case, small) for case in cases if case.method[0] != "q" or in_4_bits)


def _sized(case: StepCase, small: bool) -> StepCase:
    if small:
        return replace(case, hidden=64, layers=2, tokens=16, words=1000)
    if case.rows == 1:  # a single short text: the host's time
        return replace(case, hidden=4096, layers=4)
    if case.family == "moe-128":
        return replace(case, hidden=2048, layers=2, rows=4, tokens=2048)
    if case.family in ("llama", "moe"):  # the width of 8 billion parameters
        return replace(case, hidden=4096, layers=2, rows=4, tokens=2048)
    return replace(case, hidden=1024, layers=4, rows=16, tokens=512)


def _case(recorder: Recorder, case: StepCase, depth: str) -> dict[str, float]:
    import torch

    import fastpeft
    from fastpeft.bench.busy import keep
    from fastpeft.bench.steps import build, make_batch, measure
    from fastpeft.bench.timer import ratio

    model = fastpeft.accelerate(build(case, recorder.device))
    with torch.autocast(recorder.device, torch.bfloat16, enabled=case.autocast):
        verified = fastpeft.verify(model, make_batch(case, recorder.device))
    assert verified.passed, str(verified)
    rounds = 2 if recorder.device == "cpu" else {"quick": 7, "default": 15, "full": 40}[depth]
    result = measure(case, rounds, recorder.device)
    for peer, samples in result.samples.items():
        recorder.add(case=case.name, op="lora", peer=peer, metric="step time", unit="ms", samples=samples)
    for peer, kept in result.kept.items():
        recorder.add(case=case.name, op="lora", peer=peer, metric="kept for backward", unit="MiB", samples=kept / 2**20)
    for peer, peak in result.peak.items():
        recorder.add(case=case.name, op="lora", peer=peer, metric="peak memory", unit="MiB", samples=peak / 2**20)
    keep(partial(recorder.add, case=case.name, op="lora"), result.busy)
    return {
        "time_ratio": ratio(result.samples, "fastpeft", "peft"),
        "kept_ratio": result.kept["fastpeft"] / result.kept["peft"],
    }
