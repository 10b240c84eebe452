"""One large product of our own path, computed by what was measured to be fastest: a tile of our kernels, or cuBLAS."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tuning.choosing import choice
from ..tuning.keys import bucket, dtype_name
from .configs import linear_tiles
from .forward import lora_linear
from .forward_tma import describable
from .keys import LINEAR, LinearKey, linear_candidates


def chosen_linear(
    x: Tensor,
    w: Tensor,
    s: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None = None,
    *,
    out: Tensor,
    accumulate: bool = False,
) -> Tensor:
    """`lora_linear`, arguments and result as there; the analytic default where nothing was measured or can be chosen.

    A choice is for operands of one 16-bit dtype; one that cannot serve (descriptors for unaligned rows, the library for
    results in another dtype) is not taken.
    """
    operands = (x, w) if s is None or b is None else (x, w, s, b)
    if x.dtype.itemsize != 2 or any(t.dtype != x.dtype for t in operands):
        return lora_linear(x, w, s, b, bias, out=out, accumulate=accumulate)
    name = choice(LINEAR, x.device, lambda: _key(x, w), linear_candidates, "triton")
    if name == "torch" and out.dtype == x.dtype:
        return library_linear(x, w, s, b, bias, out=out, accumulate=accumulate)
    config = None if name in ("torch", "triton") else linear_tiles(x.device)[name]
    if config is not None and config.tma and not describable(x, w, out, *operands[2:]):
        config = None
    return lora_linear(x, w, s, b, bias, out=out, accumulate=accumulate, config=config)


def library_linear(
    x: Tensor,
    w: Tensor,
    s: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None = None,
    *,
    out: Tensor,
    accumulate: bool = False,
) -> Tensor:
    """The same by PyTorch's products, each rounded to the dtype of all operands; gradients must be off."""
    if accumulate:
        out.addmm_(x, w.t())
    else:
        torch.mm(x, w.t(), out=out)
    if bias is not None:
        out.add_(bias)
    return out if s is None or b is None else out.addmm_(s, b.t())


def _key(x: Tensor, w: Tensor) -> LinearKey:
    out_features, in_features = w.shape
    return LinearKey(bucket(x.shape[0]), in_features, out_features, dtype_name(x.dtype), w.stride(1) != 1)
