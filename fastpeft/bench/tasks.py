"""A step of several tasks in one pass, each row through its own task's adapter, beside one pass a task.

Both give the same gradients; counted are the products that torch makes, the time of this thread on the CPU, and the
bytes that a step takes at the most beside what lies there before.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmm_", "aten::baddbmm")


def measure(hidden: int, layers: int, tasks: int, rows: int, tokens: int, rounds: int) -> dict[str, dict[str, Any]]:
    """By way, PEFT's and fastpeft's: "ms" of each forward and backward, "products" of matrices, "peak MiB".

    Args:
        hidden, layers: of an encoder with random weights, LoRA of rank 8 on all its projections.
        tasks: how many; the rows are theirs in turn.
        rows, tokens: of a step.
        rounds: how often each is timed, all ways in turn.
    """
    import fastpeft

    from .memory import MIB, peak_of_step

    model = _model(hidden, layers, tasks)
    names = [f"task{row % tasks}" for row in range(rows)]
    ids = torch.randint(0, 1000, (rows, tokens), generator=torch.Generator().manual_seed(0))

    def one_pass() -> None:
        with fastpeft.mixed_batch(model, names):
            _loss(model, ids).backward()

    def pass_by_task() -> None:
        for task in dict.fromkeys(names):
            mine = [row for row, name in enumerate(names) if name == task]
            with fastpeft.mixed_batch(model, [task] * len(mine)):
                _loss(model, ids[mine]).backward()

    found: dict[str, dict[str, Any]] = {}
    for peer in ("PEFT", "fastpeft"):
        if peer == "fastpeft":
            fastpeft.accelerate(model)
        ways = {f"{peer}, one pass": one_pass, f"{peer}, one pass a task": pass_by_task}
        _check_alike(model, list(ways.values()))
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, step in ways.items():
                model.zero_grad()
                begun = time.thread_time()
                step()
                times[way].append(1e3 * (time.thread_time() - begun))
        for way, step in ways.items():
            model.zero_grad()
            peak = peak_of_step(step, "cpu") / MIB
            found[way] = {"ms": times[way], "products": _products(step), "peak MiB": peak}
    return found


def _model(hidden: int, layers: int, tasks: int) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": hidden // 32}
    base = BertModel(BertConfig(vocab_size=1000, num_hidden_layers=layers, **sizes), add_pooling_layer=False)
    config = LoraConfig(r=8, target_modules=["query", "key", "value", "dense"], init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name="task0")
    for task in range(1, tasks):
        model.add_adapter(f"task{task}", config)
    model.base_model.set_adapter([f"task{task}" for task in range(tasks)])
    return model.eval()  # the same numbers each time: nothing is dropped


def _loss(model: Any, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids).last_hidden_state.pow(3).sum()  # of squares after a norm it would be constant
    return loss


def _check_alike(model: Any, steps: Sequence[Callable[[], None]]) -> None:
    """Raise AssertionError unless all ways give the same gradients."""
    found = []
    for step in steps:
        model.zero_grad()
        step()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(one.abs().max()))


def _products(step: Callable[[], None]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return sum(event.count for event in profile.key_averages() if event.key in PRODUCTS)


def main(arguments: Sequence[str]) -> None:
    """`python -m fastpeft.bench.tasks`."""
    parser = argparse.ArgumentParser(prog="python -m fastpeft.bench.tasks", description=__doc__.splitlines()[0])
    for name, default in (("hidden", 384), ("layers", 6), ("tasks", 2), ("rows", 8), ("tokens", 48), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = vars(parser.parse_args(arguments))
    print(f"{given}, {torch.get_num_threads()} threads")
    for way, found in measure(**given).items():
        time_, peak = median(found["ms"]), found["peak MiB"]
        print(f"{way:24} {time_:9.1f} ms {found['products']:6} products {peak:8.1f} MiB")


if __name__ == "__main__":
    main(sys.argv[1:])
