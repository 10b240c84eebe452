"""Direct preference optimisation, from hidden states of policy and reference under one frozen head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Forward, Inputs, OpCase
from .loss_peers import at_least_fp32, trl_log_probs
from .making import Numbers, by_name, floors, only_both, package
from .models import BERT_BASE, LLAMA_8B, QWEN3_600M, T5_BASE, Shape
from .peers import compiled

BETA = 0.1
LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(device: str, depth: str) -> Iterator[OpCase]:
    """In fp32 on a CPU, short pairs; in bf16 on a GPU, four pairs of 512 tokens each."""
    if device == "cpu":
        yield case(BERT_BASE, 2, 8, torch.float32)
        if depth != "quick":
            yield from (case(shape, 8, 16, torch.float32) for shape in (BERT_BASE, T5_BASE))
        return
    yield case(QWEN3_600M, 4, 512, torch.bfloat16)
    if depth != "quick":
        yield case(LLAMA_8B, 4, 512, torch.bfloat16)
    if depth == "full":
        yield case(LLAMA_8B, 2, 2048, torch.bfloat16)


def case(shape: Shape, pairs: int, tokens: int, dtype: torch.dtype) -> OpCase:
    """Mean DPO loss of (2 pairs, tokens, hidden), chosen answers first, of the policy and of the reference.

    An answer's log-probability is the mean over its tokens: the same work as the sum, whose rounding would be all that
    is left of the error of a loss of one number, of any size by chance.

    Floor, with P = 2 (2 pairs tokens) hidden vocab: forward makes the logits of policy and reference, 2 P; backward
    the policy's gradient, P. Forward reads both hidden states, labels and the head; backward reads the policy's, for
    no logits are kept, and writes their gradient.
    """
    rows = 2 * pairs

    def make(device: str, dtype_: torch.dtype, seed: int) -> Inputs:
        numbers = Numbers(device, dtype_, dtype, seed)
        hidden = numbers.normal(rows, tokens, shape.hidden)
        other = numbers.normal(rows, tokens, shape.hidden, scale=0.05)
        tensors = {
            "reference": (hidden + other).to(dtype).to(dtype_),
            "hidden": hidden.requires_grad_(),
            "weight": numbers.normal(shape.vocab, shape.hidden, scale=shape.hidden**-0.5),
            "labels": numbers.integers(shape.vocab, rows, tokens),
        }
        return Inputs(tensors, (hidden,), (numbers.one(),))

    states, weight = rows * tokens * shape.hidden * dtype.itemsize, shape.vocab * shape.hidden * dtype.itemsize
    product, labels = 2.0 * rows * tokens * shape.hidden * shape.vocab, 8 * rows * tokens
    return OpCase(
        op="preference",
        name=f"{shape.name}, DPO, {pairs} pairs of {tokens} tokens",
        dtype=dtype,
        make=make,
        floors=only_both(
            floors((2 * product, product), 2 * states + weight + labels, 4, states + weight + labels, states)
        ),
        reference=by_name(_plain),
        peers={
            "fastpeft": by_name(_fastpeft),
            "torch.compile": compiled(by_name(_plain)),
            "liger": _liger,
            "trl": _trl,
        },
        settings={"model": shape.name, "tokens": rows * tokens},
    )


def _means(log_probs: LogProbs, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of the chosen and of the rejected answers, (pairs,) each."""
    found = log_probs(hidden.flatten(0, 1), weight, labels.flatten()).view(labels.shape).mean(1)
    return found[: len(found) // 2], found[len(found) // 2 :]


def _loss(log_probs: LogProbs, hidden: Tensor, reference: Tensor, weight: Tensor, labels: Tensor) -> Sequence[Tensor]:
    chosen, rejected = _means(log_probs, hidden, weight, labels)
    with torch.no_grad():
        of_chosen, of_rejected = _means(log_probs, reference, weight, labels)
    return (-F.logsigmoid(BETA * ((chosen - of_chosen) - (rejected - of_rejected))).mean(),)


def _plain(hidden: Tensor, reference: Tensor, weight: Tensor, labels: Tensor) -> Sequence[Tensor]:
    return _loss(_plain_log_probs, hidden, reference, weight, labels)


def _plain_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(at_least_fp32(hidden @ weight.t()), labels, reduction="none")


def _fastpeft(hidden: Tensor, reference: Tensor, weight: Tensor, labels: Tensor) -> Sequence[Tensor]:
    from fastpeft_kernels.loss import Head, dpo_loss, linear_cross_entropy
    from fastpeft_kernels.weights import DenseWeight

    head = Head(DenseWeight(weight))

    def log_probs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        found = linear_cross_entropy(hidden, head, labels, log_probs=True).log_probs
        assert found is not None
        return found

    chosen, rejected = _means(log_probs, hidden, weight, labels)
    with torch.no_grad():
        of_reference = _means(log_probs, reference, weight, labels)
    return (dpo_loss(chosen, rejected, *of_reference, beta=BETA).losses.mean(),)


def _liger(inputs: Inputs) -> Forward:
    loss = package("liger_kernel.chunked_loss", inputs).LigerFusedLinearDPOLoss(beta=BETA, average_log_prob=True)
    hidden, reference, weight, labels = (inputs.tensors[name] for name in ("hidden", "reference", "weight", "labels"))
    return lambda: (loss(weight, hidden, labels, ref_input=reference, ref_weight=weight)[0],)


def _trl(inputs: Inputs) -> Forward:
    log_probs = trl_log_probs()
    return lambda: _loss(log_probs, **inputs.tensors)
