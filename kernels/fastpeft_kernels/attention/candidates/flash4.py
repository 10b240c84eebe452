"""FlashAttention 4, the package flash-attn-4 (the source of August 2026 was read)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.device import device_capability
from . import flash
from .request import Request

_MODULE = "flash_attn.cute"


class Flash4:
    """All of `flash` on compute capability 9.0 and newer, in heads of a multiple of 8 up to 128, on 9.x up to 256;
    sinks that are not trained; no dropout."""

    name = "fa4"
    beyond_sdpa = True

    def absence(self, device: torch.device) -> str | None:
        return flash.absence(_MODULE, device, range(90, 1000))

    def version(self) -> str:
        return flash.version_of("flash-attn-4")

    def refusal(self, request: Request) -> str | None:
        if request.scores.dropout > 0.0:
            return "expected no dropout"
        sinks = request.scores.sinks
        if sinks is not None and (sinks.dtype != torch.bfloat16 or (sinks.requires_grad and torch.is_grad_enabled())):
            return f"expected sinks in bf16 without gradient, got {sinks.dtype}"  # all that every version takes
        hopper = (device_capability(request.q.device) or 0) // 10 == 9
        return flash.refusal(request, largest_head=256 if hopper else 128, multiple=8)

    def run(self, request: Request) -> Tensor:
        sinks = request.scores.sinks
        more = {} if sinks is None else {"learnable_sink": sinks.detach()}
        return flash.call(_MODULE, request, none=None, **more)
