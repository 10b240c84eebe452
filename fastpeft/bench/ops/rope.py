"""Rotary embeddings: queries and keys, turned together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .case import Forward, Inputs, OpCase
from .making import Numbers, by_name, floors, on_copies, package
from .models import GEMMA3_4B, LLAMA_8B, LLAMA_70B, QWEN3_600M, Shape
from .peers import compiled


def cases(device: str, depth: str) -> Iterator[OpCase]:
    """256 tokens in fp32 on a CPU, 8192 in bf16 on a GPU."""
    (batch, tokens), dtype = ((1, 256), torch.float32) if device == "cpu" else ((4, 2048), torch.bfloat16)
    shapes = {"quick": (QWEN3_600M,), "default": (QWEN3_600M, LLAMA_8B, GEMMA3_4B)}
    for shape in shapes.get(depth, (*shapes["default"], LLAMA_70B)):
        yield case(shape, batch, tokens, dtype)


def case(shape: Shape, batch: int, tokens: int, dtype: torch.dtype) -> OpCase:
    """q (batch, heads, tokens, head_dim) and k, laid out (batch, tokens, heads, head_dim); cos, sin (1, tokens, ...).

    Floor: no products; forward reads q, k, cos and sin and writes q and k turned; backward reads their gradients, cos
    and sin, and writes as much.
    """

    def make(device: str, dtype_: torch.dtype, seed: int) -> Inputs:
        numbers = Numbers(device, dtype_, dtype, seed)

        def heads(count: int) -> Tensor:
            return numbers.normal(batch, tokens, count, shape.head_dim).transpose(1, 2)

        place = torch.arange(tokens, device=device, dtype=torch.float32)
        rates = 10_000 ** -(torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim)
        angles = torch.outer(place, rates).repeat(1, 2)[None]
        cos, sin = (f(angles).to(dtype).to(dtype_) for f in (torch.cos, torch.sin))
        q, k = heads(shape.heads).requires_grad_(), heads(shape.kv_heads).requires_grad_()
        dys = heads(shape.heads), heads(shape.kv_heads)
        return Inputs({"q": q, "k": k, "cos": cos, "sin": sin}, (q, k), dys)

    both = batch * tokens * (shape.heads + shape.kv_heads) * shape.head_dim * dtype.itemsize
    tables = 2 * tokens * shape.head_dim * dtype.itemsize
    return OpCase(
        op="rope",
        name=f"{shape.name}, {batch} x {tokens} tokens",
        dtype=dtype,
        make=make,
        floors=floors((0, 0), both + tables, both, tables, both),
        reference=by_name(_plain),
        peers={"fastpeft": by_name(_fastpeft), "torch.compile": compiled(by_name(_plain)), "liger on copies": _liger},
        settings={"model": shape.name, "tokens": batch * tokens},
    )


def _plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
    """transformers' `apply_rotary_pos_emb`."""

    def half_turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + half_turned(q) * sin, k * cos + half_turned(k) * sin


def _fastpeft(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
    from fastpeft_kernels.rope import rotary

    return rotary(q, k, cos, sin)


def _liger(inputs: Inputs) -> Forward:
    """It turns q and k, and in backward their gradients, in place: it gets copies of both, whose making is timed."""
    run = package("liger_kernel.ops.rope", inputs).LigerRopeFunction

    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
        q, k = run.apply(q, k, cos, sin)
        return _OwnGradients.apply(q, k)  # type: ignore[no-any-return]

    return on_copies(function, ("q", "k"), always=True)(inputs)


class _OwnGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.clone() for gradient in gradients)
