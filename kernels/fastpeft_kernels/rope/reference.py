"""Rotary embeddings in plain PyTorch, as transformers writes them: the definition, differentiable, and the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from .rotation import Rotation


def rotary_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """(q, k) turned; q and k: (batch, heads, tokens, dim), cos and sin: (batch or 1, tokens, turned)."""
    cos, sin = (_of_each(table.unsqueeze(1), rotation) for table in (cos, sin))
    turned = cos.shape[-1]

    def turn(x: Tensor) -> Tensor:
        part = x[..., :turned]
        y = (part * cos) + (_quarter_turn(part, rotation.layout) * sin)
        return torch.cat([y.to(rotation.out), x[..., turned:].to(rotation.out)], -1)

    return turn(q), turn(k)


def _of_each(table: Tensor, rotation: Rotation) -> Tensor:
    """A value for every element that is turned."""
    if rotation.angles == "each":
        return table
    half = table[..., : table.shape[-1] // 2]
    return half.repeat_interleave(2, -1) if rotation.layout == "interleaved" else torch.cat([half, half], -1)


def _quarter_turn(x: Tensor, layout: str) -> Tensor:
    if layout == "halved":
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
