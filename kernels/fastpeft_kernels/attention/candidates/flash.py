"""What the packages of FlashAttention have in common: T. Dao, github.com/Dao-AILab/flash-attention.

They take (batch, tokens, heads, features) in 16 bits, grouped heads, a soft cap, and a window, counted from the last
key as `Mask.left` and `Mask.right` are. None takes intervals of keys for each query, marks of keys, or additive
biases. What rows that see nothing pass on is not documented, so there must be none.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from ...common.device import device_capability
from .request import Request


@lru_cache
def function_of(module: str) -> Callable[..., Any] | str:
    """`flash_attn_func` of a module, imported at the first call; or why there is none."""
    try:
        function: Callable[..., Any] = importlib.import_module(module).flash_attn_func
    except (ImportError, OSError, AttributeError) as error:  # OSError: built for another torch
        return f"{module} cannot be used: {type(error).__name__}: {str(error).partition(chr(10))[0][:100]}"
    return function


def absence(module: str, device: torch.device, capabilities: range) -> str | None:
    """Why `module` is not to be had on a device; `capabilities` are those that it is built for."""
    capability = device_capability(device)
    if capability is None:
        return f"expected q on an NVIDIA GPU, got {device}"
    if capability not in capabilities:
        return f"expected a compute capability that {module} is built for, got {capability / 10}"
    function = function_of(module)
    return function if isinstance(function, str) else None


def version_of(*distributions: str) -> str:
    """Of the first that is installed; "unknown" where none is, as in a source tree."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def refusal(request: Request, largest_head: int, multiple: int) -> str | None:
    """What none of them can do, and heads of up to so many features, a multiple of such a number."""
    q, k, v, mask, scores = request[:5]
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"expected fp16 or bf16, got {q.dtype}"
    features = q.shape[3]
    if v.shape[3] != features or features > largest_head or features % multiple:
        return (
            f"expected heads of a multiple of {multiple} up to {largest_head} features, got {features} and {v.shape[3]}"
        )
    if mask.start is not None or mask.keys is not None or mask.dense is not None:
        return "expected a mask of bounds alone"
    for name, bound in (("left", mask.left), ("right", mask.right)):
        if bound is not None and bound < 0:  # which means none to them
            return f"expected mask.{name} of 0 or more, got {bound}"
    if mask.right is not None and q.shape[2] > k.shape[2] + mask.right:
        return "expected no query that sees no key"
    if scores.relative is not None or scores.bias is not None:
        return "expected no biases"
    if scores.scale <= 0.0:  # they take the largest product for the largest score
        return f"expected a scale above 0, got {scores.scale}"
    if scores.dropout > 0.0 and (scores.seed is not None or scores.softcap is not None):
        return "expected dropout without a seed, which is drawn from torch's generator, and without softcap"
    return None


def call(module: str, request: Request, none: int | None, **more: Any) -> Tensor:
    """
    Args:
        module: of `function_of`.
        none: what stands for no bound in its `window_size`.
        more: arguments that not all of them have.
    """
    q, k, v, mask, scores = request[:5]
    function = function_of(module)
    assert not isinstance(function, str)
    if scores.softcap is not None:  # not in all versions
        more["softcap"] = float(scores.softcap)
    found = function(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        softmax_scale=scores.scale,
        causal=mask.right == 0,
        window_size=(none if mask.left is None else mask.left, none if mask.right is None else mask.right),
        deterministic=request.deterministic,
        **more,
    )
    out: Tensor = found[0] if isinstance(found, tuple) else found  # some versions give the lse with it
    return out.contiguous().transpose(1, 2)
