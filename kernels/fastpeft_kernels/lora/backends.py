"""Who may compute a group's products: the library, our Triton kernels, or for each product what was measured."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.device import device_capability, hopper_dots_safe, triton_available
from ..common.random import TRITON_DTYPES
from ..common.tracing import as_op
from .keys import FIRST_CAPABILITY
from .projection import Group

BACKENDS = ("auto", "library", "triton")


def check_backend(x: Tensor, group: Group) -> None:
    """Raise ValueError where `group.backend` is unknown or cannot serve."""
    if group.backend not in BACKENDS:
        raise ValueError(f"backend: expected 'auto', 'library' or 'triton', got {group.backend!r}")
    if group.backend != "triton":
        return
    if not triton_available():
        raise ValueError("backend: 'triton' needs Triton, which cannot be imported here")
    if as_op():
        raise ValueError("backend: 'triton' cannot be traced yet, got it under torch.compile or a dispatch mode")
    if reason := triton_refusal(x, group):
        raise ValueError(f"backend: 'triton' cannot serve this group: {reason}")


def triton_refusal(x: Tensor, group: Group) -> str | None:
    """Why our kernels cannot compute all products of the group; None when they can."""
    import triton

    from .forward import lora_down_fwd_kernel

    if x.device.type not in ("cpu", "cuda"):
        return f"expected x on a GPU that Triton serves, got {x.device}"
    if x.device.type == "cpu" and isinstance(lora_down_fwd_kernel, triton.runtime.JITFunction):
        return "expected x on a GPU (or Triton's interpreter), got a tensor on the CPU"
    capability = device_capability(x.device)
    if capability is not None and capability < FIRST_CAPABILITY:
        return f"expected compute capability 8.0 or later, where Triton has tensor cores, got {capability / 10}"
    dtypes, parameters = group.dtypes, {a.a.dtype for projection in group.projections for a in projection.adapters}
    for dtype in {x.dtype, dtypes.compute, dtypes.lora, dtypes.out, *parameters}:
        if dtype not in TRITON_DTYPES:
            return f"expected fp16, bf16 or fp32 throughout, got {dtype}"
        if x.device.type == "cpu" and dtype == torch.bfloat16:
            return f"expected fp32 or fp16 in Triton's interpreter, which computes bf16 wrongly, got {dtype}"
    if x.device.type == "cuda" and torch.float32 in (dtypes.compute, dtypes.lora):
        return "expected fp16 or bf16 products on a GPU, got torch.float32, in which cuBLAS is faster and more exact"
    return hopper_dots_safe(x.device) if group.drops else None
