"""The steps of a fused loss, as `steps` defines them, in C++: fp32, fp16 and bf16, on a CPU."""

from __future__ import annotations

from torch import Tensor

from ..native.loss import Chunk
from . import steps
from .steps import Running, rescale

__all__ = ["gradient_step", "online_step", "rescale"]


def online_step(
    raw: Tensor,
    first: int,
    labels: Tensor,
    running: Running,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
    write: bool = False,
) -> None:
    """`steps.online_step`, which computes itself what is wanted seldom: the entropy and the largest logit's word."""
    if running.tilted is not None or running.best is not None:
        how = (raw, first, labels, running)
        steps.online_step(*how, bias=bias, scale=scale, softcap=softcap, class_weight=class_weight, write=write)
    else:
        chunk = Chunk(raw, first, labels, bias, scale, softcap, class_weight)
        chunk.online(running.slack, running.top, running.others, running.label, running.factor, running.total)


def gradient_step(
    raw: Tensor,
    first: int,
    labels: Tensor,
    top: Tensor,
    inverse: Tensor,
    others: Tensor,
    d_nll: Tensor | None,
    d_lse: Tensor | None,
    d_total: Tensor | None,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
) -> None:
    """`steps.gradient_step`."""
    chunk = Chunk(raw, first, labels, bias, scale, softcap, class_weight)
    chunk.gradient(top, inverse, others, d_nll, d_lse, d_total)
