"""Whether the Triton kernels can serve."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.device import device_capability, hopper_dots_safe, triton_available
from ..common.random import TRITON_DTYPES
from .masks import Mask
from .scores import Scores
from .tiles import LARGEST_HEAD

_FIRST_CAPABILITY = 80
_MOST_TOKENS = 2**30
_PROVED = ((12, 8),)
"""Assemblers before 13.3 that passed every check on an H200: Triton 3.6's own."""


def triton_refusal(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scores: Scores) -> str | None:
    """Why the kernels can't serve, as one clause; None when they can. The arguments are valid otherwise."""
    if not triton_available():
        return "Triton cannot be imported here"
    if q.device.type not in ("cpu", "cuda"):
        return f"expected q on a GPU that Triton serves, got {q.device}"
    if q.device.type == "cpu" and not _interprets():
        return "expected q on a GPU (or Triton's interpreter), got a tensor on the CPU"
    capability = device_capability(q.device)
    if capability is not None and capability < _FIRST_CAPABILITY:
        return f"expected compute capability 8.0 or later, where Triton has tensor cores, got {capability / 10}"
    added = [t for t in (scores.relative, scores.bias, scores.sinks) if t is not None]
    for dtype in {t.dtype for t in (q, k, v, *added)}:
        if dtype not in TRITON_DTYPES:
            return f"expected fp16, bf16 or fp32 throughout, got {dtype}"
        if q.device.type == "cpu" and dtype == torch.bfloat16:
            return f"expected fp32 or fp16 in Triton's interpreter, which computes bf16 wrongly, got {dtype}"
    if q.device.type == "cuda" and q.dtype == torch.float32:
        return (
            "expected fp16 or bf16 on a GPU, got torch.float32, whose gradients would err more than twice as PyTorch's"
        )
    if not q.dtype == k.dtype == v.dtype:
        return f"expected q, k and v of one dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
    features = max(q.shape[-1], v.shape[-1])
    if not 1 <= min(q.shape[-1], v.shape[-1]) <= features <= LARGEST_HEAD:
        return f"expected heads of 1 to {LARGEST_HEAD} features, got {q.shape[-1]} and {v.shape[-1]}"
    if q.shape[2] + k.shape[2] > _MOST_TOKENS:
        return f"expected at most {_MOST_TOKENS} queries and keys together, got {q.shape[2] + k.shape[2]}"
    return hopper_dots_safe(q.device, _PROVED)


def _interprets() -> bool:
    import triton

    from .forward import attention_fwd_kernel

    return not isinstance(attention_fwd_kernel, triton.runtime.JITFunction)
