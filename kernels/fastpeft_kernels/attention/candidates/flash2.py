"""FlashAttention 2, the package flash-attn (2.8.4 was read)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import flash
from .request import Request

_MODULE = "flash_attn"


class Flash2:
    """All of `flash`, with dropout and heads of any size up to 256, on compute capability 8.0 and newer; no sinks."""

    name = "fa2"
    beyond_sdpa = True

    def absence(self, device: torch.device) -> str | None:
        return flash.absence(_MODULE, device, range(80, 1000))

    def version(self) -> str:
        return flash.version_of("flash-attn")

    def refusal(self, request: Request) -> str | None:
        if request.scores.sinks is not None:
            return "expected no sinks"
        return flash.refusal(request, largest_head=256, multiple=1)

    def run(self, request: Request) -> Tensor:
        return flash.call(_MODULE, request, none=-1, dropout_p=request.scores.dropout)
