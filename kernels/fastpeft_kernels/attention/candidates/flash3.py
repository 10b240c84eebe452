"""FlashAttention 3, the package flash_attn_3 for Hopper (the source of August 2026 was read)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import flash
from .request import Request

_MODULE = "flash_attn_interface"


class Flash3:
    """All of `flash` on compute capability 9.0, in heads of a multiple of 8 up to 256; no sinks, no dropout."""

    name = "fa3"
    beyond_sdpa = True

    def absence(self, device: torch.device) -> str | None:
        return flash.absence(_MODULE, device, range(90, 91))

    def version(self) -> str:
        return flash.version_of("flash-attn-3")

    def refusal(self, request: Request) -> str | None:
        for name, given in (("sinks", request.scores.sinks is not None), ("dropout", request.scores.dropout > 0.0)):
            if given:
                return f"expected no {name}"
        return flash.refusal(request, largest_head=256, multiple=8)

    def run(self, request: Request) -> Tensor:
        return flash.call(_MODULE, request, none=-1)
