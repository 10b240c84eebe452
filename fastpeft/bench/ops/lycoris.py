"""LoHa and LoKr on one projection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Forward, Inputs, OpCase
from .making import Function, Numbers, by_name, floors, peft_layer
from .models import BERT_BASE, LLAMA_8B, QWEN3_600M, Shape
from .peers import compiled

Kind = Literal["LoHa", "LoKr"]
SCALING = 2.0
LOHA = ("w1_a", "w1_b", "w2_a", "w2_b")


def cases(device: str, depth: str) -> Iterator[OpCase]:
    """256 tokens in fp32 on a CPU, 8192 on a GPU: LoKr in bf16, LoHa, which adds weight and update, in fp32."""
    if device == "cpu":
        shapes = (QWEN3_600M,) if depth == "quick" else (QWEN3_600M, BERT_BASE)
        for shape in shapes:
            yield case(shape, "LoHa", 256, 8, torch.float32)
            yield case(shape, "LoKr", 256, 8, torch.float32)
        return
    yield case(LLAMA_8B, "LoKr", 8192, 8, torch.bfloat16)
    yield case(LLAMA_8B, "LoHa", 2048, 8, torch.float32)
    if depth != "quick":
        yield case(QWEN3_600M, "LoKr", 8192, 8, torch.bfloat16)
        yield case(QWEN3_600M, "LoHa", 8192, 8, torch.float32)


def case(shape: Shape, kind: Kind, tokens: int, rank: int, dtype: torch.dtype) -> OpCase:
    """x (tokens, hidden) times the sum of a frozen weight (hidden, hidden) and one update, as of an output projection.

    LoHa's update is (w1_a w1_b) ⊙ (w2_a w2_b) of `rank`; LoKr's kron(w1, w2), both factors whole, and square where
    hidden is a square.

    Floor, with P = 2 tokens hidden^2: forward has one product with weight and update together, P, and LoHa's update is
    4 rank hidden^2. Backward has dx, P. LoHa's factors need the update's gradient, P, and from it 8 rank hidden^2.
    LoKr's need no matrix of that size: x w2^T and dy w1 and each factor's product, 4 tokens hidden (m + k) for w1
    (l, m) and w2 (k, n). Forward reads x, weight and factors and writes y; backward reads dy and all of them, and
    writes the gradients of x and factors.
    """
    size, width = dtype.itemsize, shape.hidden
    small, large = _factors(width)

    def make(device: str, dtype_: torch.dtype, seed: int) -> Inputs:
        numbers = Numbers(device, dtype_, dtype, seed)
        tensors = {"x": numbers.normal(tokens, width).requires_grad_()}
        tensors["weight"] = numbers.normal(width, width, scale=width**-0.5)
        if kind == "LoHa":
            shapes = ((width, rank), (rank, width)) * 2
            factors = {name: numbers.normal(*each, scale=0.1) for name, each in zip(LOHA, shapes, strict=True)}
        else:
            factors = {"w1": numbers.normal(small, small, scale=0.1), "w2": numbers.normal(large, large, scale=0.1)}
        tensors |= {name: nn.Parameter(factor) for name, factor in factors.items()}
        wanted = tuple(tensor for tensor in tensors.values() if tensor.requires_grad)
        return Inputs(tensors, wanted, (numbers.normal(tokens, width),))

    x, product = tokens * width * size, 2.0 * tokens * width**2
    if kind == "LoHa":
        factors = 4 * rank * width * size
        flops = product + 4.0 * rank * width**2, 2 * product + 8.0 * rank * width**2
    else:
        factors = (small**2 + large**2) * size
        flops = product, product + 4.0 * tokens * width * (small + large)
    operands = x + width**2 * size + factors
    plain: Function = _plain_loha if kind == "LoHa" else _plain_lokr
    of = f"rank {rank}" if kind == "LoHa" else f"{small} and {large}"
    return OpCase(
        op="lycoris",
        name=f"{shape.name}, {kind} of {of}, {tokens} tokens",
        dtype=dtype,
        make=make,
        floors=floors(flops, operands, x, operands, x + factors),
        reference=by_name(plain),
        peers={
            "fastpeft": by_name(partial(_fastpeft, kind=kind)),
            "peft": partial(_peft, kind),
            "torch.compile": compiled(by_name(plain)),
        },
        settings={"model": shape.name, "tokens": tokens, **({"rank": rank} if kind == "LoHa" else {})},
    )


def _factors(width: int) -> tuple[int, int]:
    """The two closest whose product it is, the smaller first, as PEFT chooses them."""
    small = next(n for n in range(int(width**0.5), 0, -1) if width % n == 0)
    return small, width // small


def _plain_loha(x: Tensor, weight: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> Sequence[Tensor]:
    return (F.linear(x, weight) + F.linear(x, (w1_a @ w1_b) * (w2_a @ w2_b) * SCALING),)


def _plain_lokr(x: Tensor, weight: Tensor, w1: Tensor, w2: Tensor) -> Sequence[Tensor]:
    return (F.linear(x, weight) + F.linear(x, torch.kron(w1, w2) * SCALING),)


def _fastpeft(x: Tensor, weight: Tensor, *, kind: Kind, **factors: Tensor) -> Sequence[Tensor]:
    from fastpeft_kernels.lycoris import LohaAdapter, LokrAdapter, loha_linear, lokr_linear

    if kind == "LoHa":
        return (loha_linear(x, weight, [LohaAdapter(**factors, scaling=SCALING)]),)
    return (lokr_linear(x, weight, [LokrAdapter(**factors, scaling=SCALING)]),)


def _peft(kind: Kind, inputs: Inputs) -> Forward:
    x, weight, *factors = inputs.tensors.values()
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(weight, requires_grad=False)
    if kind == "LoHa":
        rank = factors[0].shape[1]
        layer = peft_layer(base, "LoHaConfig", r=rank, alpha=int(SCALING * rank))
        for name, factor in zip(LOHA, factors, strict=True):
            getattr(layer, f"hada_{name}")["default"] = factor
    else:
        rank = weight.shape[0]  # from half a factor's size on PEFT takes both factors whole
        layer = peft_layer(base, "LoKrConfig", r=rank, alpha=int(SCALING * rank))
        layer.lokr_w1["default"], layer.lokr_w2["default"] = factors
    return lambda: (layer(x),)
