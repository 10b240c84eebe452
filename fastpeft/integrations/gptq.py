"""gptqmodel's TorchLinear, the layer of its backend `gptq_torch`, as a frozen weight.

Its other layers rearrange the storage for kernels of their own, and are left to PEFT.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft_kernels.weights import PackedWeight

from .reading import Base, dense


def reads(layer: type[nn.Module], weight: type) -> bool:
    module = sys.modules.get("gptqmodel.nn_modules.qlinear.torch")
    return module is not None and layer is module.TorchLinear


def name(layer: Any) -> str:
    return "GPTQ"


def frozen_base(layer: Any, x: Tensor, autocast: torch.dtype | None) -> Base | str:
    """Decoded in the dtype of the scales, multiplied in that of x."""
    if layer.bits not in (2, 4, 8) or layer.planar or layer.pack_dtype != torch.int32:
        return f"{layer.bits} bits, planar or packed in {layer.pack_dtype}"
    if layer.qzero_format() != 2:
        return "zeros in their first format"
    if layer.adapter is not None or layer.online_full_had or layer.online_partial_had:
        return "an adapter of gptqmodel's own, or a rotated input"
    dtype = autocast or x.dtype
    return PackedWeight(layer.qweight, layer.qzeros, layer.scales, layer.g_idx, layer.bits, awq=False), dtype, dtype


def dense_linear(layer: Any) -> nn.Linear:
    return dense(layer, layer.dequantize_weight().t())
