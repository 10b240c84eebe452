"""What a layer costs beside its arithmetic: microseconds of the CPU a forward and a backward, on tiny sizes.

The clock counts this thread alone, and the least of many rounds is taken, so that a busy machine disturbs little. On a
GPU this much time goes by before the last kernel of a layer is launched; it is hidden while kernels take longer.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .steps import StepCase, build

HIDDEN, TOKENS, CALLS = 64, 4, 20
PARTS = {"projection": "self_attn.o_proj", "MLP": "mlp"}


def measure(rounds: int, adapted: bool) -> dict[str, dict[str, tuple[float, float]]]:
    """Microseconds (forward, backward) by part of a Llama layer and by peer.

    Args:
        rounds: of `CALLS` calls each, in turn for every peer.
        adapted: with LoRA on all projections; else frozen ones.
    """
    import fastpeft
    from fastpeft_kernels.native.extension import group_extension

    group_extension(wait=True)
    case = StepCase("llama", "lora", torch.float32, hidden=HIDDEN, layers=1, tokens=TOKENS, rank=4)
    models: dict[str, Any] = {"PEFT": build(case, "cpu")}
    if not adapted:
        models["PEFT"] = models["PEFT"].unload().requires_grad_(False)
    models["fastpeft"] = fastpeft.accelerate(copy.deepcopy(models["PEFT"]))
    if adapted:
        models["fastpeft"](torch.zeros((1, TOKENS), dtype=torch.long))  # ends the search for siblings
    parts = PARTS if adapted else {"MLP": PARTS["MLP"]}
    return {
        name: _measure({peer: _part(model, path) for peer, model in models.items()}, rounds)
        for name, path in parts.items()
    }


def _part(model: nn.Module, path: str) -> nn.Module:
    return next(module for name, module in model.named_modules() if name.endswith(f"layers.0.{path}"))


def _measure(modules: dict[str, nn.Module], rounds: int) -> dict[str, tuple[float, float]]:
    x = torch.randn(1, TOKENS, HIDDEN, requires_grad=True)
    dy = torch.ones_like(x)
    least = {peer: (float("inf"), float("inf")) for peer in modules}
    for _ in range(rounds):
        for peer, module in modules.items():
            forward = _microseconds(partial(module, x))
            both = _microseconds(partial(_step, module, x, dy))
            least[peer] = min(least[peer][0], forward), min(least[peer][1], both)
    return {peer: (forward, both - forward) for peer, (forward, both) in least.items()}


def _step(module: nn.Module, x: Tensor, dy: Tensor) -> None:
    torch.autograd.backward(module(x), dy)


def _microseconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - start) / CALLS * 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastpeft.bench.overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for adapted in (True, False):
            for part, peers in measure(options.rounds, adapted).items():
                for peer, (forward, backward) in peers.items():
                    name = f"{part}, {'LoRA' if adapted else 'frozen'}"
                    print(f"{name:20} {peer:10} forward {forward:6.0f} us  backward {backward:6.0f} us", flush=True)
    finally:
        torch.set_num_threads(threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
