"""What an optimizer's step takes, on the adapters of Llama 3.1 8B: time with and without the host's part, and memory.

The host's part is what goes by until the call returns. On a CPU that is all of it; `--tiny` makes every matrix one of
four numbers, so that hardly anything but the host's part is left. Clipping the norm, which comes before, is measured
too.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.nn import Parameter

from .memory import MIB, peak_of_step
from .timer import device_clock, interleaved

FEATURES = ((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096))
"""Of q, k, v, o, gate, up and down: in, out."""
CLIPPING = "clip_grad_norm_"
Make = Callable[[list[Parameter]], Any]


@dataclass(frozen=True)
class OptimizerResult:
    """By optimizer, and `CLIPPING`: milliseconds of each round, and bytes.

    Attributes:
        host: until the call returned; on a CPU, of this process alone, whatever else the machine does.
        wall: until the device was done.
        device: of the device alone; of a CPU, the same as `wall`.
        temporary: bytes that a step takes and gives back.
        state: bytes that lie there between steps.
    """

    host: dict[str, list[float]]
    wall: dict[str, list[float]]
    device: dict[str, list[float]]
    temporary: dict[str, int]
    state: dict[str, int]


def optimizers() -> dict[str, Make]:
    """What is compared, as far as it is installed."""
    from fastpeft.optim import AdamW

    found: dict[str, Make] = {
        "torch, loop": partial(torch.optim.AdamW, foreach=False),
        "torch, foreach": partial(torch.optim.AdamW, foreach=True),
        "torch, fused": partial(torch.optim.AdamW, fused=True),
        "fastpeft": AdamW,
    }
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes

        found["bitsandbytes, 8 bits"] = bitsandbytes.optim.AdamW8bit
        found["bitsandbytes, 8 bits, paged"] = bitsandbytes.optim.PagedAdamW8bit
    return found


def measure(layers: int, rank: int, rounds: int, device: str = "cpu", tiny: bool = False) -> OptimizerResult:
    """Every optimizer in turn, each round in another order, on parameters and gradients of its own.

    Args:
        layers: of the model, each with seven adapters of rank `rank`, fp32.
        rounds: samples of each.
        tiny: matrices of four numbers.
    """
    steps: dict[str, Callable[[], object]] = {}
    temporary: dict[str, int] = {}
    state: dict[str, int] = {}
    for name, make in optimizers().items():
        parameters = _adapters(layers, rank, device, tiny)
        optimizer = make(parameters)
        for _ in range(3):  # ours keeps its lists from the third on
            optimizer.step()
        steps[name] = optimizer.step
        temporary[name] = peak_of_step(optimizer.step, device)
        state[name] = sum(_bytes(value) for each in optimizer.state.values() for value in each.values())
    steps[CLIPPING] = partial(torch.nn.utils.clip_grad_norm_, parameters, 1.0)
    temporary[CLIPPING], state[CLIPPING] = peak_of_step(steps[CLIPPING], device), 0
    wall = interleaved(steps, rounds, device=device)
    host = interleaved(steps, rounds, clock=partial(_host_ms, device=device))
    own = interleaved(steps, rounds, clock=device_clock(device)) if device == "cuda" else wall
    return OptimizerResult(host, wall, own, temporary, state)


def _adapters(layers: int, rank: int, device: str, tiny: bool) -> list[Parameter]:
    shapes = [shape for into, out in FEATURES for shape in ((rank, into), (out, rank))] * layers
    parameters = [Parameter(torch.randn((1, 4) if tiny else shape, device=device)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def _bytes(value: object) -> int:
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def _host_ms(step: Callable[[], object], device: str) -> float:
    clock = time.process_time
    if device == "cuda":
        torch.cuda.synchronize()
        clock = time.perf_counter
    start = clock()
    step()
    return (clock() - start) * 1e3


def table(result: OptimizerResult) -> str:
    """A line an optimizer: the host's least, which a busy machine disturbs little, and the medians of the others."""
    lines = [f"{'':28}{'host ms':>9}{'wall ms':>9}{'device ms':>11}{'temporary MiB':>15}{'state MiB':>11}"]
    for name in result.wall:
        times = [min(result.host[name]), median(result.wall[name]), median(result.device[name])]
        sizes = [each[name] / MIB for each in (result.temporary, result.state)]
        lines.append(f"{name:28}{times[0]:9.2f}{times[1]:9.2f}{times[2]:11.2f}{sizes[0]:15.1f}{sizes[1]:11.1f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastpeft.bench.optimizer", description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="four numbers a matrix")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    print(table(measure(options.layers, options.rank, options.rounds, options.device, options.tiny)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
