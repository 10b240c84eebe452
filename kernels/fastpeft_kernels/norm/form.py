"""Which norm it is, as numbers: what the implementations are told."""

from __future__ import annotations

from typing import NamedTuple

import torch

ROUNDINGS = ("input", "weight", "once")
"""Where a model's RMSNorm rounds, see `api.rms_norm`."""
ACTIVATIONS = ("silu", "sigmoid")
"""Of a gate, see `gated.gated_rms_norm`."""
_HALF = (torch.float16, torch.bfloat16)


class Form(NamedTuple):
    """One norm, for inputs of one dtype.

    Attributes:
        eps: is added to the mean square, or to the variance.
        offset: is added to the weight.
        centred: whether the mean is taken away first: LayerNorm.
        middle: to which dtype the normalised values are rounded before the weight; None for none.
        out: the dtype of the result.
        norm_before_gate: of a gated norm, whether the gate's factor comes after the norm, or is part of its input; None
            without a gate.
        activation: of the gate, one of ACTIVATIONS.
        groups: how many parts of equal size of a row are normalised each by itself.
    """

    eps: float
    offset: float
    centred: bool
    middle: torch.dtype | None
    out: torch.dtype
    norm_before_gate: bool | None = None
    activation: str = "silu"
    groups: int = 1


def most_features(form: Form, dtype: torch.dtype = torch.bfloat16, trained: bool = False) -> int:
    """Features of a group up to which the Triton kernels keep all that they need of a row in registers.

    Of gated norms found by compiling for every GPU, without one: backward of twice as many spills.

    Args:
        dtype: of x.
        trained: whether a gradient of the weight is wanted, which takes more of them.
    """
    if form.norm_before_gate is None:
        return 32768
    return 8192 if form.norm_before_gate or (dtype in _HALF and form.groups == 1 and not trained) else 4096


def fits_registers(form: Form, x: torch.Tensor, trained: bool) -> bool:
    """Whether the Triton kernels can hold a row of x, or a group of it, so; `trained` as for `most_features`."""
    return x.shape[-1] // form.groups <= most_features(form, x.dtype, trained)


def rms_form(x: torch.dtype, weight: torch.dtype, eps: float, offset: float, rounding: str) -> Form:
    """RMSNorm's, for x and a weight of these dtypes."""
    if rounding == "once":
        return Form(eps, offset, False, None, x)
    if rounding == "input":
        return Form(eps, offset, False, x if x in _HALF else None, torch.promote_types(x, weight))
    if weight in _HALF:
        return Form(eps, offset, False, weight, weight)
    return Form(eps, offset, False, None, torch.promote_types(wide_dtype(x), weight))


def gated_form(
    x: torch.dtype,
    weight: torch.dtype,
    eps: float,
    rounding: str,
    norm_before_gate: bool,
    activation: str,
    groups: int,
) -> Form:
    """Gated RMSNorm's, for x and a weight of these dtypes."""
    form = rms_form(x, weight, eps, 0.0, rounding)
    out = x if norm_before_gate else form.out
    return form._replace(out=out, norm_before_gate=norm_before_gate, activation=activation, groups=groups)


def layer_form(x: torch.dtype, eps: float) -> Form:
    """LayerNorm's: computed in fp32, rounded once to x's dtype."""
    return Form(eps, 0.0, True, None, x)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a tensor of `dtype` is computed: fp32, or fp64 as it is."""
    return torch.promote_types(dtype, torch.float32)
