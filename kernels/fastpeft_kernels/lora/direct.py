"""Groups whose products are small, where the host's time decides: by C++ that calls torch's operations.

The same operations in the same order as `library.py` (native/group.cpp), and so the same bits; it takes over as soon as
it is compiled.
Measured on an EPYC, 4 tokens of 64 features, forward and backward of q, k and v: 1.2 ms in place of 4.0, and 1.0 of
plain PyTorch on the same busy machine.
"""

from __future__ import annotations

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
from . import parts
from .keys import kernels_serve
from .linear import measured, sums_products
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
    if group.adapter_index is not None or group.one_a or group.backend == "triton" or choosing.gathers():
        return False
    if any([seed is not None for seed in group.seeds]) or not all([_is_plain(p) for p in group.projections]):
        return False
    return _small(x, group)


def apply(x: Tensor, group: Group) -> tuple[Tensor, ...]:
    """`autograd.apply` of a group that is served."""
    extension, projections, dtypes = group_extension(), group.projections, group.dtypes
    assert extension is not None
    weights = [projection.weight for projection in projections]
    dense = [weight.weight if type(weight) is DenseWeight else None for weight in weights]
    adapters = [projection.adapters[0] if projection.adapters else None for projection in projections]
    found: list[Tensor] = extension.apply(
        x,
        dense,
        [
            None if d is not None else partial(parts.decoded, w, dtypes.compute)
            for d, w in zip(dense, weights, strict=True)
        ],
        [projection.bias for projection in projections],
        [weight.shape[0] for weight in weights],
        [None if adapter is None else adapter.a for adapter in adapters],
        [None if adapter is None else adapter.b for adapter in adapters],
        [1.0 if adapter is None else adapter.scaling for adapter in adapters],
        dtypes.compute,
        dtypes.lora,
        dtypes.out,
        partial(_check_unchanged, weights, [weight.stamp() for weight in weights]),
    )
    return tuple(found)


def _backward_is_compiled() -> bool:
    state = sys.modules.get("torch._dynamo.compiled_autograd")
    return state is not None and bool(getattr(state, "compiled_autograd_enabled", False))


def _check_unchanged(weights: Sequence[FrozenWeight], stamps: Sequence[Any]) -> None:
    for weight, stamp in zip(weights, stamps, strict=True):
        weight.check_unchanged(stamp)


def _is_plain(projection: LoraProjection) -> bool:
    """One adapter or none, of what every adapter has; a frozen bias; a weight that has only its values to give."""
    adapters, bias = projection.adapters, projection.bias
    if len(adapters) > 1 or projection.magnitude is not None or (bias is not None and bias.requires_grad):
        return False
    if adapters:
        adapter = adapters[0]
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
    sizes = tuple([(p.weight.shape, p.rank) for p in group.projections])
    at = (choosing.state(), x.device, rows, sizes, group.dtypes, group.backend)
    found = _decided.get(at)
    if found is None:
        for oldest in list(_decided)[: max(0, len(_decided) + 1 - _MOST_DECIDED)]:
            _decided.pop(oldest, None)
        found = _decided[at] = _decide(x, rows, group)
    return found


def _decide(x: Tensor, tokens: int, group: Group) -> bool:
    device, dtypes, in_features = x.device, group.dtypes, x.shape[-1]
    shapes = [projection.weight.shape for projection in group.projections]
    if device.type != "cuda":
        widest = max(in_features, *[shape[0] for shape in shapes])
        return kind_of(device) == "cpu" and tokens * widest < SMALLEST
    rank = sum([projection.rank for projection in group.projections])
    narrow = [(in_features, rank), *((p.weight.shape[0], p.rank) for p in group.projections)]
    if any(r and chosen(tokens, features, r, dtypes.lora, device, False) == "triton" for features, r in narrow):
        return False
    if dtypes.compute.itemsize != 2 or not kernels_serve(device) or group.backend == "library":
        return True
    if sums_products(tokens, shapes, dtypes.compute, device, group.backend):
        return False
    return not any(
        measured(tokens, w, w[1], dtypes.compute, device, transposed) != "torch"
        for out_features, _ in shapes
        for w, transposed in (((out_features, in_features), False), ((in_features, out_features), True))
    )
