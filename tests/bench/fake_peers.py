"""Processes of the end-to-end benchmark that train nothing; light to import, because each process does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from fastpeft.bench.finetune.processes import Line
from fastpeft.bench.finetune.worker import CEILINGS, READY, STEPS, Outcome, Task
from fastpeft.bench.left_out import NotHereError

STEPS_MADE, WARMUP, FLOPS = 6, 2, 4e9
NOISE = {"peft exact": 0.0, "peft": 1e-6, "peft again": 2e-6, "fastpeft": 3e-6, "fastpeft without loss": 1e-3}
UNLUCKY = {"fastpeft without mlp": "as it is", "fastpeft without attention": "backwards"}
"""Peers that are right and err by chance, until the run with these roundings has erred too."""
ROUNDINGS = ("as it is", "backwards", "moved")
MS = {"peft": 20.0, "fastpeft": 10.0}


def find(given: Any, line: Line, started: float) -> Callable[[Any], Any]:
    source = SimpleNamespace(path="", task="causal-lm", words=100)
    return lambda question: {"copy": [1.0], "matrix float32": [2.0, 1.0, 3.0]} if question == CEILINGS else source


def train(task: Task, line: Line, started: float) -> Callable[[Any], Any]:
    name = task.peer.name

    def answer(question: str) -> Any:
        if question == READY:
            return True
        if question == STEPS:
            for _ in range(task.steps + 1):
                line.tell(MS.get(name, 20.0))
                line.listen()
        if name == "fastpeft without lora":
            os.abort()
        if name == "fastpeft without norms":
            raise MemoryError
        roundings = "moved" if task.peer.moved else "backwards" if task.peer.backwards else "as it is"
        lucky = name in UNLUCKY and ROUNDINGS.index(roundings) > ROUNDINGS.index(UNLUCKY[name])
        noise = NOISE["fastpeft"] if lucky else NOISE.get(name, 1e-3)
        losses = [(5.0 - i / 10) * (1 + noise) for i in range(STEPS_MADE)]
        ms = [1000.0] * WARMUP + [MS.get(name, 20.0)] * (STEPS_MADE - WARMUP)
        seconds = {"import": 1.0, "load": 2.0, "first step": 1.0, "to first step": 5.0}
        return Outcome(losses, ms, 100.0, 0.0, seconds, 1234, FLOPS if name == "peft" else 0.0)

    if name == "trl":
        raise NotHereError("not of this machine")
    return answer


def obeying(given: Any, line: Line, started: float) -> Callable[[Any], Any]:
    """Does what it is asked."""

    def answer(question: str) -> Any:
        print("asked to", question, flush=True)
        if question == "hang":
            time.sleep(60)
        if question == "crash":
            os._exit(3)
        if question == "fail":
            raise ValueError("rows: expected some\nand more")
        return os.getpid()

    return answer
