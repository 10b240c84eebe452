"""transformers' FP8Linear with random codes, and its product on a CPU, where the library has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import finegrained_fp8 as library
from transformers.integrations.finegrained_fp8 import FP8Linear


def fp8_linear(linear: nn.Linear, block: tuple[int, int] | None = (32, 32), scale_fmt: str = "float") -> Any:
    """The layer with random codes and scales of a usual size, and the bias of `linear`."""
    out_features, in_features = linear.weight.shape
    layer: Any = FP8Linear(in_features, out_features, block, scale_fmt=scale_fmt, has_bias=linear.bias is not None)
    layer.requires_grad_(False)
    layer.weight.copy_(torch.randn(out_features, in_features) * 100)
    layer.weight_scale_inv.copy_(torch.rand(layer.weight_scale_inv.shape) * 1e-3 + 1e-4)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return layer


def product(
    input: Tensor, weight: Tensor, scale: Tensor, block_size: Any = None, bias: Any = None, *_: Any, **__: Any
) -> Tensor:
    """What the library's kernels compute on a GPU: x in e4m3 too, in blocks along each row."""
    width = block_size[1]
    blocks = input.detach().unflatten(-1, (-1, width)).double()
    steps = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    x = ((blocks / steps).float().to(torch.float8_e4m3fn).double() * steps).flatten(-2)
    w = library._dequantize_fp8_weight(weight, scale, block_size, torch.float64)
    y = (x.to(input.dtype) @ w.to(input.dtype).t()).to(input.dtype)
    return y if bias is None else y + bias
