"""Groups whose products are small, where the host's time decides: by C++ that calls torch's operations.

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

from torch import Tensor

from ..common.shapes import kind_of
from ..native.extension import group_extension
from ..native.skinny import SMALLEST
from ..tuning import choosing
from ..weights import DenseWeight, FrozenWeight
from . import mixed_native, mixed_packing, parts
from .keys import kernels_serve
from .linear import measured, sums_products
from .mixed_products import MixedProducts
from .projection import Group, LoraProjection
from .rank_products import chosen

_decided: dict[tuple[Any, ...], bool] = {}
_MOST_DECIDED = 256


def serves(x: Tensor, group: Group) -> bool:
    """Whether `apply` computes what the library would, and is there.

    torch's compiled autograd takes no C++ node that holds what ours does.
    """
    return fits(x, group) and not _backward_is_compiled() and group_extension() is not None


def fits(x: Tensor, group: Group) -> bool:
    """The same, whether or not it is compiled yet."""
    if group.one_a or group.backend == "triton" or choosing.gathers():
        return False
    most = 1 if group.adapter_index is None else math.inf
    if any([seed is not None for seed in group.seeds]) or not all([_is_plain(p, most) for p in group.projections]):
        return False
    return _small(x, group)


def apply(x: Tensor, group: Group) -> tuple[Tensor, ...]:
    """`autograd.apply` of a group that is served."""
    extension, projections, dtypes = group_extension(), group.projections, group.dtypes
    assert extension is not None
    weights = [projection.weight for projection in projections]
    dense = [weight.weight if type(weight) is DenseWeight else None for weight in weights]
    adapters = [adapter for projection in projections for adapter in projection.adapters]
    mixed: tuple[Any, ...] = (None, None, (1.0, None))
    if group.adapter_index is not None:
        rows = mixed_native.rows(group, x.numel() // max(x.shape[-1], 1))
        mixed = (rows, mixed_native.owned(group), mixed_packing.scalings(group))
    found: list[Tensor] = extension.apply(
        x,
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
        partial(_check_unchanged, weights, [weight.stamp() for weight in weights]),
        *mixed,
    )
    return tuple(found)


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


def _small(x: Tensor, group: Group) -> bool:
    """Whether the library alone would compute the group: by default for matrices of few elements, and if chosen so."""
    rows = x.numel() // max(x.shape[-1], 1)
    sizes = tuple([p.weight.shape for p in group.projections])
    batch = None if group.adapter_index is None else len(group.adapter_index)
    at = (choosing.state(), x.device, rows, batch, sizes, group.widths(), group.dtypes, group.backend)
    found = _decided.get(at)
    if found is None:
        for oldest in list(_decided)[: max(0, len(_decided) + 1 - _MOST_DECIDED)]:
            _decided.pop(oldest, None)
        found = _decided[at] = _decide(x, rows, group)
    return found


def _decide(x: Tensor, tokens: int, group: Group) -> bool:
    device, dtypes, in_features = x.device, group.dtypes, x.shape[-1]
    shapes, mixed = [projection.weight.shape for projection in group.projections], group.adapter_index is not None
    if device.type != "cuda":
        widest = max(in_features, *[shape[0] for shape in shapes])
        return kind_of(device) == "cpu" and (mixed or tokens * widest < SMALLEST)
    narrow = [(in_features, sum(group.widths())), *[(n, r) for (n, _), r in zip(shapes, group.widths(), strict=True)]]
    if mixed:
        products = MixedProducts(group, tokens)
        ours = [products.ours(features, rank, dtypes.lora) for features, rank in narrow]
    else:
        ours = [r > 0 and chosen(tokens, features, r, dtypes.lora, device, False) == "triton" for features, r in narrow]
    if any(ours):
        return False
    if dtypes.compute.itemsize != 2 or not kernels_serve(device) or group.large_backend == "library":
        return True
    if sums_products(tokens, shapes, dtypes.compute, device, group.large_backend):
        return False
    return not any(
        measured(tokens, w, w[1], dtypes.compute, device, transposed) != "torch"
        for out_features, _ in shapes
        for w, transposed in (((out_features, in_features), False), ((in_features, out_features), True))
    )
