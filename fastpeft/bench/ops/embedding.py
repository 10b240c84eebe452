"""LoRA on an embedding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Forward, Inputs, OpCase
from .making import Numbers, by_name, floors, peft_layer
from .models import BERT_BASE, GEMMA3_4B, LLAMA_8B, QWEN3_600M, Shape
from .peers import compiled

SCALING = 2.0


def cases(device: str, depth: str) -> Iterator[OpCase]:
    """256 tokens in fp32 on a CPU, 8192 in bf16 on a GPU."""
    tokens, dtype = (256, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    yield case(BERT_BASE, tokens, 16, dtype)
    if depth == "quick":
        return
    yield case(QWEN3_600M, tokens, 16, dtype)
    if device == "cuda":
        yield from (case(LLAMA_8B, tokens, rank, dtype) for rank in (16, 64))
    if depth == "full":
        yield case(GEMMA3_4B, tokens, 16, dtype)


def case(shape: Shape, tokens: int, rank: int, dtype: torch.dtype) -> OpCase:
    """The frozen rows of ids (tokens,) plus those of a (rank, vocab), scaled, times b (hidden, rank) transposed.

    Floor, with P = 2 tokens rank hidden: forward has the product with b, P; backward that of dy with b and b's
    gradient, 2 P. Forward reads ids, as many rows of the weight and of a, and b, and writes the rows; backward reads
    dy, ids, b and the rows of a, and writes all of a's gradient and b's.
    """

    def make(device: str, dtype_: torch.dtype, seed: int) -> Inputs:
        numbers = Numbers(device, dtype_, dtype, seed)
        a = nn.Parameter(numbers.normal(rank, shape.vocab, scale=rank**-0.5))
        b = nn.Parameter(numbers.normal(shape.hidden, rank))
        weight, ids = numbers.normal(shape.vocab, shape.hidden), numbers.integers(shape.vocab, tokens)
        return Inputs({"weight": weight, "ids": ids, "a": a, "b": b}, (a, b), (numbers.normal(tokens, shape.hidden),))

    size = dtype.itemsize
    rows, of_a, of_b = tokens * shape.hidden * size, tokens * rank * size, shape.hidden * rank * size
    product, needed = 2.0 * tokens * rank * shape.hidden, 8 * tokens + of_a + of_b
    return OpCase(
        op="embedding",
        name=f"{shape.name}, {tokens} tokens, rank {rank}",
        dtype=dtype,
        make=make,
        floors=floors((product, 2 * product), needed + rows, rows, needed, rank * (shape.vocab + shape.hidden) * size),
        reference=by_name(_plain),
        peers={"fastpeft": by_name(_fastpeft), "peft": _peft, "torch.compile": compiled(by_name(_plain))},
        settings={"model": shape.name, "tokens": tokens, "rank": rank},
    )


def _plain(weight: Tensor, ids: Tensor, a: Tensor, b: Tensor) -> Sequence[Tensor]:
    return (F.embedding(ids, weight) + SCALING * (F.embedding(ids, a.t()) @ b.t()),)


def _fastpeft(weight: Tensor, ids: Tensor, a: Tensor, b: Tensor) -> Sequence[Tensor]:
    from fastpeft_kernels.lora.embedding import lora_embedding

    return (lora_embedding(F.embedding(ids, weight), ids, a, b, scaling=SCALING),)


def _peft(inputs: Inputs) -> Forward:
    tensors = inputs.tensors
    rank = tensors["a"].shape[0]
    base = nn.Embedding.from_pretrained(tensors["weight"])
    layer = peft_layer(base, "LoraConfig", r=rank, lora_alpha=int(SCALING * rank))
    layer.lora_embedding_A["default"], layer.lora_embedding_B["default"] = tensors["a"], tensors["b"]
    return lambda: (layer(tensors["ids"]),)
