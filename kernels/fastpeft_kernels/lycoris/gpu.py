"""Checks that need a CUDA GPU: LoHa and LoKr against fp64, in every dtype, over dense and 4-bit weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.gpu_verdicts import Verdicts
from ..lora.gpu_support import BF16, DEVICE, F16, F32, F64, dtype_name, moved, rand, worse
from ..quant import encode_4bit
from ..weights import DenseWeight, FourBitWeight, FrozenWeight
from .adapters import LohaAdapter, LokrAdapter
from .api import loha_linear, lokr_linear
from .reference import lycoris_linear_reference

TOKENS, IN, OUT, RANK = 333, 1024, 1024, 16


def checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named checks. Each returns figures, or raises AssertionError."""
    for method in ("loha", "lokr"):
        for dtype in (BF16, F16, F32):
            for base in ("dense", "nf4"):
                yield f"{method} {dtype_name(dtype)} {base}", partial(_check, method, dtype, base)


def _check(method: str, dtype: torch.dtype, base: str) -> dict[str, Any]:
    """Two adapters; their factors are fp32, as PEFT makes them."""
    values = rand(OUT, IN, dtype=dtype) / IN**0.5
    weight: FrozenWeight = FourBitWeight(encode_4bit(values, "nf4", 64, True)) if base == "nf4" else DenseWeight(values)
    x, bias, dy = rand(TOKENS, IN, dtype=dtype), rand(OUT, dtype=dtype), rand(TOKENS, OUT, dtype=dtype)
    adapters = [_adapter(method) for _ in range(2)]
    run = loha_linear if method == "loha" else lokr_linear
    ours = _derive(lambda x, adapters: run(x, weight, adapters, bias=bias), x, adapters, dy)  # type: ignore[arg-type]
    dense = weight.decode()

    def plain(device: torch.device, wide: torch.dtype | None) -> list[Tensor]:
        copies = [_map(each, lambda t: moved(t, device, wide)) for each in adapters]
        w, offset = moved(dense, device, wide or F32), moved(bias, device, wide or F32)

        def reference(x: Tensor, adapters: Sequence[Any]) -> Tensor:
            return lycoris_linear_reference(x.to(w.dtype), w, offset, adapters).to(x.dtype)

        return [t.to(DEVICE) for t in _derive(reference, moved(x, device, wide), copies, moved(dy, device, wide))]

    here, there, exact = plain(DEVICE, None), plain(torch.device("cpu"), None), plain(DEVICE, F64)
    verdicts = Verdicts()
    for i, (mine, one, other, truth) in enumerate(zip(ours, here, there, exact, strict=True)):
        verdicts.within(mine, worse(one, other, truth), truth, f"result {i}")
    return {"share_of_budget": verdicts.settle()}


def _adapter(method: str) -> LohaAdapter | LokrAdapter:
    if method == "loha":
        return LohaAdapter(rand(OUT, RANK) / 16, rand(RANK, IN) / 16, rand(OUT, RANK), rand(RANK, IN), 0.5)
    return LokrAdapter(rand(32, 32) / 16, rand(OUT // 32, IN // 32), 0.5)


def _map(adapter: LohaAdapter | LokrAdapter, function: Callable[[Tensor], Tensor]) -> LohaAdapter | LokrAdapter:
    """The adapter with other factors."""
    return type(adapter)._make((*map(function, adapter.factors), adapter.scaling))


def _derive(run: Callable[..., Tensor], x: Tensor, adapters: Sequence[Any], dy: Tensor) -> list[Tensor]:
    """The output, and gradients of x and every factor."""
    x = x.detach().requires_grad_()
    copies = [_map(each, lambda t: t.detach().requires_grad_()) for each in adapters]
    y = run(x, copies)
    return [y.detach(), *torch.autograd.grad(y, [x, *(t for each in copies for t in each.factors)], dy)]
