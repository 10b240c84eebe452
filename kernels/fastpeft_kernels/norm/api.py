"""RMSNorm and LayerNorm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.device import autocast_off, triton_available, triton_serves
from ..common.shapes import imitated
from ..common.tracing import as_op
from ..common.validation import check_floating, check_instance, check_tensor
from .autograd import apply
from .form import ROUNDINGS, Form, fits_registers, layer_form, rms_form
from .reference import norm_reference

BACKENDS = ("auto", "torch", "aten", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FEW = 1 << 23
"""Elements up to which PyTorch's own kernel serves on a GPU: it takes the host less time, and there that decides.

By arithmetic: of four times as many (8192 x 4096, bf16) an H200 took 119 us forward and backward with it and 90 with
ours, so of these it loses 7; our launches and the Python around them take a CPU some 80 us more than a node of torch's.
"""


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    rounding: str = "input",
    backend: str = "auto",
) -> Tensor:
    """y = (offset + weight) * x / sqrt(mean(x**2) + eps), over the last dimension; differentiable once.

    Equivalent PyTorch: `torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)`; `reference.norm_reference` has the
    roundings. Computed in fp32 (fp64 in fp64), whatever autocast says. Backward reads x, `weight` and one fp32 number a
    row, and makes no gradient of a frozen weight. Deterministic. Under torch.compile, selective checkpointing and with
    fake tensors it is the PyTorch definition, which a compiler makes one kernel.

    Args:
        x: (..., features) in fp32, fp16, bf16 or fp64, of any size and strides; copied where its rows are not at one
            distance or their elements not contiguous.
        weight: (features,), floating, or None for ones.
        eps: added to the mean square.
        offset: added to the weight in fp32: 1.0 for Gemma's models.
        rounding: "input": what is multiplied by the weight is rounded to x's dtype first, and the result has the dtype
            of such a product (Llama, Qwen, Mistral); "weight": it is rounded to the weight's dtype if that has 16 bits,
            else not (T5); "once": only the product is rounded, to x's dtype (Gemma, OLMo 2, gpt-oss).
        backend: "torch", "aten" (PyTorch's own fused operation, where it has one: no offset, weight of x's dtype or
            none; it rounds once), "triton" (CUDA, not fp64, at most 32768 features), or "auto".

    Returns:
        y, as x but contiguous.

    Raises:
        TypeError: a tensor is not one, or not floating.
        ValueError: any other argument is not as above, or the backend that was asked for cannot serve here.
        ImportError: backend "triton" without Triton.

    Source: Root Mean Square Layer Normalization, Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    check_norm(x, weight, None, eps)
    check_instance("offset", offset, float, int)
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding: expected one of {ROUNDINGS}, got {rounding!r}")
    dtype = x.dtype if weight is None else weight.dtype
    form = rms_form(x.dtype, dtype, float(eps), float(offset), rounding)
    return run_checked(x, weight, None, form, backend)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:
    """y = weight * (x - mean(x)) / sqrt(var(x) + eps) + bias, over the last dimension; differentiable once.

    Equivalent PyTorch: `torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)`, computed in fp32 and
    rounded to x's dtype, whatever autocast says; that is also what serves. All else as
    `rms_norm`, but that two numbers a row are kept.

    Args:
        x, backend: as in `rms_norm`.
        weight, bias: (features,), floating, or None.
        eps: added to the variance.

    Returns:
        y, of x's shape and dtype.

    Raises:
        TypeError, ValueError, ImportError: as `rms_norm`.

    Source: Layer Normalization, Ba, Kiros and Hinton 2016, arXiv:1607.06450.
    """
    check_norm(x, weight, bias, eps)
    return run_checked(x, weight, bias, layer_form(x.dtype, float(eps)), backend)


def run_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    form: Form,
    backend: str = "auto",
    gate: Tensor | None = None,
) -> Tensor:
    """The norms for callers that have checked their arguments. In no `torch.func` transform."""
    if backend == "auto":
        backend = "torch" if imitated(x.device) == "cuda" else _default(x, weight, bias, form)
    if as_op() and backend != "triton":
        with autocast_off(x.device):
            return norm_reference(x, weight, bias, form, gate)
    if backend == "triton":  # autocast has nothing to do with it
        return apply(x, weight, bias, gate, form, backend)
    with autocast_off(x.device):
        if backend == "aten":
            return _aten(x, weight, bias, form)
        return apply(x, weight, bias, gate, form, backend)


def run_checked(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form, backend: str, gate: Tensor | None = None
) -> Tensor:
    """`run_norm`, if the backend can serve."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if backend == "triton":
        if not triton_available():
            raise ImportError("backend: 'triton' was asked for, but Triton is not installed")
        if x.dtype not in DTYPES:
            raise ValueError(f"backend: 'triton' was asked for, which takes fp32, fp16 and bf16, got {x.dtype}")
    if backend == "aten" and not _aten_serves(x, weight, bias, form):
        raise ValueError("backend: 'aten' was asked for, which takes no offset or gate, and weights of x's dtype")
    return run_norm(x, weight, bias, form, backend, gate)


def _default(x: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form) -> str:
    """By arithmetic: PyTorch's own LayerNorm everywhere, its RMSNorm for few elements on a GPU; else ours."""
    one_kernel = _aten_serves(x, weight, bias, form) and (form.centred or x.is_cuda)
    trained = any([t is not None and t.requires_grad for t in (weight, bias)])
    if not x.is_cuda and x.dtype.itemsize == 2 and trained:
        one_kernel = False  # on a CPU PyTorch sums their gradients in 16 bits
    if one_kernel and (form.centred or x.numel() <= FEW):
        return "aten"
    if x.dtype in DTYPES and x.shape[-1] and fits_registers(form, x, trained) and triton_serves(x.device):
        return "triton"
    return "aten" if one_kernel else "torch"


def _aten_serves(x: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form) -> bool:
    """Whether one operation of PyTorch computes it, on CUDA in one kernel."""
    if form.offset or x.shape[-1] == 0 or form.norm_before_gate is not None:
        return False
    return form.out == x.dtype and all([t is None or t.dtype == x.dtype for t in (weight, bias)])


def _aten(x: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form) -> Tensor:
    if form.centred:
        return F.layer_norm(x, x.shape[-1:], weight, bias, form.eps)
    return F.rms_norm(x, x.shape[-1:], weight, form.eps)


def check_norm(x: Any, weight: Any, bias: Any, eps: Any) -> None:
    """Raise TypeError or ValueError unless these fit each other."""
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected (..., features), got a tensor without dimensions")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_tensor(name, parameter, x.device, (x.shape[-1],))
    check_instance("eps", eps, float, int)
