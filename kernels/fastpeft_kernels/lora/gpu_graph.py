"""Checks that need a CUDA GPU: a step captured into a CUDA graph gives, replayed on other numbers, what it should.

Nothing in a step may wait for the GPU or read from it, which capture refuses, nor bake into the graph what can change:
the input, the adapters, a scaling on the device and the dropout seeds are read at every replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.random import draw_seed
from .api import run_group
from .backends import triton_refusal
from .gpu_support import BF16, DEVICE, derive, make_projection, mixed_rows, rand, same_dtypes
from .projection import Group, LoraProjection

WARMUP = 3


def graph_checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named checks. Each returns figures, or raises AssertionError."""
    for backend in ("library", "triton"):
        for base in ("dense", "nf4"):
            for mixed in (False, True):
                name = f"CUDA graph of a {'mixed ' * mixed}group {backend} {base}"
                yield name, partial(_check_group, backend, base, mixed)


def _check_group(backend: str, base: str, mixed: bool) -> dict[str, Any]:
    dtypes = same_dtypes(BF16)
    group = [make_projection(768, out, (16, 8), dtypes, base, 0.25) for out in (768, 256, 256)]
    x, seeds = rand(8, 64, 768, dtype=BF16).requires_grad_(), [draw_seed(DEVICE) for _ in group]
    dys = [rand(8, 64, projection.weight.shape[0], dtype=BF16) for projection in group]
    if backend == "triton" and (reason := triton_refusal(x, Group(group, dtypes, seeds))):
        return {"skipped": reason}
    run = partial(run_group, backend=backend, adapter_index=mixed_rows(8) if mixed else None)
    check_replay(lambda: derive(run, x, group, dtypes, seeds, dys), lambda: change(x, group, seeds))
    return {}


def check_replay(step: Callable[[], Sequence[Tensor]], change: Callable[[], None]) -> None:
    """Raise AssertionError unless a captured `step`, replayed after `change` in place, gives what `step` then gives."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiles kernels and fills caches
        for _ in range(WARMUP):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    before = [result.detach().clone() for result in results]
    change()
    graph.replay()
    for i, (was, result, expected) in enumerate(zip(before, results, step(), strict=True)):
        assert not torch.equal(was, result), f"result {i} is the same after the numbers changed"
        # cuBLAS may choose another algorithm for the workspace of a graph: one rounding of the largest value.
        apart, largest = (t.detach().double().abs().max().item() for t in (result.double() - expected, expected))
        allowed = torch.finfo(result.dtype).eps * largest
        assert apart <= allowed, f"result {i} of the replayed graph is {apart:.3e} from that without one"


@torch.no_grad()
def change(x: Tensor, group: Sequence[LoraProjection], seeds: Sequence[Tensor | None]) -> None:
    """Other numbers in the same memory, also in the scalings that lie on the GPU."""
    x.mul_(1.5).add_(0.1)
    for seed in seeds:
        if seed is not None:
            seed.add_(1)
    for projection in group:
        for adapter in projection.adapters:
            adapter.a.mul_(0.9).add_(0.01)
            adapter.b.mul_(1.1).add_(0.01)
            if isinstance(adapter.scaling, Tensor) and adapter.scaling.is_cuda:
                adapter.scaling.mul_(2.0)
