"""Times on a CUDA GPU: fused distillation beside its products and its peers.

8192 tokens, 4096 features of student and teacher, 128256 words, bf16: the logits of both in fp32 would take 8.4 GB.
Three products of tokens x words x features (a frozen head) are 25.8 TFLOP, 37 ms at 700 TFLOP/s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..weights import DenseWeight
from .distillation import linear_distillation
from .divergence_reference import divergence_reference
from .gpu_speed import BF16, FEATURES, TOKENS, WORDS, measured
from .head import Head, Teacher, TopLogits

_DEVICE = torch.device("cuda")
_TOP = 64
_CHUNK = 512  # tokens of a peer that makes logits


class _Problem(NamedTuple):
    """hidden (tokens, features) and weight (words, features) of the student, and the teacher's."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor


def speed_checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named measurements, in microseconds, TFLOP/s and MiB."""
    for beta in (0.0, 0.5):
        yield f"speed distillation frozen, beta {beta}", partial(_measure, beta, False)
        yield f"speed distillation trained, beta {beta}", partial(_measure, beta, True)
    yield "speed distillation frozen, beta 0.5, with labels", partial(_measure, 0.5, False, cross_entropy_weight=0.5)
    yield "speed distillation frozen, beta 0.0, of the largest logits", _measure_top
    for name, peer in _PEERS.items():
        for trained in (False, True):
            what = "trained" if trained else "frozen"
            yield f"speed distillation {what}, beta 0.5, {name}", partial(_measure_peer, peer, trained)


def _problem(trained: bool) -> _Problem:
    torch.manual_seed(0)  # so that all losses are the same
    hidden, teacher_hidden = (torch.randn((TOKENS, FEATURES), device=_DEVICE, dtype=BF16) for _ in range(2))
    size = FEATURES**-0.5
    weights = [torch.randn((WORDS, FEATURES), device=_DEVICE, dtype=BF16).mul_(size) for _ in range(2)]
    return _Problem(hidden.requires_grad_(), weights[0].requires_grad_(trained), teacher_hidden, weights[1])


def _measure(beta: float, trained: bool, **ways: float) -> dict[str, Any]:
    hidden, weight, teacher_hidden, teacher_weight = _problem(trained)
    head = Head(weight if trained else DenseWeight(weight))
    teacher, labels = Teacher(teacher_hidden, Head(DenseWeight(teacher_weight))), _labels()

    def loss() -> Tensor:
        return linear_distillation(hidden, head, teacher, labels=labels, beta=beta, **ways).loss  # type: ignore[arg-type]

    return measured(loss, [hidden, weight] if trained else [hidden], 4 if trained else 3)


def _measure_top() -> dict[str, Any]:
    hidden, weight, _, _ = _problem(False)
    words = torch.stack([torch.randperm(WORDS, device=_DEVICE)[:_TOP] for _ in range(64)]).repeat(TOKENS // 64, 1)
    teacher = TopLogits(torch.randn(words.shape, device=_DEVICE, dtype=BF16), words)
    head = Head(DenseWeight(weight))
    return measured(lambda: linear_distillation(hidden, head, teacher).loss, [hidden], 2)


def _measure_peer(peer: Callable[[_Problem], Tensor], trained: bool) -> dict[str, Any]:
    """What a peer cannot do here is no failure of ours."""
    problem = _problem(trained)
    wanted = [x for x in (problem.hidden, problem.weight) if x.requires_grad]
    try:
        return measured(lambda: peer(problem), wanted, 4 if trained else 3)
    except Exception as error:
        return {"not_measured": f"{type(error).__name__}: {str(error)[:200]}"}


def _labels() -> Tensor:
    return torch.randint(0, WORDS, (TOKENS,), device=_DEVICE)


def _liger(problem: _Problem) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)
    hidden, weight, teacher_hidden, teacher_weight = problem
    found: Tensor = loss(hidden, weight, teacher_hidden, teacher_weight, _labels())
    return found


def _trl(problem: _Problem) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, weight, teacher_hidden, teacher_weight = problem
    found: Tensor = ChunkedDivergenceFunction.apply(hidden, weight, None, teacher_hidden, teacher_weight, None, 0.5)[0]
    return found.mean()


def _chunked(problem: _Problem) -> Tensor:
    """A checkpoint for each chunk of tokens."""
    from torch.utils.checkpoint import checkpoint

    def part(x: Tensor, y: Tensor) -> Tensor:
        logits = (x @ problem.weight.t(), y @ problem.teacher_weight.t())
        return divergence_reference(*logits, 1.0, 0.5).sum()

    parts = zip(problem.hidden.split(_CHUNK), problem.teacher_hidden.split(_CHUNK), strict=True)
    sums = [checkpoint(part, x, y, use_reentrant=False) for x, y in parts]
    return torch.stack(sums).sum() / TOKENS


_PEERS: dict[str, Callable[[_Problem], Tensor]] = {"Liger": _liger, "TRL": _trl, "chunked PyTorch": _chunked}
