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
    selects = weight.selects
    size = _PIECE if selects else _DECODED_PIECE
    if not selects or room is None or room.dtype != weight.dtype or not room.shape[0]:
        room = None
    else:
        size = min(size, room.shape[0])
    for first in rounds(range(0, labels.shape[0], size), labels.device):
        part = slice(first, first + size)
        of_part = labels[part]
        if not selects:
            yield part, _decoded(weight, of_part, dtype)
        else:
            yield part, weight.select(of_part, None if room is None else room[: of_part.shape[0]])


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
