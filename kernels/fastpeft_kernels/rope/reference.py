"""Rotary embeddings in plain PyTorch, as transformers writes them: the definition, differentiable, and the oracle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rotation import Rotation


def rotary_reference(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, rotation: Rotation) -> tuple[Tensor, Any]:
    """(q, k) turned; q, k: (batch, heads, tokens, dim), k or None, cos, sin: (batch or 1, tokens, turned or half)."""
    cos, sin = (_of_each(table.unsqueeze(1), rotation) for table in (cos, sin))
    turned = cos.shape[-1]

    def turn(x: Tensor) -> Tensor:
        part = x[..., :turned]
        if rotation.layout == "separated":
            part = torch.cat([part[..., ::2], part[..., 1::2]], -1)
        y = (part * cos) + (_quarter_turn(part, rotation.layout) * sin)
        return torch.cat([y.to(rotation.out), x[..., turned:].to(rotation.out)], -1)

    return turn(q), None if k is None else turn(k)


def _of_each(table: Tensor, rotation: Rotation) -> Tensor:
    """A value for every element that is turned."""
    if rotation.angles == "each":
        return table
    half = table if rotation.angles == "half" else table[..., : table.shape[-1] // 2]
    return half.repeat_interleave(2, -1) if rotation.layout == "interleaved" else torch.cat([half, half], -1)


def _quarter_turn(x: Tensor, layout: str) -> Tensor:
    if layout == "interleaved":
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
