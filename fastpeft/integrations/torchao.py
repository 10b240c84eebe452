"""torchao's weight-only tensors, int8 and fewer bits in int8 and float8, in an nn.Linear, as frozen weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpeft_kernels.weights import ScaledWeight

from .reading import Base, dense

INT8, FLOAT8, FEW_BITS = "Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor"


def reads(layer: type[nn.Module], weight: type) -> bool:
    ours = weight.__module__.startswith("torchao.") and weight.__name__ in (INT8, FLOAT8, FEW_BITS)
    return ours and layer is nn.Linear


def name(layer: Any) -> str:
    kind = type(layer.weight).__name__
    if kind == FEW_BITS:
        return f"torchao {str(layer.weight.target_dtype).removeprefix('torch.')}"
    return "torchao int8" if kind == INT8 else "torchao float8"


def frozen_base(layer: Any, x: Tensor, autocast: torch.dtype | None) -> Base | str:
    """Int8Tensor multiplies in the dtype of x and returns it under autocast too; the others are like a matrix.

    But Float8Tensor adds its bias to the product, so that the wider dtype of the two comes out.
    """
    weight = layer.weight
    kind = type(weight).__name__
    for attribute in ("act_quant_kwargs", "activation_quantization", "act_pre_scale"):
        if getattr(weight, attribute, None) is not None:
            return f"a weight whose product quantises or scales the input too ({attribute})"
    if weight.requires_grad:
        return "the base weight is trained"
    if kind != INT8 and autocast is None and weight.dtype != x.dtype:
        return f"input in {x.dtype}, base weight in {weight.dtype}, no autocast"
    dtype = out = autocast or x.dtype
    if kind == INT8:
        out = x.dtype
    elif kind == FLOAT8 and layer.bias is not None:
        out = torch.promote_types(dtype, layer.bias.dtype)
    return _weight(weight), dtype, out


def dense_linear(layer: Any) -> nn.Linear:
    weight = layer.weight
    if type(weight).__name__ == FEW_BITS:  # decodes to its own dtype only
        return dense(layer, weight.to(torch.float32).dequantize())
    return dense(layer, weight.dequantize(torch.float32))


def _weight(weight: Any) -> ScaledWeight:
    codes, scale, zero = weight.qdata, weight.scale, getattr(weight, "zero_point", None)
    rows, columns = (min(size, most) for size, most in zip(weight.block_size, codes.shape, strict=True))
    if rows < 1 or columns < 1:
        raise ValueError(f"blocks of {tuple(weight.block_size)} in a matrix of {tuple(codes.shape)}")
    blocks = (-(codes.shape[0] // -rows), -(codes.shape[1] // -columns))
    zero = None if zero is None else _of_blocks(zero, blocks)
    return ScaledWeight(codes, _of_blocks(scale, blocks), zero, block=(rows, columns), dtype=weight.dtype)


def _of_blocks(statistics: Tensor, blocks: tuple[int, int]) -> Tensor:
    """In this shape, where there is one for each block."""
    return statistics.reshape(blocks) if statistics.numel() == blocks[0] * blocks[1] else statistics
