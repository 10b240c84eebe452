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
    default: str = "triton",
) -> Tensor:
    """`lora_linear`, arguments and result as there, by `default` where nothing was measured.

    A choice is for operands of one 16-bit dtype; one that cannot serve (descriptors for unaligned rows, the library for
    results in another dtype) is not taken.
    """
    operands = (x, w) if s is None or b is None else (x, w, s, b)
    if x.dtype.itemsize != 2 or any(t.dtype != x.dtype for t in operands):
        return lora_linear(x, w, s, b, bias, out=out, accumulate=accumulate)
    name = choice(LINEAR, x.device, lambda: _key(x, w), linear_candidates, default)
    config = None if name in ("torch", "triton") else linear_tiles(x.device)[name]
    if config is not None and config.tma and not describable([(x, w)], out, *operands[2:]):
        name, config = default, None
    if name == "torch" and out.dtype == x.dtype:
        return library_linear(x, w, s, b, bias, out=out, accumulate=accumulate)
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
    """The same by PyTorch's products, each rounded to the dtype of all operands; gradients must be off.

    The update comes first: the large product reads what it adds to while it multiplies.
    """
    if s is None or b is None:
        if accumulate:
            out.addmm_(x, w.t())
        else:
            torch.mm(x, w.t(), out=out)
        return out if bias is None else out.add_(bias)
    if accumulate:
        out.addmm_(s, b.t())
        if bias is not None:
            out.add_(bias)
    elif bias is None:
        torch.mm(s, b.t(), out=out)
    else:
        torch.addmm(bias, s, b.t(), out=out)
    return out.addmm_(x, w.t())


def _key(x: Tensor, w: Tensor) -> LinearKey:
    out_features, in_features = w.shape
    return LinearKey(bucket(x.shape[0]), in_features, out_features, dtype_name(x.dtype), w.stride(1) != 1)
