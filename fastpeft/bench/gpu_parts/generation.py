"""Tokens a second of greedy generation beside plain PEFT (and bitsandbytes): the host's overhead, mostly."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import TYPE_CHECKING

from fastpeft.bench.recorder import Recorder

if TYPE_CHECKING:
    from fastpeft.bench.generation import GenerationCase

order = 65
time_limit_s = 180
needs = ("peft",)

_KINDS = (("llama", "lora", 1), ("llama", "qlora", 1), ("llama", "lora", 4), ("t5", "lora", 1))


def run(recorder: Recorder, depth: str) -> None:
    _run(recorder, {"quick": 5, "default": 9, "full": 20}[depth], hidden=4096, layers=4)


def dry_run(recorder: Recorder, depth: str) -> None:
    _run(recorder, 1, hidden=64, layers=1)


def _run(recorder: Recorder, rounds: int, hidden: int, layers: int) -> None:
    import torch

    from fastpeft.bench.generation import GenerationCase

    methods = ["lora", "qlora"] if importlib.util.find_spec("bitsandbytes") else ["lora"]
    cases = [
        GenerationCase(family, method, rows, hidden=hidden, layers=layers, dtype=torch.bfloat16)
        for family, method, rows in (
            ("llama", "lora", 1),
            ("llama", "qlora", 1),
            ("llama", "lora", 4),
            ("t5", "lora", 1),
        )
        if method in methods
    ]
    recorder.run_checks("lora", ((case.name, partial(_case, recorder, case, rounds)) for case in cases))


def _case(recorder: Recorder, case: GenerationCase, rounds: int) -> dict[str, float]:
    from fastpeft.bench import generation
    from fastpeft.bench.timer import ratio

    samples = generation.measure(case, rounds, recorder.device)
    for peer, speeds in samples.items():
        recorder.add(case=case.name, op="lora", peer=peer, metric="speed", unit="tokens/s", samples=speeds)
    return {"speed_ratio": ratio(samples, "fastpeft", "peft")}
