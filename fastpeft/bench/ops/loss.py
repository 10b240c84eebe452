"""Cross-entropy of hidden states under a head that is frozen, trained, or has LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from .case import Inputs, OpCase
from .loss_peers import peers, plain, plain_with_lora
from .making import Numbers, by_name, floors, only_both
from .models import BERT_BASE, GEMMA3_4B, LLAMA_8B, LLAMA_70B, QWEN3_4B, QWEN3_32B, QWEN3_600M, T5_BASE, Shape

Head = Literal["frozen", "trained", "LoRA"]
HEADS: tuple[Head, ...] = ("frozen", "trained", "LoRA")
RANK = 16


def cases(device: str, depth: str) -> Iterator[OpCase]:
    """In fp32 on a CPU, of small models and some hundred tokens; in bf16 on a GPU, of 4096 or 8192 tokens."""
    if device == "cpu":
        yield case(BERT_BASE, 32, torch.float32, "frozen")
        if depth != "quick":
            yield from (case(shape, 512, torch.float32, head) for shape in (BERT_BASE, T5_BASE) for head in HEADS)
            yield from (case(QWEN3_600M, 256, torch.float32, head) for head in HEADS)
        return
    yield from (case(LLAMA_8B, 8192, torch.bfloat16, head) for head in HEADS)
    if depth == "quick":
        return
    yield from (case(QWEN3_600M, 8192, torch.bfloat16, head) for head in HEADS)
    yield from (case(shape, 4096, torch.bfloat16, "frozen") for shape in (QWEN3_4B, GEMMA3_4B))
    if depth == "full":
        yield from (case(shape, 4096, torch.bfloat16, "frozen") for shape in (LLAMA_70B, QWEN3_32B))
        yield case(LLAMA_8B, 4096, torch.float16, "frozen")


def case(shape: Shape, tokens: int, dtype: torch.dtype, head: Head) -> OpCase:
    """Mean cross-entropy of hidden (tokens, hidden) under weight (vocab, hidden); LoRA's a and b of rank 16.

    Floor, with P = 2 tokens hidden vocab: forward makes the logits, P; backward the hidden states' gradient, P, and
    that of a trained weight, P. LoRA adds 2 rank tokens (hidden + vocab) forward and twice as much backward. Forward
    reads hidden states, labels, weight (and a, b) once; backward reads them too, for no logits are kept, and writes the
    gradient of each that is trained.
    """

    def make(device: str, dtype_: torch.dtype, seed: int) -> Inputs:
        numbers = Numbers(device, dtype_, dtype, seed)
        hidden = numbers.normal(tokens, shape.hidden).requires_grad_()
        weight = numbers.normal(shape.vocab, shape.hidden, scale=shape.hidden**-0.5).requires_grad_(head == "trained")
        tensors = {"hidden": hidden, "weight": weight, "labels": numbers.integers(shape.vocab, tokens)}
        if head == "LoRA":
            tensors["a"] = numbers.normal(RANK, shape.hidden, scale=shape.hidden**-0.5).requires_grad_()
            tensors["b"] = numbers.normal(shape.vocab, RANK, scale=0.1 * RANK**-0.5).requires_grad_()
        wanted = tuple(tensor for tensor in tensors.values() if tensor.requires_grad)
        return Inputs(tensors, wanted, (numbers.one(),))

    product = 2.0 * tokens * shape.hidden * shape.vocab
    narrow = 2.0 * RANK * tokens * (shape.hidden + shape.vocab) if head == "LoRA" else 0.0
    size = dtype.itemsize
    states, weight = tokens * shape.hidden * size, shape.vocab * shape.hidden * size
    adapter = RANK * (shape.hidden + shape.vocab) * size if head == "LoRA" else 0
    operands = states + weight + adapter + 8 * tokens
    gradients = states + adapter + (weight if head == "trained" else 0)
    return OpCase(
        op="loss",
        name=f"{shape.name}, {tokens} tokens, {head} head",
        dtype=dtype,
        make=make,
        floors=only_both(
            floors(
                (product + narrow, product * (2 if head == "trained" else 1) + 2 * narrow),
                operands,
                4,
                operands,
                gradients,
            )
        ),
        reference=by_name(plain_with_lora if head == "LoRA" else plain),
        peers=peers(lora=head == "LoRA"),
        settings={"model": shape.name, "tokens": tokens, "head": head, **({"rank": RANK} if head == "LoRA" else {})},
    )
