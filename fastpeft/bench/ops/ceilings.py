"""What the machine can do at the most: copying memory, and multiplying matrices in each dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from ..reading import least_seconds
from ..timer import Step, interleaved
from .case import Floor

COPY = "copy"
_SIZES = {"cpu": (2**24, 512), "cuda": (2**28, 8192)}  # fp32 numbers copied, rows and columns of a matrix


def matrix(dtype: torch.dtype) -> str:
    """Name of the rate of products in a dtype."""
    return f"matrix {str(dtype).removeprefix('torch.')}"


def measure(
    device: str, dtypes: Iterable[torch.dtype], rounds: int, clock: Callable[[Step], float]
) -> dict[str, list[float]]:
    """Samples by name: "copy" in GB/s, each byte read and each written counted; "matrix <dtype>" in TFLOP/s.

    A dtype in which this machine multiplies more slowly than in fp32, which is as exact, has the rate of fp32.
    """
    elements, size = _SIZES[device]
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    steps: dict[str, Step] = {COPY: lambda: target.copy_(source)}
    work = {COPY: 2 * source.nbytes / 1e9}
    for dtype in dict.fromkeys([torch.float32, *dtypes]):
        a, b = (torch.randn((size, size), device=device).to(dtype) for _ in range(2))
        steps[matrix(dtype)] = lambda a=a, b=b: torch.mm(a, b)  # type: ignore[misc]
        work[matrix(dtype)] = 2 * size**3 / 1e12
    samples = interleaved(steps, rounds, clock=clock)
    rates = {name: [work[name] / (ms / 1e3) for ms in each] for name, each in samples.items()}
    exact = rates[matrix(torch.float32)]
    return {name: each if name == COPY else max(each, exact, key=max) for name, each in rates.items()}


def share(floor: Floor, dtype: torch.dtype, ms: float, ceilings: Mapping[str, list[float]]) -> float:
    """The time that the floor takes at the ceilings, the best of their samples, as a share of the time measured."""
    seconds = least_seconds(floor.flops, floor.bytes, max(ceilings[matrix(dtype)]), max(ceilings[COPY]))
    return 1e3 * (seconds or 0.0) / ms
