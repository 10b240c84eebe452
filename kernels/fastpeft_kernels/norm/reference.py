"""The norms in plain PyTorch, as the models write them: the definition, differentiable, and the oracle of the tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .form import Form, wide_dtype


def norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form) -> Tensor:
    """x: (..., features), weight and bias: (features,); floating. Of 16 bits it is computed in fp32.

    Its operations and roundings are those of transformers' classes, so that these give the same bits.
    """
    wide = x.to(wide_dtype(x.dtype))
    if form.centred:
        weight, bias = (None if t is None else t.to(wide.dtype) for t in (weight, bias))
        return F.layer_norm(wide, wide.shape[-1:], weight, bias, form.eps).to(form.out)
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + form.eps)
    if form.middle is not None:
        normalised = normalised.to(form.middle)
    if weight is None:
        return normalised.to(form.out)
    if form.offset:
        weight = form.offset + weight.to(wide.dtype)
    return (weight * normalised).to(form.out)
