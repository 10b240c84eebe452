"""The norms in plain PyTorch, as the models write them: the definition, differentiable, and the oracle of the tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .form import Form, wide_dtype

_FACTORS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


def norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form, gate: Tensor | None = None
) -> Tensor:
    """x, gate: (..., features), weight and bias: (features,); floating. Of 16 bits it is computed in fp32.

    Its operations and roundings are those of transformers' classes, so that these give the same bits.
    """
    wide = x.to(wide_dtype(x.dtype))
    if form.centred:
        weight, bias = (None if t is None else t.to(wide.dtype) for t in (weight, bias))
        return F.layer_norm(wide, wide.shape[-1:], weight, bias, form.eps).to(form.out)
    factor = None if gate is None else _FACTORS[form.activation](gate.to(wide.dtype))
    if factor is not None and not form.norm_before_gate:
        wide = wide * factor
    grouped = wide.unflatten(-1, (form.groups, -1)) if form.groups > 1 else wide
    normalised = (grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + form.eps)).reshape(wide.shape)
    if form.middle is not None:
        normalised = normalised.to(form.middle)
    if form.offset and weight is not None:
        weight = form.offset + weight.to(wide.dtype)
    y = normalised if weight is None else weight * normalised
    if factor is not None and form.norm_before_gate:
        y = y * factor
    return y.to(form.out)
