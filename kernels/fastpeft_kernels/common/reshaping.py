"""The result of an autograd function in the shape that its caller wants."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reshaped(y: Tensor, shape: Sequence[int]) -> Tensor:
    """y in another shape and, for autograd, no view of it: whoever gets it from an autograd function may write into it.

    Equivalent PyTorch: `y.view(shape)`, which torch would refuse to have written into there.

    Args:
        y: contiguous; its maker has no more use for it.
        shape: of as many elements.
    """
    return torch.ops.aten._unsafe_view.default(y, list(shape))  # type: ignore[no-any-return]
