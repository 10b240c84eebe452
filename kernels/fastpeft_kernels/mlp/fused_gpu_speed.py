"""Times on a CUDA GPU: the fused kernels in every configuration, and the separate ones that they replace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.gpu_clock import median_us
from ..lora.backward import lora_down_bwd_weight, lora_up_bwd
from ..lora.forward import lora_down
from ..lora.partial_sums import lora_sum

_DEVICE = torch.device("cuda")
_TOKENS, _FEATURES, _RANK = 8192, 14336, 16  # those of the plans


def speed_checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named measurements, in microseconds."""
    from . import fused_backward, fused_forward

    yield "speed of the activation forward and what reads it", _measure_forward_apart
    for config in fused_forward.CONFIGS:
        yield f"speed fused forward {config.label}", partial(_measure_forward, config)
    yield "speed of the activation backward and what reads it", _measure_backward_apart
    for config in fused_backward.CONFIGS:
        yield f"speed fused backward {config.label}", partial(_measure_backward, config)


def _measure_forward_apart() -> dict[str, Any]:
    from ..activation.forward import gated_activation_triton

    (gate, up), h, a = _halves(), _random(_TOKENS, _FEATURES), _random(_RANK, _FEATURES)

    def run() -> None:
        gated_activation_triton(gate, up, "silu", h)
        lora_down(h, a)

    return {"forward_us": median_us(run)}


def _measure_forward(config: Any) -> dict[str, Any]:
    from .fused_forward import gated_activation_with_down

    (gate, up), h, a = _halves(), _random(_TOKENS, _FEATURES), _random(_RANK, _FEATURES)
    return {"forward_us": median_us(lambda: gated_activation_with_down(gate, up, "silu", h, a, config=config))}


def _measure_backward_apart() -> dict[str, Any]:
    """The activation's gradients with h, then `rank_products.both_gradients` of both and `down_gradient` in Triton."""
    from ..activation.backward import gated_activation_backward_triton

    (gate, up), (dgate, dup), dh = _halves(), _halves(), _random(_TOKENS, _FEATURES)
    b, s, ds = _random(_FEATURES, _RANK), _random(_TOKENS, _RANK), _random(_TOKENS, _RANK)
    h = torch.empty_like(dh)

    def run() -> None:
        gated_activation_backward_triton(dh, gate, up, "silu", dgate, dup, h)
        for dy in (dgate, dup):
            _summed(lora_up_bwd(dy, b, s, ds))
        _summed(lora_down_bwd_weight(h, s))

    return {"backward_us": median_us(run)}


def _measure_backward(config: Any) -> dict[str, Any]:
    """With the sums of dB and dA; `kernel_us` is without them, but with that of dS."""
    from .fused_backward import UpAdapter, gated_activation_backward_with_adapters

    (gate, up), (dgate, dup), dh = _halves(), _halves(), _random(_TOKENS, _FEATURES)
    gate_adapter, up_adapter = (UpAdapter(_random(_FEATURES, _RANK), _random(_TOKENS, _RANK)) for _ in range(2))
    ds_down = _random(_TOKENS, _RANK)

    def run(sums: bool) -> None:
        got = gated_activation_backward_with_adapters(
            dh, gate, up, "silu", dgate=dgate, dup=dup, gate_adapter=gate_adapter, up_adapter=up_adapter,
            ds_down=ds_down, config=config,
        )  # fmt: skip
        for part in got[1:] if sums else ():
            assert part is not None
            _summed(part)

    return {"backward_us": median_us(lambda: run(True)), "kernel_us": median_us(lambda: run(False))}


def _summed(partials: Tensor) -> Tensor:
    return lora_sum(partials, partials.new_empty(tuple(partials.shape[1:])))


def _halves() -> tuple[Tensor, Tensor]:
    both = _random(_TOKENS, 2 * _FEATURES)
    return both[:, :_FEATURES], both[:, _FEATURES:]


def _random(rows: int, columns: int) -> Tensor:
    return torch.randn((rows, columns), device=_DEVICE, dtype=torch.bfloat16)
