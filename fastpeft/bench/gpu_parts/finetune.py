"""Fine-tuning by the trainers that users run: layers of Llama 3.1 8B by PEFT, others and fastpeft, losses compared."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from fastpeft.bench.recorder import Recorder

if TYPE_CHECKING:
    from fastpeft.bench.finetune.case import FinetuneCase

order = 35
time_limit_s = 480
needs = ("peft",)
PEERS = {
    "lora": ["fastpeft", "trl", "fastpeft + trl", "peft + liger", "unsloth"],
    "qlora": ["fastpeft", "fastpeft + trl", "fastpeft + trl without metrics", "peft + liger", "unsloth"],
}
"""By method. Each has a process of its own, most of whose time goes to imports."""
MORE = {"full": ["torch.compile"]}
STEPS = {"quick": (20, 8), "default": (30, 10), "full": (60, 10)}
"""Of a run, and of them those whose time does not count."""
ALL_MODELS = 64 << 30
"""Bytes of a GPU that holds the models of all peers at once, and the batch of one."""


def run(recorder: Recorder, depth: str) -> None:
    from fastpeft_kernels.native.extension import group_extension

    group_extension(wait=True)  # a short run shall not be that of a machine that compiles beside it
    _run(recorder, depth, small=False)


def dry_run(recorder: Recorder, depth: str) -> None:
    _run(recorder, depth, small=True)


def _run(recorder: Recorder, depth: str, small: bool) -> None:
    cases = _cases(small, *STEPS[depth])
    recorder.run_checks("run", ((case.name, partial(_case, recorder, case, depth, small)) for case in cases))


def _cases(small: bool, steps: int, warmup: int) -> Iterator[FinetuneCase]:
    from fastpeft.bench.finetune.case import FinetuneCase

    for method in PEERS:
        if method == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
            print("bitsandbytes is not installed: no 4-bit model was fine-tuned")
        elif small:
            tiny = {"rows": 2, "tokens": 16, "steps": 4, "warmup": 1, "scale": "tiny", "threads": 1}
            yield FinetuneCase("llama-3.1-8b", method, "float32", "cpu", **tiny)  # type: ignore[arg-type]
        else:
            yield FinetuneCase("llama-3.1-8b", method, rows=4, tokens=2048, layers=4, steps=steps, warmup=warmup)


def _case(recorder: Recorder, case: FinetuneCase, depth: str, small: bool) -> dict[str, float]:
    from statistics import median

    import torch

    from fastpeft.bench.finetune.peers import PEFT, choose
    from fastpeft.bench.finetune.running import Plan, measure
    from fastpeft.bench.finetune.table import table

    peers = choose(["fastpeft"] if small else PEERS[case.method] + MORE.get(depth, []))
    with TemporaryDirectory() as logs:
        together = not small and torch.cuda.get_device_properties(0).total_memory >= ALL_MODELS
        plan = Plan(limit_s=150.0, logs=Path(logs), shared_imports=small, together=together)
        result = measure(case, peers, plan, recorder.add)
        print(table(result), flush=True)
        for name in sorted(result.failed):
            log = Path(logs, f"{name.replace(' ', '-')}.log")
            print(f"{name}:\n{log.read_text(errors='replace')[-3000:]}", flush=True)
    assert not result.exit_code, result.left_out
    missing = {PEFT, "fastpeft"} & set(result.left_out)
    assert not missing, result.left_out
    return {"time_ratio": median(result.step_ms("fastpeft")) / median(result.step_ms(PEFT))}
