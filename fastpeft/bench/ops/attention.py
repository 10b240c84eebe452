"""Attention with the masks and the scores that models have, at the sizes of their heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .attention_kinds import (
    BIAS,
    CAUSAL,
    DOCUMENTS,
    HOLES,
    PADDED,
    PADDED_CAUSAL,
    RELATIVE,
    SOFTCAP,
    Kind,
    window,
)
from .attention_peers import PEERS, eager
from .case import Inputs, OpCase
from .making import Numbers, floors
from .models import (
    BERT_BASE,
    GEMMA3_4B,
    LLAMA_1B,
    LLAMA_8B,
    LLAMA_70B,
    MODERNBERT_BASE,
    QWEN3_32B,
    QWEN3_600M,
    T5_BASE,
    Shape,
)

_GEMMA = window(1024)
_MODERNBERT = window(65, both=True)


def cases(device: str, depth: str) -> Iterator[OpCase]:
    """One row of 512 to 2048 tokens in fp32 on a CPU; in bf16 on a GPU 16k tokens in all, in rows of 1k to 32k."""
    if device == "cpu":
        yield case(QWEN3_600M, CAUSAL, 1, 512, torch.float32)
        yield case(BERT_BASE, PADDED, 2, 256, torch.float32)
        if depth == "quick":
            return
        for tokens in (1024, 2048):
            yield case(QWEN3_600M, CAUSAL, 1, tokens, torch.float32)
        yield case(QWEN3_600M, DOCUMENTS, 1, 2048, torch.float32)
        yield case(MODERNBERT_BASE, _MODERNBERT, 1, 2048, torch.float32)
        yield case(GEMMA3_4B, _GEMMA, 1, 2048, torch.float32)
        yield case(GEMMA3_4B, SOFTCAP, 1, 512, torch.float32)
        yield case(T5_BASE, RELATIVE, 1, 512, torch.float32)
        yield case(T5_BASE, BIAS, 1, 512, torch.float32)
        return
    dtype = torch.bfloat16
    yield case(LLAMA_8B, CAUSAL, 4, 4096, dtype)
    yield case(BERT_BASE, PADDED, 32, 512, dtype)
    yield case(T5_BASE, RELATIVE, 8, 1024, dtype)
    if depth == "quick":
        return
    for tokens in (1024, 16384):
        yield case(LLAMA_8B, CAUSAL, 16384 // tokens, tokens, dtype)
    yield case(QWEN3_600M, CAUSAL, 4, 4096, dtype)
    for tokens in (1024, 4096, 16384):
        yield case(LLAMA_1B, CAUSAL, 16384 // tokens, tokens, dtype)
    for kind in (PADDED_CAUSAL, HOLES):
        yield case(LLAMA_8B, kind, 4, 4096, dtype)
    yield case(LLAMA_8B, DOCUMENTS, 1, 16384, dtype)
    yield case(GEMMA3_4B, _GEMMA, 2, 8192, dtype)
    yield case(GEMMA3_4B, SOFTCAP, 4, 4096, dtype)
    yield case(MODERNBERT_BASE, _MODERNBERT, 2, 8192, dtype)
    yield case(T5_BASE, RELATIVE, 4, 4096, dtype)
    yield case(T5_BASE, BIAS, 4, 2048, dtype)
    if depth == "full":
        for tokens in (2048, 8192, 32768):
            yield case(LLAMA_8B, CAUSAL, max(1, 16384 // tokens), tokens, dtype)
        yield case(LLAMA_1B, CAUSAL, 1, 32768, dtype)
        yield case(LLAMA_8B, DOCUMENTS, 1, 32768, dtype)
        yield case(LLAMA_8B, CAUSAL, 4, 4096, torch.float16)
        for shape in (LLAMA_70B, QWEN3_32B):
            yield case(shape, CAUSAL, 2, 8192, dtype)


def case(shape: Shape, kind: Kind, batch: int, tokens: int, dtype: torch.dtype) -> OpCase:
    """Attention of (batch, heads, tokens, head_dim), each tensor laid out (batch, tokens, heads, head_dim).

    Floor, with p the pairs of query and key that see one another, of all rows and heads: forward has 2 products of
    2 p head_dim operations, backward 4 (scores that are computed again there are an implementation's choice, not the
    definition's). Forward reads q, k, v and what is added to the scores, and writes the output; backward reads the
    output's gradient and all of these, and writes the gradient of each.
    """

    def make(device: str, dtype_: torch.dtype, seed: int) -> Inputs:
        numbers = Numbers(device, dtype_, dtype, seed)

        def heads(count: int) -> torch.Tensor:
            return numbers.normal(batch, tokens, count, shape.head_dim).transpose(1, 2)

        tensors = {"q": heads(shape.heads), "k": heads(shape.kv_heads), "v": heads(shape.kv_heads)}
        dy = heads(shape.heads)
        if kind.added is not None:
            tensors[kind.added] = numbers.normal(*kind.added_shape(shape.heads, tokens))
        wanted = tuple(tensor.requires_grad_() for tensor in tensors.values())
        extra: dict[str, Any] = {"kind": kind, "mask": kind.mask(batch, tokens, device)}
        return Inputs(tensors, wanted, (dy,), extra)

    pairs = shape.heads * kind.pairs(batch, tokens)
    rows, size = batch * tokens * shape.head_dim * dtype.itemsize, dtype.itemsize
    queries, keys = rows * shape.heads, rows * shape.kv_heads
    added = kind.added_elements(shape.heads, tokens) * size
    product = 2.0 * pairs * shape.head_dim
    operands = queries + 2 * keys + added
    return OpCase(
        op="attention",
        name=f"{shape.name}, {kind.name}, {batch} x {tokens} tokens",
        dtype=dtype,
        make=make,
        floors=floors((2 * product, 4 * product), operands, queries, operands, operands),
        reference=eager,
        peers=PEERS,
        settings={"model": shape.name, "tokens": batch * tokens, "length": tokens, "mask": kind.name},
    )
