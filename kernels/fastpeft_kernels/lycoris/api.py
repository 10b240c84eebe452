"""A frozen projection with LoHa or LoKr updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.device import autocast_dtype, product_dtype
from ..common.validation import check_floating, check_instance
from ..lora.projection import LoraProjection, check_group
from ..weights import DenseWeight, FrozenWeight
from . import autograd
from .adapters import LohaAdapter, LokrAdapter


def loha_linear(
    x: Tensor, weight: Tensor | FrozenWeight, adapters: Sequence[LohaAdapter], *, bias: Tensor | None = None
) -> Tensor:
    """A frozen projection with LoHa's updates, in one product over their sum.

    Equivalent PyTorch: `F.linear(x, weight, bias) + F.linear(x, update)` for the update of each adapter, see
    `reference.lycoris_linear_reference`. Three products of the weight's size forward and backward, not five; keeps x,
    neither an update nor a sum. Computes in fp32 at least: in 16 bits a small update would vanish in the sum with the
    weight.

    Args:
        x: (..., in_features), floating.
        weight: frozen; a matrix (out_features, in_features) or a FrozenWeight.
        adapters: one or more; gradients reach their factors.
        bias: (out_features,) or None; may be trained.

    Returns:
        A new tensor (..., out_features) in x's dtype, also under autocast, as PEFT's layer does.

    Raises:
        TypeError: an argument of another type, or not floating.
        ValueError: sizes or devices that do not fit, or no adapter.
        RuntimeError: in backward, when the frozen weight was changed or moved since forward.

    Source: FedPara, Hyeon-Woo et al. 2021, arXiv:2108.06098; LyCORIS, Yeh et al. 2023, arXiv:2309.14859.
    """
    base = _checked(x, weight, adapters, bias, LohaAdapter)
    for i, adapter in enumerate(adapters):
        rank = adapter.w1_b.shape[0] if adapter.w1_b.dim() == 2 else 0
        out_features, in_features = base.weight.shape
        wanted = ((out_features, rank), (rank, in_features)) * 2
        if tuple(tuple(factor.shape) for factor in adapter.factors) != wanted:
            _refuse(i, "w1_a, w1_b, w2_a, w2_b", wanted, adapter.factors)
    wide = torch.promote_types(_product_dtype(x, adapters), torch.float32)
    return autograd.apply(x, base, adapters, wide)


def lokr_linear(
    x: Tensor, weight: Tensor | FrozenWeight, adapters: Sequence[LokrAdapter], *, bias: Tensor | None = None
) -> Tensor:
    """A frozen projection with LoKr's updates, none of which is made.

    Equivalent PyTorch, dtypes, arguments, result and errors: as `loha_linear`. Two products of the weight's size
    forward and backward, not five, and some of a factor's size for each adapter; keeps x.

    Source: KronA, Edalati et al. 2022, arXiv:2212.10650; LyCORIS, Yeh et al. 2023, arXiv:2309.14859.
    """
    base = _checked(x, weight, adapters, bias, LokrAdapter)
    for i, adapter in enumerate(adapters):
        sizes = [factor.shape if factor.dim() == 2 else (0, 0) for factor in adapter.factors]
        if tuple(a * b for a, b in zip(*sizes, strict=True)) != base.weight.shape:
            _refuse(i, "w1, w2", f"two matrices whose Kronecker product is {base.weight.shape}", adapter.factors)
    return autograd.apply(x, base, adapters, product_dtype(_product_dtype(x, adapters), x.device))


def _refuse(i: int, names: str, wanted: object, factors: Sequence[Tensor]) -> None:
    raise ValueError(f"adapters[{i}]: expected {names} of {wanted}, got {[tuple(factor.shape) for factor in factors]}")


def _checked(
    x: Tensor,
    weight: Tensor | FrozenWeight,
    adapters: Sequence[LohaAdapter | LokrAdapter],
    bias: Tensor | None,
    kind: type,
) -> LoraProjection:
    base = LoraProjection(weight if isinstance(weight, FrozenWeight) else DenseWeight(weight), bias)
    check_group(x, (base,))
    check_instance("adapters", adapters, list, tuple)
    if not adapters:
        raise ValueError("adapters: expected at least one, got none")
    for i, adapter in enumerate(adapters):
        check_instance(f"adapters[{i}]", adapter, kind)
        check_instance(f"adapters[{i}].scaling", adapter.scaling, float, int)
        for factor in adapter.factors:
            check_floating(f"adapters[{i}]", factor)
            if factor.device != x.device:
                raise ValueError(f"adapters[{i}]: expected factors on {x.device} like x, got {factor.device}")
    return base


def _product_dtype(x: Tensor, adapters: Sequence[LohaAdapter | LokrAdapter]) -> torch.dtype:
    """Autocast's, else the widest of x's and the factors'."""
    dtype = autocast_dtype(x.device)
    if dtype is not None:
        return dtype
    dtype = x.dtype
    for adapter in adapters:
        for factor in adapter.factors:
            dtype = torch.promote_types(dtype, factor.dtype)
    return dtype
