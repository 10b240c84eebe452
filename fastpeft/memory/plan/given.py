"""What a model that sees or hears was given, as far as memory goes: for the prediction of that very step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

SEEN = ("pixel_values", "pixel_values_videos", "input_features", "input_values")
"""What a model sees or hears; the rest of a batch are numbers of few bytes."""
HEARD = SEEN[2:]


@dataclass(frozen=True, eq=False)
class Given:
    """Of one call.

    Attributes:
        media: (shape, dtype) of what was seen or heard, by name.
        numbers: token IDs and sizes of pictures, which the model looks into. They are the caller's own tensors.
        labels: shape and dtype, None for none.
    """

    media: dict[str, tuple[torch.Size, torch.dtype]]
    numbers: dict[str, Tensor]
    labels: tuple[torch.Size, torch.dtype] | None

    @property
    def hears(self) -> bool:
        return any(name in HEARD for name in self.media)

    @property
    def written(self) -> torch.Size | None:
        """(rows, tokens) of what is read, or of what is heard is written down; None for neither."""
        shapes = [self.numbers[name].shape for name in ("input_ids", "decoder_input_ids") if name in self.numbers]
        if self.labels is not None:
            shapes.append(self.labels[0])
        return next((shape for shape in shapes if len(shape) == 2), None)

    @property
    def size(self) -> tuple[int, int]:
        """Rows, and tokens of each, 1 where nothing is written."""
        rows, tokens = self.written or (next(iter(self.media.values()))[0][0], 1)
        return rows, tokens

    @property
    def nbytes(self) -> tuple[int, ...]:
        return tuple(shape.numel() * dtype.itemsize for shape, dtype in self.media.values())

    def batch(self, valued: bool) -> dict[str, Tensor]:
        """The same without values, but for numbers.

        Args:
            valued: pixels have some, since pictures of zeros are left out.
        """
        made = {
            name: torch.ones(shape, dtype=dtype) if valued else torch.empty(shape, dtype=dtype, device="meta")
            for name, (shape, dtype) in self.media.items()
        }
        made |= {name: each.detach().cpu() for name, each in self.numbers.items()}
        shape, dtype = self.labels or (torch.Size(self.size), torch.int64)
        return made | {"labels": torch.empty(shape, dtype=dtype, device="meta")}


def given_of(arguments: Mapping[str, Any]) -> Given | None:
    """Of what a model was called with; None where it neither saw nor heard, or read no rows of token IDs beside it.

    Masks are left out: no row is padded.
    """
    tensors = {name: each for name, each in arguments.items() if isinstance(each, Tensor)}
    media = {name: (each.shape, each.dtype) for name, each in tensors.items() if name in SEEN and each.dim() > 0}
    ids = tensors.get("input_ids")
    if not media or not (ids is None or is_rows(ids)):
        return None
    labels = tensors.pop("labels", None)
    numbers = {
        name: each
        for name, each in tensors.items()
        if name not in SEEN
        and not (each.is_floating_point() or each.dtype == torch.bool or name.endswith(("mask", "position_ids")))
    }
    return Given(media, numbers, None if labels is None else (labels.shape, labels.dtype))


def is_rows(ids: Any) -> TypeGuard[Tensor]:
    """Whether it is a matrix of token IDs."""
    return isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point()
