"""Groups whose products are the library's, where the host's time often decides: by C++ that calls torch's operations.

The same operations in the same order as `library.py` (native/group.cpp), and so the same bits; it takes over as soon as
it is compiled.
Measured on an EPYC, 4 tokens of 64 features, forward and backward of q, k and v: 1.2 ms in place of 4.0, and 1.0 of
plain PyTorch on the same busy machine.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..common.bounded import recall
from ..common.shapes import kind_of
from ..native.extension import group_extension
from ..native.skinny import SMALLEST
from ..tuning import choosing
from ..weights import DenseWeight, FrozenWeight
from . import mixed_native, mixed_packing, parts
from .frozen_products import large_input_gradient
from .keys import kernels_serve
from .linear import measured, sums_products
from .mixed_products import MixedProducts
from .projection import Group, LoraProjection, Packed
from .rank_products import chosen
from .remade import Remade

ALL, BUT_DX = "all", "all but dX"
_decided: dict[tuple[Any, ...], str | None] = {}


def serves(x: Tensor, group: Group) -> str | None:
    """What `apply` computes as the library would, ALL or BUT_DX, if it is there; else None.

    torch's compiled autograd takes no C++ node that holds what ours does.
    """
    return _if_there(fits(x, group))


def fits(x: Tensor, group: Group) -> str | None:
    """The same, whether or not it is compiled yet."""
    return _fits(x.numel() // max(x.shape[-1], 1), x.device, group)


def _if_there(found: str | None) -> str | None:
    return None if found is None or _backward_is_compiled() or group_extension() is None else found


def _fits(tokens: int, device: torch.device, group: Group) -> str | None:
    if group.one_a or group.backend == "triton" or choosing.gathers():
        return None
    at = (choosing.state(), tokens, device)
    return recall(group.served, at, lambda: _fits_plainly(tokens, device, group))


def _fits_plainly(tokens: int, device: torch.device, group: Group) -> str | None:
    most = 1 if group.adapter_index is None else math.inf
    if any([seed is not None for seed in group.seeds]) or not all([_is_plain(p, most) for p in group.projections]):
        return None
    return _small(tokens, device, group)


def apply(x: Tensor, group: Group, served: str = ALL, made: Remade | None = None) -> tuple[Tensor, ...]:
    """`autograd.apply` of a group that is served; with BUT_DX its dX is made by `large_input_gradient`."""
    weights = [projection.weight for projection in group.projections]
    mixed: tuple[Any, ...] = (None, None, (1.0, None))
    if group.adapter_index is not None:
        rows = mixed_native.rows(group, x.numel() // max(x.shape[-1], 1))
        mixed = (rows, mixed_native.owned(group), mixed_packing.scalings(group))
    found: list[Tensor] = _projections(group).apply(
        x,
        partial(_check_unchanged, weights, [weight.stamp() for weight in weights]),
        None if served == ALL else partial(_input_gradient, group),
        *(made or (None, "")),
        *mixed,
    )
    return tuple(found)


def project(
    outputs: Sequence[Tensor], x: Tensor, group: Group, packed: Packed, s: Tensor | None
) -> tuple[Tensor | None] | None:
    """(S,) of `library.forward_into`, where this serves; else None, and nothing is done."""
    if group.adapter_index is not None or serves(x, group) is None:
        return None
    return (_projections(group).project(outputs, x, packed.a, packed.b, s),)


def derive(
    s: Tensor | None,
    dys: Sequence[Tensor | None],
    group: Group,
    packed: Packed,
    dx_dtype: torch.dtype | None,
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor | None, Tensor | None, list[list[Tensor | None]]] | None:
    """`library.backward_without_input` with gradients of rows that are contiguous, where this serves; else None."""
    like = next((dy for dy in dys if dy is not None), None)
    if like is None or group.adapter_index is not None or any([flags[0] for flags in needs]):  # of a bias
        return None
    if _if_there(_fits(like.shape[0], like.device, group)) != ALL:
        return None
    trains_b = [s is not None and flags[2] for p, flags in zip(group.projections, needs, strict=True) if p.adapters]
    dx, ds, dbs = _projections(group).derive(s, dys, packed.a, packed.b, dx_dtype, trains_b)
    grads: list[list[Tensor | None]] = [[None] * len(flags) for flags in needs]
    each = iter(dbs)
    for projection, found in zip(group.projections, grads, strict=True):
        if projection.adapters:
            found[2] = next(each)
    return dx, ds, grads


def down_gradients(
    ds: Tensor, x: Tensor, group: Group, needs: Sequence[Sequence[bool]], grads: list[list[Tensor | None]]
) -> bool:
    """`library.down_gradients`, and True, where this serves; else False, and nothing is done."""
    if group.adapter_index is not None or _if_there(_fits(x.shape[0], x.device, group)) is None:
        return False
    adapted = [i for i, projection in enumerate(group.projections) if projection.adapters]
    trained = [needs[i][1] for i in adapted]
    if True in trained:
        for i, da in zip(adapted, _projections(group).down_gradients(ds, x, trained), strict=True):
            grads[i][1] = da
    return True


def packs(tokens: int, group: Group) -> bool:
    """Whether the group's products for so many tokens are made here, so that a launch of our own costs more."""
    return _if_there(_fits(tokens, group.projections[0].weight.device, group)) is not None


def _projections(group: Group) -> Any:
    """The group as C++ takes it, which the group keeps."""
    if not group.native:
        group.native.append(_made(group))
    return group.native[0]


def _made(group: Group) -> Any:
    extension, projections, dtypes = group_extension(), group.projections, group.dtypes
    assert extension is not None
    weights = [projection.weight for projection in projections]
    dense = [weight.weight if type(weight) is DenseWeight else None for weight in weights]
    adapters = [adapter for projection in projections for adapter in projection.adapters]
    return extension.Projections(
        dense,
        [
            None if d is not None else partial(parts.decoded, w, dtypes.compute)
            for d, w in zip(dense, weights, strict=True)
        ],
        [projection.bias for projection in projections],
        [weight.shape[0] for weight in weights],
        [len(projection.adapters) for projection in projections],
        [adapter.a for adapter in adapters],
        [adapter.b for adapter in adapters],
        [adapter.scaling for adapter in adapters],
        dtypes.compute,
        dtypes.lora,
        dtypes.out,
    )


def pack(group: Group) -> Packed | None:
    """`parts.pack`, where each projection has one adapter at most, of what every adapter has, and C++ is there."""
    for projection in group.projections:
        if len(projection.adapters) > 1:
            return None
        for adapter in projection.adapters:
            if adapter.bias is not None or isinstance(adapter.scaling, Tensor) or not adapter.rank:
                return None
    if group_extension() is None:
        return None
    a, b = _projections(group).pack()
    return Packed(a, b, [None] * len(b))


def _input_gradient(
    group: Group, dys: Sequence[Tensor | None], ds: Tensor | None, a: Tensor | None, dx_dtype: torch.dtype
) -> Tensor | None:
    return large_input_gradient(dys, ds, group, Packed(a, [], []), dx_dtype)


def _backward_is_compiled() -> bool:
    state = sys.modules.get("torch._dynamo.compiled_autograd")
    return state is not None and bool(getattr(state, "compiled_autograd_enabled", False))


def _check_unchanged(weights: Sequence[FrozenWeight], stamps: Sequence[Any]) -> None:
    for weight, stamp in zip(weights, stamps, strict=True):
        weight.check_unchanged(stamp)


def _is_plain(projection: LoraProjection, most: float) -> bool:
    """Up to `most` adapters, of what every adapter has; a frozen bias; a weight that has only its values to give."""
    adapters, bias = projection.adapters, projection.bias
    if len(adapters) > most or projection.magnitude is not None or (bias is not None and bias.requires_grad):
        return False
    for adapter in adapters:
        if adapter.bias is not None or not adapter.rank or not isinstance(adapter.scaling, (int, float)):
            return False
    return _has_values_only(type(projection.weight))


@cache
def _has_values_only(kind: type[FrozenWeight]) -> bool:
    """No product of its own, and nothing to bring before a use."""
    names = ("linear", "linear_t", "prefetch", "release")
    return all(getattr(kind, name) is getattr(FrozenWeight, name) for name in names)


def _small(tokens: int, device: torch.device, group: Group) -> str | None:
    """What the library alone would compute: by default for matrices of few elements, and if chosen so."""
    sizes = tuple([p.weight.shape for p in group.projections])
    batch = None if group.adapter_index is None else len(group.adapter_index)
    at = (choosing.state(), device, tokens, batch, sizes, group.widths(), group.dtypes, group.backend)
    return recall(_decided, at, lambda: _decide(tokens, device, group))


def _decide(tokens: int, device: torch.device, group: Group) -> str | None:
    dtypes, in_features = group.dtypes, group.projections[0].weight.shape[1]
    shapes, mixed = [projection.weight.shape for projection in group.projections], group.adapter_index is not None
    if device.type != "cuda":
        widest = max(in_features, *[shape[0] for shape in shapes])
        return ALL if kind_of(device) == "cpu" and (mixed or tokens * widest < SMALLEST) else None
    narrow = [(in_features, sum(group.widths())), *[(n, r) for (n, _), r in zip(shapes, group.widths(), strict=True)]]
    if mixed:
        products = MixedProducts(group, tokens)
        ours = [products.ours(features, rank, dtypes.lora) for features, rank in narrow]
    else:
        ours = [r > 0 and chosen(tokens, features, r, dtypes.lora, device, False) == "triton" for features, r in narrow]
    if any(ours):
        return None
    if dtypes.compute.itemsize != 2 or not kernels_serve(device) or group.large_backend == "library":
        return ALL

    def is_ours(w: tuple[int, int], transposed: bool) -> bool:
        return measured(tokens, w, w[1], dtypes.compute, device, transposed) != "torch"

    if any([is_ours((out_features, in_features), False) for out_features, _ in shapes]):
        return None
    summed = sums_products(tokens, shapes, dtypes.compute, device, group.large_backend)
    return BUT_DX if summed or any([is_ours((in_features, n), True) for n, _ in shapes]) else ALL
