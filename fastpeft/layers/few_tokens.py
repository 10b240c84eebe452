"""Calls with a few tokens without gradients, as in generation: left to PEFT's forward, or to the model's own MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpeft_kernels.lora.projection import few_without_gradients

FEW_TOKENS = "a few tokens without gradients"
"""Under this name calls are counted that are left to PEFT, or to the model's MLP, by choice."""


def is_few(x: Any) -> bool:
    """As for each token that is generated; never while torch.compile traces, which would fix the size."""
    return type(x) is Tensor and x.dim() > 1 and few_without_gradients(x) and not torch.compiler.is_compiling()
