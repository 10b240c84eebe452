"""Calls with a few tokens without gradients, as in generation: PEFT's own products, and the model's own MLP.

`plain_forward` runs a layer's operations without calling the adapters' modules, which costs more than they compute, and
adds the update with its scaling in one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastpeft_kernels.common.device import autocast_dtype

from ..integrations import bitsandbytes
from .bypass import has_global_hooks, is_bare

FEW_TOKENS = "a few tokens without gradients"
"""Under this name calls are counted that are computed as PEFT does, or by the model's MLP, by choice."""

FEW = 8
"""Tokens; on a GPU, where no other number is measured, and in 16 bits, where on many CPUs only so few are fast: see
`product_dtype`."""

FEW_ELEMENTS = 1 << 16
"""Elements of the input, in fp32 on a CPU: what a call of ours costs does not depend on its size, what it saves does.

PEFT's time over ours without gradients, r = 16, on an EPYC with AVX2, one thread, busy machine, least of 25 and of 40
process times; one layer, q/k/v, and an MLP 2.75 times as wide:

    tokens of width 512:   16 .63 .69, .71 .74, .75 .80   64 .75 .67, .84 .85, .89 .98
                          128 .81 .88, .95 .95, 1.0 .96  256 .97 .91, .99 1.0, 1.1 1.0
    tokens of width 1024:  16 .76 .81, .84 .93, .92 1.0   32 .79 .76, .96 .93, 1.0 .97
                           64 .90 .89, .99 .98, .97 .99  128 .95 .99, 1.0 .98, 1.1 1.1
    width 2048, least of 15:  32 .96, .93   64 .97, 1.0   128 1.0, 1.0 (without the MLP)
"""


def is_few(x: Any) -> bool:
    """Whether x (..., in_features) is so little; never while torch.compile traces, which would fix the size."""
    if torch.is_grad_enabled() or type(x) is not Tensor or torch.compiler.is_compiling():
        return False
    shape = x.shape
    if len(shape) < 2:
        return False
    if x.numel() <= FEW * shape[-1]:
        return True
    plain = x.device.type == "cpu" and (autocast_dtype(x.device) or x.dtype) == torch.float32
    return plain and x.numel() <= FEW_ELEMENTS


def plain_forward(layer: Any, x: Tensor) -> Tensor | None:
    """What PEFT's forward of the layer returns, by the same products; None where that forward must be called.

    Args:
        layer: a `FastLoraLayer` that leaves few tokens.
        x: (..., in_features).
    """
    if not layer.plain_when_few or has_global_hooks():
        return None
    if layer._disable_adapters or layer.merged_adapters:
        return None if layer._disable_adapters and layer.merged_adapters else _base(layer, x)
    if layer.lora_variant:
        return None
    modules = layer._modules
    downs, ups, dropouts = modules["lora_A"]._modules, modules["lora_B"]._modules, modules["lora_dropout"]._modules
    factors = []
    for name in layer.active_adapters:
        if name not in downs:
            continue
        down, up, dropout = downs[name], ups[name], dropouts[name]
        idle = is_bare(dropout, nn.Identity) or (is_bare(dropout, nn.Dropout) and not dropout.training)
        if not (idle and is_bare(down, nn.Linear) and is_bare(up, nn.Linear)):
            return None
        factors.append((down._parameters, up._parameters, layer.scaling[name]))
    y = _base(layer, x)
    dtype, each = y.dtype, layer.over_four_bits and not torch.is_autocast_enabled()
    for a, b, scaling in factors:
        if x.dtype != a["weight"].dtype and layer.cast_input_dtype_enabled and (each or not layer.over_four_bits):
            x = x.to(a["weight"].dtype)
        update = linear(linear(x, a["weight"], a["bias"]), b["weight"], b["bias"])
        if each or type(scaling) is not float:
            y = y + (update * scaling).to(dtype) if each else y + update * scaling
        else:
            y = torch.add(y, update, alpha=scaling)  # rounded once
    return y if layer.over_four_bits else y.to(dtype)


def _base(layer: Any, x: Tensor) -> Tensor:
    """The base layer's output; on a CPU over 4 bits by our decoding, which is the faster one."""
    base = layer._modules["base_layer"]
    if is_bare(base, nn.Linear):
        parameters = base._parameters
        return linear(x, parameters["weight"], parameters["bias"])
    found = bitsandbytes.decoded_linear(base, x) if layer.over_four_bits and x.device.type == "cpu" else None
    return base(x) if found is None else found  # type: ignore[no-any-return]
