"""Who computes a loss over a vocabulary from hidden states and a head: adapters of packages, each once.

All take tensors by name: hidden (tokens, features), weight (words, features), labels (tokens,).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..left_out import NotHereError
from .case import Forward, Inputs, Peer
from .making import Function, by_name, package
from .peers import compiled

CHUNK = 1024
"""Tokens of which plain PyTorch in chunks makes logits at a time."""


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Sequence[Tensor]:
    """Mean cross-entropy, with all logits in memory, and once more in fp32 at least."""
    return (F.cross_entropy(at_least_fp32(hidden @ weight.t()), labels),)


def plain_with_lora(hidden: Tensor, weight: Tensor, labels: Tensor, a: Tensor, b: Tensor) -> Sequence[Tensor]:
    """The same with LoRA on the head: a (rank, features), b (words, rank), scaling 2."""
    logits = hidden @ weight.t() + 2 * (hidden @ a.t()) @ b.t()
    return (F.cross_entropy(at_least_fp32(logits), labels),)


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Sequence[Tensor]:
    """PyTorch by a checkpoint for each chunk of tokens."""

    def part(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(at_least_fp32(x @ weight.t()), y, reduction="sum")

    parts = zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
    return (torch.stack([checkpoint(part, *each, use_reentrant=False) for each in parts]).sum() / labels.numel(),)


def fastpeft(hidden: Tensor, weight: Tensor, labels: Tensor, a: Any = None, b: Any = None) -> Sequence[Tensor]:
    """`linear_cross_entropy`."""
    from fastpeft_kernels.loss import Head, linear_cross_entropy
    from fastpeft_kernels.weights import DenseWeight

    s = None if a is None else 2 * (hidden @ a.t())
    head = Head(weight if weight.requires_grad else DenseWeight(weight), s=s, b=b)
    return (linear_cross_entropy(hidden, head, labels).loss,)


def _liger(inputs: Inputs) -> Forward:
    run = package("liger_kernel.ops.fused_linear_cross_entropy", inputs).LigerFusedLinearCrossEntropyFunction
    hidden, weight, labels = (inputs.tensors[name] for name in ("hidden", "weight", "labels"))

    def forward() -> Sequence[Tensor]:
        found = run.apply(hidden, weight, labels)
        return (found[0] if isinstance(found, tuple) else found,)

    return forward


def _trl(inputs: Inputs) -> Forward:
    log_probs = trl_log_probs()
    tensors = inputs.tensors
    return lambda: (-log_probs(tensors["hidden"], tensors["weight"], tensors["labels"]).mean(),)


def trl_log_probs() -> Any:
    """TRL's chunked function, from (hidden, weight, labels) to the log-probability of each label, (tokens,).

    Raises:
        NotHereError: TRL is not installed, or has none.
    """
    run = package("trl.kernels").ChunkedLogProbFunction
    chunk = package("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
    return lambda hidden, weight, labels: run.apply(hidden, weight, None, labels, 1.0, chunk, None, 1.0, ())[0]


def _cut(inputs: Inputs) -> Forward:
    run = package("cut_cross_entropy", inputs).linear_cross_entropy
    hidden, weight, labels = (inputs.tensors[name] for name in ("hidden", "weight", "labels"))
    return lambda: (run(hidden, weight, labels),)


def _with_lora(peer: Peer) -> Peer:
    def refuse(inputs: Inputs) -> Forward:
        raise NotHereError("knows no adapter of the head")

    return refuse


def peers(lora: bool) -> dict[str, Peer]:
    """By name; of those that know no adapter of the head this is said where there is one."""
    reference: Function = plain_with_lora if lora else plain
    others = {"torch in chunks": by_name(chunked), "liger": _liger, "trl": _trl, "cut cross-entropy": _cut}
    if lora:
        others = {name: _with_lora(peer) for name, peer in others.items()}
    return {"fastpeft": by_name(fastpeft), "torch.compile": compiled(by_name(reference)), **others}
