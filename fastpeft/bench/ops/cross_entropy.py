"""Cross-entropy of given logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Forward, Inputs, OpCase
from .loss_peers import at_least_fp32
from .making import Numbers, by_name, floors, on_copies, only_both, package
from .models import BERT_BASE, LLAMA_8B, QWEN3_600M, T5_BASE, Shape
from .peers import compiled


def cases(device: str, depth: str) -> Iterator[OpCase]:
    """In fp32 on a CPU, of 32 or 512 tokens; in bf16 on a GPU, of 4096, in fp32 too in a full run."""
    if device == "cpu":
        yield case(BERT_BASE, 32, torch.float32)
        if depth != "quick":
            yield from (case(shape, 512, torch.float32) for shape in (BERT_BASE, T5_BASE))
        return
    yield case(LLAMA_8B, 4096, torch.bfloat16)
    if depth != "quick":
        yield from (case(shape, 4096, torch.bfloat16) for shape in (QWEN3_600M, BERT_BASE))
    if depth == "full":
        yield case(LLAMA_8B, 4096, torch.float32)


def case(shape: Shape, tokens: int, dtype: torch.dtype) -> OpCase:
    """Mean cross-entropy of logits (tokens, vocab).

    Floor: no products; forward reads the logits and the labels, backward reads them again and writes the gradient.
    """

    def make(device: str, dtype_: torch.dtype, seed: int) -> Inputs:
        numbers = Numbers(device, dtype_, dtype, seed)
        logits = numbers.normal(tokens, shape.vocab, scale=2.0).requires_grad_()
        return Inputs({"logits": logits, "labels": numbers.integers(shape.vocab, tokens)}, (logits,), (numbers.one(),))

    logits = tokens * shape.vocab * dtype.itemsize
    return OpCase(
        op="cross_entropy",
        name=f"{shape.name}, {tokens} tokens",
        dtype=dtype,
        make=make,
        floors=only_both(floors((0, 0), logits + 8 * tokens, 4, logits + 8 * tokens, logits)),
        reference=by_name(_plain),
        peers={"fastpeft": by_name(_fastpeft), "torch.compile": compiled(by_name(_plain)), "liger on copies": _liger},
        settings={"model": shape.name, "tokens": tokens},
    )


def _plain(logits: Tensor, labels: Tensor) -> Sequence[Tensor]:
    return (F.cross_entropy(at_least_fp32(logits), labels),)


def _fastpeft(logits: Tensor, labels: Tensor) -> Sequence[Tensor]:
    from fastpeft_kernels.loss import cross_entropy

    return (cross_entropy(logits, labels),)


def _liger(inputs: Inputs) -> Forward:
    """It writes the gradient over the logits in forward, so it gets copies, whose making is timed."""
    run = package("liger_kernel.ops.cross_entropy", inputs).LigerCrossEntropyFunction

    def function(logits: Tensor, labels: Tensor) -> Sequence[Tensor]:
        return (run.apply(logits, labels, None)[0],)

    return on_copies(function, ("logits",), always=True)(inputs)
