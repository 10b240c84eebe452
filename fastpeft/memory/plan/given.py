"""What a model that sees or hears was given, as far as memory goes: for the prediction of that very step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SEEN = ("pixel_values", "pixel_values_videos", "input_features", "input_values")
"""What a model sees or hears; the rest of a batch are numbers of few bytes."""
HEARD = SEEN[2:]


@dataclass(frozen=True)
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
    def size(self) -> tuple[int, int]:
        """Rows, and tokens of each; of what is heard those that are written."""
        ids, first = self.numbers.get("input_ids"), next(iter(self.media.values()))[0]
        if ids is not None:
            return ids.shape[0], ids.shape[1]
        written = self.labels[0] if self.labels is not None else torch.Size()
        return first[0], written[1] if len(written) == 2 else 1

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
    """Of what a model was called with; None where it neither saw nor heard. Masks are left out: no row is padded."""
    tensors = {name: each for name, each in arguments.items() if isinstance(each, Tensor)}
    media = {name: (each.shape, each.dtype) for name, each in tensors.items() if name in SEEN}
    if not media:
        return None
    labels = tensors.pop("labels", None)
    numbers = {
        name: each
        for name, each in tensors.items()
        if not (each.is_floating_point() or each.dtype == torch.bool or name.endswith(("mask", "position_ids")))
    }
    return Given(media, numbers, None if labels is None else (labels.shape, labels.dtype))
