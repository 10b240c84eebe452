"""The rows of a weight that belong to labels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..common.shapes import rounds
from ..weights import FrozenWeight
from .problem import decoded_chunks

_PIECE = 512
_DECODED_PIECE = 4096  # a weight that does not lie dense is decoded once more for each
_WORDS = 1024


def label_rows(
    weight: FrozenWeight, labels: Tensor, dtype: torch.dtype, room: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """(part of the labels, W of these), one part after the other, so that not all rows lie in memory at once.

    Does not wait for a GPU. There a label outside [0, words) fails the device's assertion, as in `index_select`, where
    the weight lies dense; else its row is zero.

    Args:
        labels: (tokens,) int64.
        dtype: to decode in; dense rows come in their own.
        room: (rows, hidden_size) for dense rows of its dtype, which are then valid until the next are asked for.
    """
    dense = weight.ready(weight.dtype)
    size = _DECODED_PIECE if dense is None else _PIECE
    if dense is None or room is None or room.dtype != dense.dtype or not room.shape[0]:
        room = None
    else:
        size = min(size, room.shape[0])
    for first in rounds(range(0, labels.shape[0], size), labels.device):
        part = slice(first, first + size)
        of_part = labels[part]
        if dense is None:
            yield part, _decoded(weight, of_part, dtype)
        elif room is None:
            yield part, dense.index_select(0, of_part)
        else:
            yield part, torch.index_select(dense, 0, of_part, out=room[: of_part.shape[0]])


def _decoded(weight: FrozenWeight, labels: Tensor, dtype: torch.dtype) -> Tensor:
    rows = torch.zeros((labels.shape[0], weight.shape[1]), dtype=dtype, device=weight.device)
    for first, last, w in decoded_chunks(weight, dtype, _WORDS):
        local = labels - first
        inside = (local >= 0) & (local < last - first)
        if rows.device.type == "cpu":
            places = inside.nonzero()[:, 0]
            rows[places] = w[local[places]]
        else:
            picked = w.index_select(0, local.clamp(0, last - first - 1))
            torch.where(inside[:, None], picked, rows, out=rows)
    return rows
