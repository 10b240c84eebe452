"""What the kernels read q, k, v and dout through: pointers, or Hopper's tensor descriptors.

With a descriptor the copy engine computes addresses and fills up ragged edges, which leaves registers to the sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common.device import device_capability
from .tiles import DESCRIBED, Tile, block_of

_ALIGNMENT = 16  # bytes, of addresses and strides


def sources(tile: Tile, q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None = None) -> dict[str, Any]:
    """The arguments TMA, q_ptr, k_ptr, v_ptr and, where there is one, do_ptr; all of one kind."""
    found: dict[str, Any] = {"q_ptr": q, "k_ptr": k, "v_ptr": v}
    if dout is not None:
        found["do_ptr"] = dout
    if not tile.tma or not _has_descriptors(q):
        return {"TMA": False, **found}
    strides = [_aligned_strides(t) for t in found.values()]
    if None in strides:
        return {"TMA": False, **found}
    for (name, t), of_it in zip(found.items(), strides, strict=True):
        block = tile.block_n if name in ("k_ptr", "v_ptr") else tile.block_m
        found[name] = TensorDescriptor(t, list(t.shape), of_it, [1, 1, block, block_of(t.shape[-1])])
    return {"TMA": True, **found}


def _has_descriptors(t: Tensor) -> bool:
    """On a GPU that gains by them, or interpreted, of 16-bit numbers."""
    capability = device_capability(t.device)
    return t.dtype != torch.float32 and (capability is None or capability in DESCRIBED)


def _aligned_strides(t: Tensor) -> list[int] | None:
    """A descriptor's; None for what is not aligned, empty, or one row for all.

    Those of kinds of which there is one don't matter, but must be aligned.
    """
    strides = [*t.stride()[:3], 1]
    for i, size in enumerate(t.shape[:3]):
        if size == 1:
            strides[i] = _ALIGNMENT
        elif size == 0 or strides[i] <= 0 or strides[i] * t.itemsize % _ALIGNMENT:
            return None
    return strides if t.data_ptr() % _ALIGNMENT == 0 else None
