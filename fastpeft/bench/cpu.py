"""Training steps and generation of plain PEFT and of fastpeft beside each other on this CPU, as `make bench` runs them.

Writes one JSON Lines file of records; `python -m fastpeft.bench.tables` makes tables of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import generation
from .generation import GenerationCase
from .records import RecordFile, environment
from .steps import StepCase, StepResult, measure
from .timer import ratio

SUITE = "step"
CASES = (
    StepCase("llama", "lora", torch.float32),
    StepCase("llama", "lora", torch.float32, dropout=0.1),
    StepCase("llama", "lora", torch.float32, checkpointing=True),
    StepCase("llama", "lora", torch.float32, compiled="default"),
    StepCase("llama", "qlora", torch.float32),
    StepCase("llama", "dora", torch.float32),
    StepCase("bert", "lora", torch.float32),
    StepCase("bert", "qlora", torch.float32),
    StepCase("t5", "lora", torch.float32),
    StepCase("moe", "lora", torch.float32, layers=2),
)
MORE = (
    StepCase("llama", "lora", torch.bfloat16),
    StepCase("llama", "lora", torch.float32, autocast=True),
    StepCase("llama", "lora", torch.float32, hidden=1024, layers=2, tokens=512, compiled="default"),
    StepCase("llama", "lora", torch.bfloat16, hidden=1024, layers=2, tokens=512, compiled="default"),
    StepCase("llama", "qlora", torch.bfloat16),
    StepCase("llama", "qlora", torch.float32, autocast=True),
    StepCase("llama", "dora", torch.float32, dropout=0.1),
    StepCase("llama", "dora", torch.float32, autocast=True),
    StepCase("llama", "dora", torch.float32, checkpointing=True),
    StepCase("llama", "qdora", torch.float32),
    StepCase("llama", "qdora", torch.float32, dropout=0.1),
    StepCase("llama", "loha", torch.float32, rank=8),
    StepCase("llama", "lokr", torch.float32, rank=8),
    StepCase("llama", "vera", torch.float32, rank=256),
    StepCase("t5", "qlora", torch.float32),
    StepCase("moe", "lora", torch.bfloat16, layers=2),
    StepCase("moe", "lora", torch.float32, layers=2, checkpointing=True),
)
GENERATION = (
    GenerationCase("llama", "lora", 1),
    GenerationCase("llama", "qlora", 1),
    GenerationCase("t5", "lora", 1),
)
MORE_GENERATION = (
    *(GenerationCase("llama", method, 4) for method in ("lora", "qlora")),
    *(GenerationCase("llama", method, 1, state) for method in ("lora", "qlora") for state in ("merged", "disabled")),
    GenerationCase("t5", "lora", 4),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; names the cases in which fastpeft is slower than PEFT by more than PEFT's own spread."""
    parser = argparse.ArgumentParser(prog="python -m fastpeft.bench.cpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fail-if-slower", action="store_true", help="exit code 1 when a case is slower than PEFT")
    parser.add_argument("--only", default="", help="of all cases, those whose name holds this text")
    parser.add_argument("--all", action="store_true", help="every case; by default one of each kind")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/cpu.jsonl"))
    options = parser.parse_args(arguments)
    more = options.all or bool(options.only)
    steps = [case for case in CASES + MORE * more if options.only in case.name]
    generations = [case for case in GENERATION + MORE_GENERATION * more if options.only in case.name]
    if not (steps or generations):
        every = [case.name for case in CASES + MORE] + [case.name for case in GENERATION + MORE_GENERATION]
        names = ", ".join(every)
        parser.error(f"--only: expected a part of a case's name, got {options.only!r}; cases: {names}")
    torch.set_num_threads(options.threads)
    options.out.unlink(missing_ok=True)
    file = RecordFile(options.out, environment("cpu"))
    slower = []
    for case in steps:
        result = measure(case, options.rounds)
        keep(file, result, {"threads": options.threads})
        ours, spread = ratio(result.samples, "fastpeft", "peft"), ratio(result.samples, "peft again", "peft")
        kept = result.kept["fastpeft"] / result.kept["peft"]
        print(f"{case.name:64} time {ours:.3f} (PEFT beside itself {spread:.3f})  kept {kept:.3f}", flush=True)
        if ours > 1.0 + abs(spread - 1.0):
            slower.append(case.name)
    for each in generations:
        samples = generation.measure(each, options.rounds)
        keep_generation(file, each, samples, {"threads": options.threads})
        speed, spread = ratio(samples, "fastpeft", "peft"), ratio(samples, "peft again", "peft")
        print(f"{each.name:64} tokens/s {speed:.3f} (PEFT beside itself {spread:.3f})", flush=True)
        if speed < 1.0 - abs(spread - 1.0):
            slower.append(each.name)
    for name in slower:
        print(f"slower than PEFT: {name}")
    return 1 if slower and options.fail_if_slower else 0


def keep(file: RecordFile, result: StepResult, settings: dict[str, object]) -> None:
    """One record a peer and metric."""
    for peer, samples in result.samples.items():
        file.add(
            suite=SUITE, case=result.case.name, op="lora", peer=peer, metric="step time", unit="ms",
            samples=samples, settings=settings,
        )  # fmt: skip
    for peer, kept in result.kept.items():
        file.add(
            suite=SUITE, case=result.case.name, op="lora", peer=peer, metric="kept for backward", unit="MiB",
            samples=kept / 2**20, settings=settings,
        )  # fmt: skip


def keep_generation(
    file: RecordFile, case: GenerationCase, samples: dict[str, list[float]], settings: dict[str, object]
) -> None:
    """One record a peer."""
    for peer, speeds in samples.items():
        file.add(
            suite="generation", case=case.name, op="lora", peer=peer, metric="speed", unit="tokens/s",
            samples=speeds, settings=settings,
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
