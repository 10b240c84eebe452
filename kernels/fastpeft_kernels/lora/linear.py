"""One large product with its update, by what was measured to be fastest: a tile of our kernels, or the library."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tuning.choosing import choice
from . import keys
from .configs import linear_tiles


def large_product(
    x: Tensor,
    w: Tensor,
    s: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None = None,
    *,
    out: Tensor,
    accumulate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`x @ w.T + s @ b.T + bias` into `out`; gradients must be off.

    Args:
        x, w, s, b, bias, out, accumulate: as for `forward.lora_linear`; of one dtype unless `backend` is "triton".
        backend: a group's. With "auto" our kernels can be chosen for 16-bit products on a GPU.

    Returns:
        `out`.
    """
    operands = (x, w, out) if s is None or b is None else (x, w, out, s, b)
    name = _chosen(operands, backend)
    if name == "torch":
        return library_linear(x, w, s, b, bias, out=out, accumulate=accumulate)
    from .forward import lora_linear

    config = None if name == "triton" else linear_tiles(x.device)[name]
    return lora_linear(x, w, s, b, bias, out=out, accumulate=accumulate, config=config)


def _chosen(operands: tuple[Tensor, ...], backend: str) -> str:
    """One of `keys.linear_candidates`; one that cannot serve (descriptors for unaligned rows) is not chosen.

    The first three operands are those that every product has.
    """
    x, w, out, *_ = operands
    ours = backend == "triton"
    choosable = x.dtype.itemsize == 2 and all(t.dtype == x.dtype for t in operands if t is not out)
    choosable = choosable and (ours or (out.dtype == x.dtype and keys.kernels_serve(x.device)))
    if backend == "library" or not choosable or out.numel() == 0:
        return "triton" if ours else "torch"
    default = "triton" if ours else keys.default_linear(x.device)
    name = choice(keys.LINEAR, x.device, lambda: keys.linear_key(x, w), keys.linear_candidates, default)
    if ours and name == "torch":
        return default
    if name in ("torch", "triton") or not linear_tiles(x.device)[name].tma:
        return name
    from .forward_tma import describable

    return name if describable([(x, w)], out, *operands[3:]) else default


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
    """The same by PyTorch's products, each rounded to the dtype of all operands.

    The update comes first: the large product reads what it adds to while it multiplies.
    """
    if s is not None and b is not None:
        library_linear(s, b, None, None, bias, out=out, accumulate=accumulate)
        return torch.addmm(out, x, w.t(), out=out)
    if accumulate:
        torch.addmm(out, x, w.t(), out=out)
        return out if bias is None else out.add_(bias)
    return torch.mm(x, w.t(), out=out) if bias is None else torch.addmm(bias, x, w.t(), out=out)
