"""gptqmodel's AwqTorchLinear, the layer of its backend `awq_torch`, as a frozen weight.

Its other layers have kernels of their own, and are left to PEFT. PEFT knows no other library for AWQ.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft_kernels.weights import PackedWeight

from .reading import Base, dense


def reads(layer: type[nn.Module], weight: type) -> bool:
    module = sys.modules.get("gptqmodel.nn_modules.qlinear.torch_awq")
    return module is not None and layer is module.AwqTorchLinear


def name(layer: Any) -> str:
    return "AWQ"


def frozen_base(layer: Any, x: Tensor, autocast: torch.dtype | None) -> Base | str:
    """Decoded and multiplied in the dtype of x, an fp32 one in fp16 (under autocast in its dtype); out as x."""
    if layer.adapter is not None:
        return "an adapter of gptqmodel's own"
    dtype = torch.float16 if x.dtype == torch.float32 else x.dtype
    scales = layer.scales.to(dtype)  # the layer casts its own for good, at its first call
    group = layer.group_size if layer.group_size > 0 else layer.in_features
    frozen = PackedWeight(layer.qweight, layer.qzeros, scales, group, layer.bits, awq=True)
    return frozen, autocast or dtype, x.dtype


def dense_linear(layer: Any) -> nn.Linear:
    decode = sys.modules[type(layer).__module__].dequantize_gemm  # type: ignore[attr-defined]
    return dense(layer, decode(layer.qweight, layer.qzeros, layer.scales, layer.bits, layer.group_size).t())
