"""Calls with a few tokens without gradients, as in generation: left to PEFT's forward, or to the model's own MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpeft_kernels.common.device import autocast_dtype

FEW_TOKENS = "a few tokens without gradients"
"""Under this name calls are counted that are left to PEFT, or to the model's MLP, by choice."""

FEW = 8
"""Tokens; on a GPU, where generation is not yet measured, and in 16 bits, where on many CPUs only so few are fast: see
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
