"""HQQ's HQQLinear as a frozen weight."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft_kernels.weights import HqqWeight

from .reading import Base, dense

PACKINGS = {"8bit_u8": 8, "4bit_u8": 4, "3bit_32": 3, "2bit_u8": 2, "1bit_u8": 1}


def reads(layer: type[nn.Module], weight: type) -> bool:
    module = sys.modules.get("hqq.core.quantize")
    return module is not None and layer is module.HQQLinear


def name(layer: Any) -> str:
    return "HQQ"


def frozen_base(layer: Any, x: Tensor, autocast: torch.dtype | None) -> Base | str:
    """As HQQ's PyTorch backends: decoded in the layer's compute_dtype, in which x must be unless autocast casts."""
    forward = type(layer).forward.__name__
    if not forward.startswith("forward_pytorch"):
        return f"a backend other than PyTorch's ({forward})"
    meta = layer.meta
    if not layer.ready or meta is None:
        return "a weight that is not quantised yet"
    if meta["packing"] not in PACKINGS or "scale" not in meta or "zero" not in meta:
        return f"packing {meta['packing']}, or scales that are quantised or offloaded themselves"
    if autocast is None and x.dtype != layer.compute_dtype:
        return f"input in {x.dtype}, compute_dtype {layer.compute_dtype}, no autocast"
    packed, scale, zero = layer.W_q.detach(), meta["scale"], meta["zero"]
    if scale.dtype != layer.compute_dtype:
        return f"scales in {scale.dtype}, compute_dtype {layer.compute_dtype}"
    if meta["view_as_float"]:
        packed = packed.view(meta["unpack_view_dtype"])
    if zero.dtype == torch.float32:  # made in inference mode and never cast since: no compiled graph can keep it
        zero = zero.clone()
    rows, columns = meta["shape"]
    dtype = autocast or x.dtype
    return HqqWeight(packed, scale, zero, PACKINGS[meta["packing"]], (rows, columns)), dtype, dtype


def dense_linear(layer: Any) -> nn.Linear:
    return dense(layer, layer.dequantize())
