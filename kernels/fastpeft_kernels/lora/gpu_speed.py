"""Times on a CUDA GPU: every configuration of the LoRA kernels, what they replace, and whole groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ..common.gpu_clock import median_us
from ..common.random import draw_seed, dropout
from .api import run_group
from .configs import DOWN, INPUT, LINEAR, UP, WEIGHT, Config, linear_tiles
from .gpu_support import (
    BF16,
    DEVICE,
    F32,
    derive,
    make_projection,
    rand,
    same_dtypes,
    with_numbers,
)

_SHAPE = (8192, 4096, 4096, 16)  # tokens, features in, features out, rank: that of the plans
_MLP_SHAPES = ((8192, 4096, 14336, 16), (8192, 14336, 4096, 16))  # of a layer of 8 billion parameters
_LEADING = 3


def speed_checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named measurements, in microseconds."""
    yield from _linear_checks()
    for p in (0.0, 0.05):
        for config in DOWN:
            yield f"speed down {p=} {config.label}", partial(_measure_down, p, config)
        for config in WEIGHT:
            yield f"speed weight gradient {p=} {config.label}", partial(_measure_weight, p, config)
        for config in INPUT:
            yield f"speed input gradient {p=} {config.label}", partial(_measure_input, p, config)
    for config in UP:
        yield f"speed up backward {config.label}", partial(_measure_up, config)
    yield "speed of what the kernels replace", _measure_library
    for backend in ("library", "triton"):
        for p in (0.0, 0.05):
            yield f"speed group of 3, {backend} {p=}", partial(_measure_group, backend, p)
        yield f"speed mixed group of 3, {backend}", partial(_measure_group, backend, 0.0, mixed=True)


def _linear_checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every tile at the shape of the plans, the first ones at an MLP's, each beside cuBLAS without the update."""
    tiles = tuple(linear_tiles(DEVICE).values())
    for shape in (_SHAPE, *_MLP_SHAPES):
        sizes = "x".join(map(str, shape[:3]))
        yield f"speed linear {sizes} cuBLAS", partial(_measure_cublas, shape)
        for config in dict.fromkeys((*tiles, LINEAR[0])) if shape == _SHAPE else tiles[:_LEADING]:
            yield f"speed linear {sizes} {config.label}", partial(_measure_linear, shape, config)


def _measure_linear(shape: tuple[int, int, int, int], config: Config) -> dict[str, Any]:
    from .forward import lora_linear

    x, w, s, a, b, y = _linear_operands(shape)
    forward = median_us(lambda: lora_linear(x, w, s, b, out=y, config=config))
    dx = median_us(lambda: lora_linear(y, w.t(), s, a.t(), out=x, config=config))
    return _linear_figures(shape, forward, dx)


def _measure_cublas(shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """The frozen products alone, and with the update as an addmm of its own."""
    x, w, s, _, b, y = _linear_operands(shape)

    def updated() -> None:
        torch.mm(x, w.t(), out=y).addmm_(s, b.t())

    def update_first() -> None:
        torch.mm(s, b.t(), out=y).addmm_(x, w.t())

    forward, dx = median_us(lambda: torch.mm(x, w.t(), out=y)), median_us(lambda: torch.mm(y, w, out=x))
    times = {"forward_then_update_us": median_us(updated), "update_then_forward_us": median_us(update_first)}
    return {**_linear_figures(shape, forward, dx), **times}


def _linear_operands(shape: tuple[int, int, int, int]) -> tuple[torch.Tensor, ...]:
    """x, w, s, a, b, and room for y."""
    tokens, features, out_features, rank = shape
    x, s = rand(tokens, features, dtype=BF16), rand(tokens, rank, dtype=BF16)
    w = rand(out_features, features, dtype=BF16) / features**0.5
    a, b = rand(rank, features, dtype=BF16), rand(out_features, rank, dtype=BF16)
    return x, w, s, a, b, torch.empty((tokens, out_features), dtype=BF16, device=DEVICE)


def _linear_figures(shape: tuple[int, int, int, int], forward_us: float, dx_us: float) -> dict[str, Any]:
    """Times, and the rate of the frozen product's arithmetic alone: what tiles and cuBLAS are compared by."""
    tokens, features, out_features, _ = shape
    tflop = 2 * tokens * out_features * features / 1e12
    return {
        "forward_us": forward_us,
        "dx_us": dx_us,
        "forward_tflops": 1e6 * tflop / forward_us,
        "dx_tflops": 1e6 * tflop / dx_us,
    }


def _measure_down(p: float, config: Config) -> dict[str, Any]:
    from .forward import lora_down

    tokens, features, _, rank = _SHAPE
    x, a, seed = rand(tokens, features, dtype=BF16), rand(rank, features, dtype=BF16), draw_seed(DEVICE)
    return {"down_us": median_us(lambda: lora_down(x, a, seed=seed, p=p, config=config))}


def _measure_weight(p: float, config: Config) -> dict[str, Any]:
    from .backward import lora_down_bwd_weight

    tokens, features, _, rank = _SHAPE
    x, ds, seed = rand(tokens, features, dtype=BF16), rand(tokens, rank, dtype=BF16), draw_seed(DEVICE)
    return {"weight_us": median_us(lambda: lora_down_bwd_weight(x, ds, seed=seed, p=p, config=config))}


def _measure_input(p: float, config: Config) -> dict[str, Any]:
    from .backward import lora_down_bwd_input_

    tokens, features, _, rank = _SHAPE
    dx, ds = rand(tokens, features, dtype=BF16), rand(tokens, rank, dtype=BF16)
    a, seed = rand(rank, features, dtype=BF16), draw_seed(DEVICE)
    return {"input_us": median_us(lambda: lora_down_bwd_input_(dx, ds, a, seed=seed, p=p, config=config))}


def _measure_up(config: Config) -> dict[str, Any]:
    from .backward import lora_down_bwd_weight, lora_up_bwd
    from .forward import lora_down

    tokens, _, out_features, rank = _SHAPE
    dy, b = rand(tokens, out_features, dtype=BF16), rand(out_features, rank, dtype=BF16)
    s, ds = rand(tokens, rank, dtype=BF16), torch.empty((tokens, rank), dtype=BF16, device=DEVICE)

    def two_reads() -> None:
        lora_down(dy, b.t(), out=ds)
        lora_down_bwd_weight(dy, s, features_first=True)

    return {
        "one_read_us": median_us(lambda: lora_up_bwd(dy, b, s, ds, config=config)),
        "two_reads_us": median_us(two_reads),
    }


def _measure_library() -> dict[str, Any]:
    tokens, features, out_features, rank = _SHAPE
    x, w = rand(tokens, features, dtype=BF16), rand(out_features, features, dtype=BF16)
    a, b = rand(rank, features, dtype=BF16), rand(out_features, rank, dtype=BF16)
    y, s, seed = x @ w.t(), x @ a.t(), draw_seed(DEVICE)
    return {
        "frozen_us": median_us(lambda: torch.mm(x, w.t(), out=y)),
        "down_us": median_us(lambda: torch.mm(x, a.t(), out=s)),
        "update_us": median_us(lambda: y.addmm_(s, b.t())),
        "weight_gradient_us": median_us(lambda: torch.mm(s.t(), x, out_dtype=F32)),
        "dropout_us": median_us(lambda: dropout(x, seed, 0.05)),
        "torch_dropout_us": median_us(lambda: torch.nn.functional.dropout(x, 0.05)),
    }


def _measure_group(backend: str, p: float, mixed: bool = False) -> dict[str, Any]:
    """q, k and v of a layer of 4096 features with grouped heads, fp32 adapters under bf16; `mixed`: eight of them, one
    for each row of the batch."""
    dtypes, rows = same_dtypes(BF16), 8
    x = rand(rows, _SHAPE[0] // rows, 4096, dtype=BF16).requires_grad_()
    ranks = (16,) * (rows if mixed else 1)
    group = [make_projection(4096, out, ranks, dtypes, "dense", p) for out in (4096, 1024, 1024)]
    group = [with_numbers(projection) for projection in group] if mixed else group
    seeds = [draw_seed(DEVICE) if p else None for _ in group]
    dys = [rand(*x.shape[:2], projection.weight.shape[0], dtype=BF16) for projection in group]
    run = partial(run_group, backend=backend, adapter_index=tuple(range(rows)) if mixed else None)
    with torch.no_grad():
        forward = median_us(lambda: run(x, group, dtypes, seeds))
    both = median_us(lambda: derive(run, x, group, dtypes, seeds, dys))
    return {"forward_us": forward, "forward_and_backward_us": both}
