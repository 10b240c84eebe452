"""How far a student is from its teacher, from hidden states under two heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..left_out import NotHereError
from .case import Forward, Inputs, OpCase
from .loss_peers import CHUNK
from .making import Function, Numbers, by_name, floors, only_both, package
from .models import BERT_BASE, LLAMA_8B, QWEN3_4B, QWEN3_32B, QWEN3_600M, Shape
from .peers import compiled

DIVERGENCES = {"forward KL": 0.0, "JSD": 0.5}
"""By name, `beta` of `fastpeft_kernels.loss.linear_distillation`."""


def cases(device: str, depth: str) -> Iterator[OpCase]:
    """In fp32 on a CPU, small heads under BERT's words; in bf16 on a GPU, 4096 tokens of real pairs."""
    if device == "cpu":
        yield case(BERT_BASE, BERT_BASE, 16, torch.float32, "JSD", trained=False)
        if depth != "quick":
            for name in DIVERGENCES:
                yield case(BERT_BASE, BERT_BASE, 256, torch.float32, name, trained=False)
            yield case(BERT_BASE, BERT_BASE, 256, torch.float32, "JSD", trained=True)
        return
    yield case(QWEN3_600M, QWEN3_4B, 4096, torch.bfloat16, "JSD", trained=False)
    if depth == "quick":
        return
    for name in DIVERGENCES:
        yield case(LLAMA_8B, LLAMA_8B, 4096, torch.bfloat16, name, trained=False)
    yield case(LLAMA_8B, LLAMA_8B, 4096, torch.bfloat16, "JSD", trained=True)
    if depth == "full":
        yield case(QWEN3_4B, QWEN3_32B, 4096, torch.bfloat16, "JSD", trained=False)


def case(student: Shape, teacher: Shape, tokens: int, dtype: torch.dtype, divergence: str, trained: bool) -> OpCase:
    """Mean divergence, at temperature 1, of (tokens, hidden) of each under (vocab, hidden) of each; one vocabulary.

    Floor, with S and T the 2 tokens hidden vocab of student and teacher: forward makes the logits of both, S + T;
    backward the student's gradient, S, and that of a trained head, S. Forward reads both hidden states and heads once;
    backward reads them too, for no logits are kept, and writes the gradients.
    """
    beta = DIVERGENCES[divergence]

    def make(device: str, dtype_: torch.dtype, seed: int) -> Inputs:
        numbers = Numbers(device, dtype_, dtype, seed)
        tensors = {
            "hidden": numbers.normal(tokens, student.hidden).requires_grad_(),
            "weight": numbers.normal(student.vocab, student.hidden, scale=student.hidden**-0.5),
            "teacher_hidden": numbers.normal(tokens, teacher.hidden),
            "teacher_weight": numbers.normal(student.vocab, teacher.hidden, scale=teacher.hidden**-0.5),
        }
        tensors["weight"].requires_grad_(trained)
        wanted = tuple(tensor for tensor in tensors.values() if tensor.requires_grad)
        return Inputs(tensors, wanted, (numbers.one(),))

    product = 2.0 * tokens * student.vocab
    states, weight = tokens * student.hidden * dtype.itemsize, student.vocab * student.hidden * dtype.itemsize
    operands = states + weight + (tokens + student.vocab) * teacher.hidden * dtype.itemsize
    flops = (product * (student.hidden + teacher.hidden), product * student.hidden * (1 + trained))
    plain: Function = partial(_plain, beta=beta)
    return OpCase(
        op="distillation",
        name=f"{student.name} of {teacher.name}, {divergence}, {tokens} tokens, {_head(trained)} head",
        dtype=dtype,
        make=make,
        floors=only_both(floors(flops, operands, 4, operands, states + (weight if trained else 0))),
        reference=partial(_reference, beta),
        peers={
            "fastpeft": by_name(partial(_fastpeft, beta=beta)),
            "torch.compile": compiled(by_name(plain)),
            "torch in chunks": by_name(partial(_chunked, beta=beta)),
            "liger": partial(_liger, beta),
            "trl": partial(_trl, beta),
        },
        settings={"model": student.name, "tokens": tokens, "divergence": divergence, "head": _head(trained)},
    )


def _head(trained: bool) -> str:
    return "trained" if trained else "frozen"


def _plain(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, beta: float) -> Any:
    from fastpeft_kernels.loss.divergence_reference import divergence_reference

    logits = hidden @ weight.t(), teacher_hidden @ teacher_weight.t()
    return (divergence_reference(*logits, 1.0, beta).mean(),)


def _reference(beta: float, inputs: Inputs) -> Forward:
    """In fp64 in chunks, so that a GPU holds it."""
    exact = inputs.tensors["hidden"].dtype == torch.float64
    return by_name(partial(_chunked if exact else _plain, beta=beta))(inputs)


def _chunked(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, beta: float
) -> Sequence[Tensor]:
    """PyTorch by a checkpoint for each chunk of tokens."""

    def part(x: Tensor, y: Tensor) -> Tensor:
        return _plain(x, weight, y, teacher_weight, beta)[0] * len(x)  # type: ignore[no-any-return]

    parts = zip(hidden.split(CHUNK), teacher_hidden.split(CHUNK), strict=True)
    return (torch.stack([checkpoint(part, *each, use_reentrant=False) for each in parts]).sum() / len(hidden),)


def _fastpeft(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, beta: float
) -> Sequence[Tensor]:
    from fastpeft_kernels.loss import Head, Teacher, linear_distillation
    from fastpeft_kernels.weights import DenseWeight

    head = Head(weight if weight.requires_grad else DenseWeight(weight))
    teacher = Teacher(teacher_hidden, Head(DenseWeight(teacher_weight)))
    return (linear_distillation(hidden, head, teacher, beta=beta).loss,)


def _liger(beta: float, inputs: Inputs) -> Forward:
    """Its JSD with the weight of the labels' loss zero; it has labels nevertheless."""
    library = package("liger_kernel.chunked_loss", inputs)
    loss = library.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)
    tensors = inputs.tensors
    labels = torch.zeros(len(tensors["hidden"]), dtype=torch.int64, device=tensors["hidden"].device)
    order = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    return lambda: (loss(*(tensors[name] for name in order), labels),)


def _trl(beta: float, inputs: Inputs) -> Forward:
    run = package("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    hidden, weight, teacher_hidden, teacher_weight = inputs.tensors.values()
    if not hidden.is_cuda and hidden.dtype.itemsize < 4:
        raise NotHereError("multiplies in fp32 on a CPU")
    return lambda: (run.apply(hidden, weight, None, teacher_hidden, teacher_weight, None, beta)[0].mean(),)
