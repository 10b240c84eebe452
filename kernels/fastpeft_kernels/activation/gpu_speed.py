"""Times on a CUDA GPU: the kernels of gated activations, and what they replace. The tuner times every configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.gpu_clock import median_us

_DEVICE = torch.device("cuda")
_SHAPE = (8192, 14336)  # tokens and features: that of the plans
_KINDS = ("silu", "gelu", "gelu_tanh")
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def speed_checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named measurements, in microseconds and GB/s."""
    for kind, dtype in product(_KINDS, _DTYPES):
        yield f"speed {kind} {dtype}", partial(_measure, kind, dtype)
    for dtype in _DTYPES:
        yield f"speed of PyTorch's silu {dtype}", partial(_measure_torch, dtype)


def _measure(kind: str, dtype: str) -> dict[str, Any]:
    from .backward import gated_activation_backward_triton
    from .forward import gated_activation_triton
    from .tiles import CONFIGS

    gate, up, dh, dgate, dup, h = _tensors(dtype)
    forward = median_us(lambda: gated_activation_triton(gate, up, kind, h, CONFIGS[0]))
    backward = median_us(lambda: gated_activation_backward_triton(dh, gate, up, kind, dgate, dup, h, CONFIGS[0]))
    return {
        "forward_us": forward,
        "forward_gb_s": 3 * h.nbytes / forward / 1e3,
        "backward_us": backward,
        "backward_gb_s": 6 * h.nbytes / backward / 1e3,
    }


def _measure_torch(dtype: str) -> dict[str, Any]:
    gate, up, dh, dgate, dup, h = _tensors(dtype)

    def backward() -> None:
        value = F.silu(gate)
        dgate.copy_(torch.ops.aten.silu_backward(dh * up, gate))
        torch.mul(dh, value, out=dup)
        torch.mul(value, up, out=h)

    return {
        "forward_us": median_us(lambda: F.silu(gate).mul_(up)),
        "backward_us": median_us(backward),
        "copy_us": median_us(lambda: h.copy_(dh)),
    }


def _tensors(dtype: str) -> tuple[Tensor, ...]:
    """gate and up as the halves of one tensor, dh, dgate and dup likewise, h."""
    rows, columns = _SHAPE
    both, gradients = (torch.randn((rows, 2 * columns), device=_DEVICE, dtype=_DTYPES[dtype]) for _ in range(2))
    dh = torch.randn(_SHAPE, device=_DEVICE, dtype=_DTYPES[dtype])
    return (
        both[:, :columns],
        both[:, columns:],
        dh,
        gradients[:, :columns],
        gradients[:, columns:],
        torch.empty_like(dh),
    )
