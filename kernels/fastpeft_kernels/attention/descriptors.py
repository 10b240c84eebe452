"""What the kernels read q, k, v and dout through: pointers, or Hopper's tensor descriptors.

With a descriptor the copy engine computes addresses and fills up ragged edges, which leaves registers to the sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.device import device_capability
from .tiles import Tile, block_of

_FIRST_CAPABILITY = 90
_ALIGNMENT = 16  # bytes, of addresses and strides


def sources(tile: Tile, q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None = None) -> dict[str, Any]:
    """The arguments TMA, q_ptr, k_ptr, v_ptr and, where there is one, do_ptr; all of one kind."""
    rows = {"q_ptr": (q, tile.block_m), "k_ptr": (k, tile.block_n), "v_ptr": (v, tile.block_n)}
    if dout is not None:
        rows["do_ptr"] = (dout, tile.block_m)
    if not (tile.tma and all(_describable(t) for t, _ in rows.values())):
        return {"TMA": False, **{name: t for name, (t, _) in rows.items()}}
    return {"TMA": True, **{name: _describe(t, block) for name, (t, block) in rows.items()}}


def _describable(t: Tensor) -> bool:
    """On a GPU that has them, or interpreted; 16-bit, aligned, not empty, and not one row for all."""
    capability = device_capability(t.device)
    if t.dtype == torch.float32 or t.numel() == 0 or (capability is not None and capability < _FIRST_CAPABILITY):
        return False
    steps = [stride * t.itemsize for stride in _strides(t)[:3]]
    return t.data_ptr() % _ALIGNMENT == 0 and all(step > 0 and step % _ALIGNMENT == 0 for step in steps)


def _strides(t: Tensor) -> list[int]:
    """Those of kinds of which there is one don't matter, but must be aligned."""
    steps = [stride if size > 1 else _ALIGNMENT for stride, size in zip(t.stride(), t.shape, strict=True)]
    return [*steps[:3], 1]


def _describe(t: Tensor, block: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, list(t.shape), _strides(t), [1, 1, block, block_of(t.shape[-1])])
