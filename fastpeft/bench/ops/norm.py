"""RMSNorm, in the forms of Llama and Gemma, and LayerNorm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..left_out import NotHereError
from .case import Forward, Inputs, OpCase
from .making import Function, Numbers, by_name, floors, package
from .models import BERT_BASE, GEMMA3_4B, LLAMA_8B, LLAMA_70B, MODERNBERT_BASE, QWEN3_600M, Shape
from .peers import compiled

Form = Literal["Llama", "Gemma", "LayerNorm"]
EPS = 1e-6


def cases(device: str, depth: str) -> Iterator[OpCase]:
    """Rows of a model's width in fp32 on a CPU, in bf16 on a GPU; "each head" are Qwen3's norms of queries."""
    rows, dtype = (256, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    yield case(QWEN3_600M, "Llama", rows, QWEN3_600M.hidden, dtype, trained=False)
    yield case(BERT_BASE, "LayerNorm", rows, BERT_BASE.hidden, dtype, trained=True)
    if depth == "quick":
        return
    yield case(LLAMA_8B, "Llama", rows, LLAMA_8B.hidden, dtype, trained=False)
    yield case(LLAMA_8B, "Llama", rows, LLAMA_8B.hidden, dtype, trained=True)
    yield case(GEMMA3_4B, "Gemma", rows, GEMMA3_4B.hidden, dtype, trained=False)
    yield case(QWEN3_600M, "Llama", rows * QWEN3_600M.heads, QWEN3_600M.head_dim, dtype, trained=False)
    yield case(MODERNBERT_BASE, "LayerNorm", rows, MODERNBERT_BASE.hidden, dtype, trained=False)
    if depth == "full":
        yield case(LLAMA_70B, "Llama", rows, LLAMA_70B.hidden, dtype, trained=False)
        other = torch.bfloat16 if device == "cpu" else torch.float32
        yield case(LLAMA_8B, "Llama", rows, LLAMA_8B.hidden, other, trained=False)


def case(shape: Shape, form: Form, rows: int, features: int, dtype: torch.dtype, trained: bool) -> OpCase:
    """A norm of x (rows, features), its weight (and LayerNorm's bias) of x's dtype, frozen or trained.

    Floor: no products; forward reads x and weights and writes y; backward reads dy, x and the weight, and writes dx and
    the gradients of what is trained.
    """
    of_layer = form == "LayerNorm"

    def make(device: str, dtype_: torch.dtype, seed: int) -> Inputs:
        numbers = Numbers(device, dtype_, dtype, seed)
        tensors = {"x": numbers.normal(rows, features).requires_grad_()}
        for name in ("weight", "bias") if of_layer else ("weight",):
            tensors[name] = numbers.normal(features).requires_grad_(trained)
        wanted = tuple(tensor for tensor in tensors.values() if tensor.requires_grad)
        return Inputs(tensors, wanted, (numbers.normal(rows, features),))

    x, weight = rows * features * dtype.itemsize, features * dtype.itemsize
    weights = weight * (2 if of_layer else 1)
    plain: Function = partial(_plain, form=form)
    peers = {"fastpeft": by_name(partial(_fastpeft, form=form)), "torch.compile": compiled(by_name(plain))}
    if not of_layer:  # of which plain PyTorch is the fused one
        peers["torch fused"] = partial(_fused, form)
    return OpCase(
        op="norm",
        name=f"{shape.name}, {form}'s{' RMSNorm' if not of_layer else ''}, {rows} x {features}, "
        f"{'trained' if trained else 'frozen'} weight".replace("LayerNorm's", "LayerNorm"),
        dtype=dtype,
        make=make,
        floors=floors((0, 0), x + weights, x, x + weight, x + (weights if trained else 0)),
        reference=by_name(plain),
        peers={**peers, "liger": partial(_liger, form)},
        settings={"model": shape.name, "tokens": rows, "features": features, "form": form, "trained": trained},
    )


def _form(form: Form, x: Tensor) -> Any:
    from fastpeft_kernels.norm.form import layer_form, rms_form

    if form == "LayerNorm":
        return layer_form(x.dtype, EPS)
    offset, rounding = (1.0, "once") if form == "Gemma" else (0.0, "input")
    return rms_form(x.dtype, x.dtype, EPS, offset, rounding)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, form: Form) -> Sequence[Tensor]:
    """The model's own code: transformers' classes of RMSNorm, torch's LayerNorm."""
    if form == "LayerNorm":
        return (F.layer_norm(x, x.shape[-1:], weight, bias, EPS),)
    from fastpeft_kernels.norm.reference import norm_reference

    return (norm_reference(x, weight, None, _form(form, x)),)


def _fastpeft(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, form: Form) -> Sequence[Tensor]:
    from fastpeft_kernels.norm import layer_norm, rms_norm

    if form == "LayerNorm":
        return (layer_norm(x, weight, bias, EPS),)
    offset, rounding = (1.0, "once") if form == "Gemma" else (0.0, "input")
    return (rms_norm(x, weight, EPS, offset=offset, rounding=rounding),)


def _fused(form: Form, inputs: Inputs) -> Forward:
    """`torch.nn.functional.rms_norm`, which rounds once."""
    if form == "Gemma":
        raise NotHereError("knows no weight beside 1")
    x, weight = inputs.tensors["x"], inputs.tensors["weight"]
    return lambda: (F.rms_norm(x, x.shape[-1:], weight, EPS),)


def _liger(form: Form, inputs: Inputs) -> Forward:
    """Not over the gradient that it is given, as it would by default, for that is used again."""
    x, weight = inputs.tensors["x"], inputs.tensors["weight"]
    if form == "LayerNorm":
        run = package("liger_kernel.ops.layer_norm", inputs).LigerLayerNormFunction
        return lambda: (run.apply(x, weight, inputs.tensors["bias"], EPS),)
    run = package("liger_kernel.ops.rms_norm", inputs).LigerRMSNormFunction
    offset, mode = (1.0, "gemma") if form == "Gemma" else (0.0, "llama")
    return lambda: (run.apply(x, weight, EPS, offset, mode, False),)
