"""Times on a CUDA GPU: a product in FP8, bringing x to it included, beside the same in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ..common.device import triton_available
from ..common.gpu_clock import median_us
from ..weights import DenseWeight, Fp8Weight
from .api import fp8_refusal, quantise_rows, scaled_product

_DEVICE = torch.device("cuda")
# tokens, in_features, out_features: of a model of 8 billion parameters, gate and up, down, and q.
_SHAPES = ((8192, 4096, 14336), (8192, 14336, 4096), (8192, 4096, 4096), (1024, 4096, 4096))


def speed_checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named measurements, in microseconds."""
    if fp8_refusal(torch.device("cuda", torch.cuda.current_device())) is not None:
        return
    for shape in _SHAPES:
        yield f"speed {'x'.join(map(str, shape))}", partial(_measure, shape)


def _measure(shape: tuple[int, int, int]) -> dict[str, Any]:
    tokens, in_features, out_features = shape
    x, w, dy = (
        torch.randn(size, device=_DEVICE, dtype=torch.bfloat16)
        for size in ((tokens, in_features), (out_features, in_features), (tokens, out_features))
    )
    weight = Fp8Weight.of(DenseWeight(w), backward=True)
    rows = quantise_rows(x)
    bf16 = median_us(lambda: torch.mm(x, w.t()))
    fp8 = median_us(lambda: weight.linear(x))
    figures = {
        "bf16_us": bf16,
        "fp8_us": fp8,
        "speedup": bf16 / fp8,
        "product_us": median_us(lambda: scaled_product(rows, weight.rows, torch.bfloat16)),
        "product_fast_sums_us": median_us(lambda: scaled_product(rows, weight.rows, torch.bfloat16, fast_accum=True)),
        "rows_by_pytorch_us": median_us(lambda: quantise_rows(x, "torch")),
        "bf16_dx_us": median_us(lambda: torch.mm(dy, w)),
        "fp8_dx_us": median_us(lambda: weight.linear_t(dy)),
    }
    if triton_available():
        us = median_us(lambda: quantise_rows(x, "triton"))
        figures |= {"rows_us": us, "rows_gb_s": 3 * x.numel() / us / 1e3}
    return figures
