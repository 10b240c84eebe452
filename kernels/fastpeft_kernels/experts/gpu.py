"""Checks that need a CUDA GPU: a mixture's experts against fp64, by both backends, in every dtype and storage."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.gpu_verdicts import Verdicts
from ..lora.gpu_support import BF16, DEVICE, F16, F32, F64, dtype_name, moved, rand, reference_device, same_dtypes
from ..quant import encode_4bit
from ..weights import DenseWeight, FourBitWeight, FrozenWeight
from .api import lora_experts
from .gating import CLAMPED_SWIGLU, Gating
from .reference import lora_experts_reference
from .structure import ExpertAdapter, ExpertProjection, Experts

TOKENS, TOP_K, EXPERTS, SIZE, FEATURES, RANK = 333, 2, 8, 192, 128, 16
GATINGS = {"silu": Gating("silu"), "clamped": Gating(CLAMPED_SWIGLU, interleaved=True, alpha=1.7, limit=1.0)}


def checks() -> Iterator[Any]:
    """Named checks. Each returns figures, or raises AssertionError."""
    for gating in GATINGS:
        for dtype in (BF16, F16, F32):
            for base in ("dense", "nf4"):
                yield f"experts {gating} {dtype_name(dtype)} {base} loop", partial(_check, gating, dtype, base, "loop")
        yield f"experts {gating} bf16 dense grouped_mm", partial(_check, gating, BF16, "dense", "grouped_mm")


def _check(gating: str, dtype: torch.dtype, base: str, backend: str) -> dict[str, Any]:
    """With an expert that gets no token; transposed and with biases where the gating is gpt-oss's."""
    transposed = gating == "clamped"
    experts = Experts(
        _projection(SIZE, 2 * FEATURES, dtype, base, transposed),
        _projection(FEATURES, SIZE, dtype, base, transposed),
        GATINGS[gating],
    )
    x, dy = rand(TOKENS, SIZE, dtype=dtype), rand(TOKENS, SIZE, dtype=dtype)
    index = torch.rand(TOKENS, EXPERTS - 1, device=DEVICE).topk(TOP_K).indices
    weights = torch.rand(TOKENS, TOP_K, device=DEVICE).softmax(-1)
    ours, again = (_derive(x, index, weights, experts, dtype, dy, backend) for _ in range(2))
    same = _reference(x, index, weights, experts, dtype, dy, reference_device(same_dtypes(dtype)))
    exact = _reference(x, index, weights, experts, F64, dy, DEVICE, F64)
    verdicts = Verdicts()
    for a, b in zip(ours, again, strict=True):
        verdicts.equal(b, a, "another result the second time")
    for i, triple in enumerate(zip(ours, same, exact, strict=True)):
        verdicts.within(*triple, f"result {i}")
    return {"share_of_budget": verdicts.settle()}


def _projection(features: int, out: int, dtype: torch.dtype, base: str, transposed: bool) -> ExpertProjection:
    rows, columns = (EXPERTS * features, out) if transposed else (EXPERTS * out, features)
    values = rand(rows, columns, dtype=dtype) / features**0.5
    weight: FrozenWeight = FourBitWeight(encode_4bit(values, "nf4", 64, True)) if base == "nf4" else DenseWeight(values)
    adapter = ExpertAdapter(
        (rand(EXPERTS, RANK, features, dtype=dtype) / features**0.5).requires_grad_(),
        rand(EXPERTS, out, RANK, dtype=dtype).requires_grad_(),
        0.5,
    )
    bias = rand(EXPERTS, out, dtype=dtype) if transposed else None
    return ExpertProjection(weight, EXPERTS, transposed, bias, (adapter,))


def _derive(
    x: Tensor, index: Tensor, weights: Tensor, experts: Experts, dtype: torch.dtype, dy: Tensor, backend: str | None
) -> list[Tensor]:
    """The output, and gradients of x, the weights and every adapter; by plain PyTorch without a backend."""
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    if backend is None:
        y = lora_experts_reference(x, index, weights, experts, dtype)
    else:
        y = lora_experts(x, index, weights, experts, dtype=dtype, backend=backend)
    parameters = [t for projection in experts.projections for t in projection.tensors()]
    return [y.detach(), *torch.autograd.grad(y, [x, weights, *parameters], dy)]


def _reference(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    experts: Experts,
    dtype: torch.dtype,
    dy: Tensor,
    device: torch.device,
    wide: torch.dtype | None = None,
) -> list[Tensor]:
    """What plain PyTorch gives on a device, with values in another dtype if one is given."""

    def copied(p: ExpertProjection) -> ExpertProjection:
        def factor(t: Tensor) -> Tensor:
            return moved(t, device, wide).requires_grad_()

        adapters = tuple(ExpertAdapter(factor(a.a), factor(a.b), a.scaling) for a in p.adapters)
        bias = None if p.bias is None else moved(p.bias, device, wide)
        return ExpertProjection(
            DenseWeight(moved(p.weight.decode(), device, wide)), EXPERTS, p.transposed, bias, adapters
        )

    copy = Experts(copied(experts.inner), copied(experts.down), experts.gating)
    given = (moved(x, device, wide), index.to(device), moved(weights, device, wide))
    return [t.to(DEVICE) for t in _derive(*given, copy, dtype, moved(dy, device, wide), None)]
