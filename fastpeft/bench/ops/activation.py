"""Gated activations, act(gate) * up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..left_out import NotHereError
from .case import Forward, Inputs, OpCase
from .making import Function, Numbers, by_name, floors, on_copies, package
from .models import BERT_BASE, GEMMA3_4B, LLAMA_8B, LLAMA_70B, MODERNBERT_BASE, QWEN3_600M, Shape
from .peers import compiled


def cases(device: str, depth: str) -> Iterator[OpCase]:
    """256 tokens in fp32 on a CPU, 8192 in bf16 on a GPU."""
    tokens, dtype = (256, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    quick, more = (QWEN3_600M, BERT_BASE), (LLAMA_8B, GEMMA3_4B, MODERNBERT_BASE)
    for shape in quick if depth == "quick" else (*quick, *more):
        yield case(shape, tokens, dtype)
    if depth == "full":
        yield case(LLAMA_70B, tokens, dtype)
        yield case(LLAMA_8B, tokens, torch.bfloat16 if device == "cpu" else torch.float32)


def case(shape: Shape, tokens: int, dtype: torch.dtype) -> OpCase:
    """Of gate and up (tokens, intermediate); of up alone where the model has no gate.

    Floor: no products; forward reads gate and up and writes the result; backward reads its gradient, gate and up, and
    writes their gradients.
    """
    names = ("gate", "up") if shape.gated else ("up",)

    def make(device: str, dtype_: torch.dtype, seed: int) -> Inputs:
        numbers = Numbers(device, dtype_, dtype, seed)
        tensors = {name: numbers.normal(tokens, shape.intermediate).requires_grad_() for name in names}
        return Inputs(tensors, tuple(tensors.values()), (numbers.normal(tokens, shape.intermediate),))

    size = tokens * shape.intermediate * dtype.itemsize
    inputs = len(names) * size
    kind = shape.kind
    plain: Function = partial(_plain, kind=kind)
    return OpCase(
        op="activation",
        name=f"{shape.name}, {kind}{'' if shape.gated else ' without a gate'}, {tokens} x {shape.intermediate}",
        dtype=dtype,
        make=make,
        floors=floors((0, 0), inputs, size, inputs, inputs),
        reference=by_name(plain),
        peers={
            "fastpeft": by_name(partial(_fastpeft, kind=kind)),
            "torch.compile": compiled(by_name(plain)),
            "liger on copies": partial(_liger, kind),
        },
        settings={"model": shape.name, "tokens": tokens, "features": shape.intermediate, "activation": kind},
    )


def _plain(up: Tensor, gate: Tensor | None = None, *, kind: str) -> Sequence[Tensor]:
    """As transformers' MLPs write it."""
    x = up if gate is None else gate
    if kind == "silu":
        y = F.silu(x)
    else:
        y = F.relu(x) if kind == "relu" else F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
    return (y if gate is None else y * up,)


def _fastpeft(up: Tensor, gate: Tensor | None = None, *, kind: str) -> Sequence[Tensor]:
    return (_Fused.apply(gate, up, kind),)


class _Fused(torch.autograd.Function):
    """The op and its gradients as `fastpeft_kernels.mlp` calls them."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor | None, up: Tensor, kind: str) -> Tensor:
        from fastpeft_kernels.activation import gated_activation

        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return gated_activation(gate, up, kind)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        from fastpeft_kernels.activation import gated_activation_backward

        gate, up = ctx.saved_tensors
        dgate, dup = None if gate is None else torch.empty_like(gate), torch.empty_like(up)
        gated_activation_backward(gradients[0], gate, up, ctx.kind, dgate=dgate, dup=dup)
        return dgate, dup, None


def _liger(kind: str, inputs: Inputs) -> Forward:
    """It writes gradients over gate and up, so it gets copies, made anew after a backward: timed in "both" alone."""
    if "gate" not in inputs.tensors or kind not in ("silu", "gelu_tanh"):
        raise NotHereError("has no such activation")
    module, function = ("swiglu", "LigerSiLUMulFunction") if kind == "silu" else ("geglu", "LigerGELUMulFunction")
    run = getattr(package(f"liger_kernel.ops.{module}", inputs), function)
    names = ("gate", "up")
    return on_copies(lambda gate, up: (run.apply(gate, up),), names, always=False)(inputs)
