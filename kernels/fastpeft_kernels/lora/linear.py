"""One large product with its update, by what was measured to be fastest: a tile of our kernels, or the library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.bounded import recall
from ..tuning import choosing
from ..tuning.choosing import choice
from . import keys
from .configs import Config, linear_config, linear_tiles


def large_product(
    x: Tensor,
    w: Tensor,
    s: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None = None,
    *,
    more: Sequence[tuple[Tensor, Tensor]] = (),
    out: Tensor,
    accumulate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`x @ w.T + s @ b.T + bias`, and the products of `more`, into `out`; gradients must be off.

    Args:
        x, w, s, b, bias, more, out, accumulate: as `forward.lora_linear`; of one dtype unless `backend` is "triton".
        backend: a group's. With "auto" our kernels can be chosen for 16-bit products on a GPU.

    Returns:
        `out`.
    """
    pairs = [(x, w), *more]
    tile = _tile(pairs, out, () if s is None or b is None else (s, b), backend)
    if tile is None:
        library_linear(x, w, s, b, bias, out=out, accumulate=accumulate)
        for another_x, another_w in more:
            torch.addmm(out, another_x, another_w.t(), out=out)
        return out
    from .forward import lora_linear
    from .forward_tma import lora_linear_tma

    if tile.tma:
        return lora_linear_tma(pairs, s, b, bias, out, accumulate, tile)
    return lora_linear(x, w, s, b, bias, more=more, out=out, accumulate=accumulate, config=tile)


_tiles: dict[tuple[Any, ...], Config | None] = {}


def _tile(pairs: Sequence[tuple[Tensor, Tensor]], out: Tensor, update: Sequence[Tensor], backend: str) -> Config | None:
    """Of our kernel, None for the library; one that cannot serve (descriptors for unaligned rows) is not chosen.

    The first pair stands for all. Decided once for matrices of the same shapes and strides.
    """
    if backend == "library" or choosing.gathers() or (out.device.type != "cuda" and backend != "triton"):
        return _decide(pairs, out, update, backend)
    places = out.data_ptr()
    at = [choosing.state(), backend, out.device, len(pairs), out.dtype, out.shape, out.stride()]
    for t in (*[t for pair in pairs for t in pair], *update):
        places |= t.data_ptr()
        at += t.dtype, t.shape, t.stride()
    if places % 16:
        return _decide(pairs, out, update, backend)
    return recall(_tiles, tuple(at), lambda: _decide(pairs, out, update, backend))


def _decide(
    pairs: Sequence[tuple[Tensor, Tensor]], out: Tensor, update: Sequence[Tensor], backend: str
) -> Config | None:
    x, w = pairs[0]
    device, dtype, ours = x.device, x.dtype, backend == "triton"
    choosable = dtype.itemsize == 2 and backend != "library" and out.numel() > 0
    choosable = choosable and (ours or (out.dtype == dtype and keys.kernels_serve(device)))
    if not choosable or any([t.dtype != dtype for t in (*[t for pair in pairs for t in pair], *update)]):
        return linear_config(device, dtype, False) if ours else None
    summed = None if ours else sum([x.shape[1] for x, _ in pairs])
    name = measured(x.shape[0], w.shape, summed, dtype, device, w.stride(1) != 1)
    if name == "torch":
        if not ours:
            return None
        name = "triton"
    from .forward_tma import describable

    described = describable(pairs, out, *update)
    # Without descriptors our kernel is slower than the library's, and one of their tiles cannot be asked for.
    if not described and linear_tiles(device)[name].tma:
        return linear_config(device, dtype, False) if ours else None
    return linear_config(device, dtype, described) if name == "triton" else linear_tiles(device)[name]


def sums_products(
    tokens: int, weights: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device, backend: str
) -> bool:
    """Whether dX of several projections, weights (out_features, in_features), would be one product of our kernels.

    Up to `forward_tma.MOST_PAIRS`; the first stands for all where something was measured.
    """
    if backend == "library" or dtype.itemsize != 2 or not keys.kernels_serve(device):
        return False
    from .forward_tma import MOST_PAIRS

    if len(weights) > MOST_PAIRS:
        return False
    (out_features, in_features), summed = weights[0], sum(n for n, _ in weights)
    return backend == "triton" or measured(tokens, (in_features, out_features), summed, dtype, device, True) != "torch"


def measured(
    tokens: int, w: Sequence[int], summed: int | None, dtype: torch.dtype, device: torch.device, transposed: bool
) -> str:
    """What was measured for x w^T with w (out_features, in_features), else the default for `summed` features.

    Without `summed` the default is our kernel.
    """
    out_features, in_features = w

    def case() -> keys.LinearKey:
        return keys.linear_key(tokens, in_features, out_features, dtype, transposed)

    default = "triton" if summed is None else keys.default_linear(tokens, out_features, summed, device)
    return choice(keys.LINEAR, device, case, keys.linear_candidates, default)


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
