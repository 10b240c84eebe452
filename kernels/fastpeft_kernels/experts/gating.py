"""What stands between an expert's two projections: a gated activation, the gate beside or between the columns of up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..activation import KINDS
from ..activation.api import fill_gated_activation, fill_gated_activation_backward
from ..activation.library import gated_activation_backward_library, gated_activation_library, pieces, wide
from ..activation.reference import gated_activation_reference

CLAMPED_SWIGLU = "clamped_swiglu"
GATINGS = (*KINDS, CLAMPED_SWIGLU)


@dataclass(frozen=True, slots=True)
class Gating:
    """act(gate) * up, or act(up) without a gate, of one matrix (rows, width).

    Attributes:
        kind: one of `activation.KINDS`; or "clamped_swiglu", (clamp(up, -limit, limit) + shift) * g * sigmoid(alpha g)
            with g = min(gate, limit), as gpt-oss has it, and without a shift DeepSeek V4.
        gated: whether the matrix holds gate and up; else up alone.
        interleaved: gate in the even columns and up in the odd ones; else the gate is the first half.
        alpha, limit, shift: of "clamped_swiglu".
    """

    kind: str
    gated: bool = True
    interleaved: bool = False
    alpha: float = 1.0
    limit: float = 0.0
    shift: float = 1.0

    def columns(self, pre: Tensor) -> tuple[Tensor | None, Tensor]:
        """(gate, up) of (..., width), views; None for no gate."""
        if not self.gated:
            return None, pre
        if self.interleaved:
            return pre[..., ::2], pre[..., 1::2]
        gate, up = pre.chunk(2, dim=-1)
        return gate, up

    def reference(self, pre: Tensor) -> Tensor:
        """(..., features) by PyTorch's operations, differentiable: the definition."""
        gate, up = self.columns(pre)
        if self.kind != CLAMPED_SWIGLU:
            return gated_activation_reference(gate, up, self.kind)
        assert gate is not None
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + self.shift) * (gate * torch.sigmoid(gate * self.alpha))

    def forward(self, pre: Tensor) -> Tensor:
        """(rows, features) of (rows, width); computed in fp32 (fp64 in fp64) and rounded once."""
        gate, up = self.columns(pre)
        h = torch.empty(tuple(up.shape), dtype=pre.dtype, device=pre.device)
        if self.kind == CLAMPED_SWIGLU:
            for piece in pieces(up):
                h[piece] = self.reference(wide(pre[piece]))
        elif self.interleaved:
            gated_activation_library(gate, up, self.kind, h)
        else:
            fill_gated_activation(gate, up, self.kind, h)
        return h

    def backward(self, dh: Tensor, pre: Tensor, dpre: Tensor) -> None:
        """Fills `dpre` (rows, width) with the gradient of `pre`, and `dh` (rows, features) with the result again."""
        gate, up = self.columns(pre)
        dgate, dup = self.columns(dpre)
        if self.kind == CLAMPED_SWIGLU:
            assert gate is not None and dgate is not None
            for piece in pieces(up):
                self._clamped_backward(dh[piece], gate[piece], up[piece], dgate[piece], dup[piece])
        elif self.interleaved:
            gated_activation_backward_library(dh, gate, up, self.kind, dgate, dup, dh)
        else:
            fill_gated_activation_backward(dh, gate, up, self.kind, dgate, dup, dh)

    def _clamped_backward(self, dh: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
        grad, gate, up = wide(dh), wide(gate), wide(up)
        inside_gate, inside_up = gate <= self.limit, up.abs() <= self.limit
        gate, shifted = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit) + self.shift
        sigmoid = torch.sigmoid(gate * self.alpha)
        glu = gate * sigmoid
        slope = sigmoid * (1 + self.alpha * gate * (1 - sigmoid))
        dgate.copy_(grad * shifted * slope * inside_gate)
        dup.copy_(grad * glu * inside_up)
        dh.copy_(shifted * glu)
