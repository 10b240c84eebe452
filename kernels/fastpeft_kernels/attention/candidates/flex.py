"""PyTorch's FlexAttention, compiled on a GPU: Dong et al. 2024, arXiv:2412.05496."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import count
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from .flex_blocks import blocks_of
from .request import NotServedError, Request, absence_of_triton

_SMALLEST_HEAD = 16
_numbers = count()
_failed: dict[tuple[Any, ...], str] = {}  # why, of calls that could not be compiled


class Flex:
    """Bounds, intervals and padding as a mask of blocks, and a soft cap. No biases, sinks and dropout, no dense mask,
    and no gradients on a CPU."""

    name = "flex"
    beyond_sdpa = True

    def absence(self, device: torch.device) -> str | None:
        return absence_of_triton(device)

    def version(self) -> str:
        return ""

    def refusal(self, request: Request) -> str | None:
        q, _, v, mask, scores = request[:5]
        for name in ("relative", "bias", "sinks"):
            if getattr(scores, name) is not None:
                return f"expected no {name}"
        if scores.dropout > 0.0:
            return "expected no dropout"
        if mask.dense is not None:
            return "expected a mask that is not dense"
        if request.deterministic:
            return "expected deterministic=False: it does not promise the same bits"
        if q.dtype == torch.float64:
            return "expected 16 bits or fp32, got torch.float64"
        if min(q.shape[3], v.shape[3]) < _SMALLEST_HEAD:
            return f"expected heads of {_SMALLEST_HEAD} features or more, got {q.shape[3]} and {v.shape[3]}"
        if q.device.type == "cpu" and request.gradients:
            return "expected no gradients on a CPU, where it has none"
        return _failed.get(_case(request))

    def run(self, request: Request) -> Tensor:
        q, k, v, mask, scores = request[:5]
        if not request.gradients:
            q, k, v = q.detach(), k.detach(), v.detach()
        function = _flex if q.device.type == "cpu" else _compiled(_kind(request))
        capped = None if scores.softcap is None else _cap(scores.softcap)
        scale = None if scores.scale == q.shape[3] ** -0.5 else scores.scale  # a number that is given is compiled in
        from torch._dynamo import exc as dynamo

        try:
            out = function(q, k, v, capped, blocks_of(mask, q, k), scale, q.shape[1] != k.shape[1])
        except (dynamo.TorchDynamoException, dynamo.FailOnRecompileLimitHit) as error:
            reason = f"FlexAttention was not compiled: {type(error).__name__}: {str(error).partition(chr(10))[0][:100]}"
            _failed[_case(request)] = reason
            raise NotServedError(reason) from error
        return out.transpose(1, 2).contiguous().transpose(1, 2)


def _kind(request: Request) -> tuple[Any, ...]:
    """What a kernel is compiled for, but for sizes."""
    q, k, v, mask, scores = request[:5]
    parts = (mask.left, mask.right, mask.start is None, mask.keys is None, scores.softcap, scores.scale)
    return (q.dtype, q.shape[1], k.shape[1], q.shape[3], v.shape[3], request.gradients, *parts)


def _case(request: Request) -> tuple[Any, ...]:
    return (request.q.shape, request.k.shape, *_kind(request))


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_mod: Callable[..., Tensor] | None,
    blocks: Any,
    scale: float | None,
    gqa: bool,
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    out: Tensor = flex_attention(q, k, v, score_mod=score_mod, block_mask=blocks, scale=scale, enable_gqa=gqa)
    return out


@lru_cache
def _compiled(kind: tuple[Any, ...]) -> Callable[..., Tensor]:
    """`_flex` with compilations of its own: torch allows 8 a code object, for its sizes enough, but not for all kinds.

    In one graph: beyond the limit it would else be computed with all scores in memory.
    """
    code = _flex.__code__.replace(co_name=f"_flex_{next(_numbers)}")
    return torch.compile(FunctionType(code, _flex.__globals__), fullgraph=True)


def _cap(cap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped
