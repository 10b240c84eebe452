"""A mask and scores as tensors that are trained, tensors that are not, and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .masks import Mask
from .scores import Scores


class Numbers(NamedTuple):
    left: int | None
    right: int | None
    scale: float
    softcap: float | None
    dropout: float


class Flat(NamedTuple):
    """`tensors` are start, stop, keys, dense and seed."""

    tensors: Sequence[Tensor | None]
    numbers: Numbers


def flatten(mask: Mask, scores: Scores) -> Flat:
    """All but relative, bias and sinks."""
    tensors = (mask.start, mask.stop, mask.keys, mask.dense, scores.seed)
    return Flat(tensors, Numbers(mask.left, mask.right, scores.scale, scores.softcap, scores.dropout))


def unflatten(flat: Flat, relative: Tensor | None, bias: Tensor | None, sinks: Tensor | None) -> tuple[Mask, Scores]:
    start, stop, keys, dense, seed = flat.tensors
    left, right, scale, softcap, dropout = flat.numbers
    return Mask(left, right, start, stop, keys, dense), Scores(scale, softcap, relative, bias, sinks, dropout, seed)
