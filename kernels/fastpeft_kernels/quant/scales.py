"""The scales of the blocks: in fp32, or "nested", quantised to 8 bits themselves (QLoRA's double quantisation)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .storage import Packed4bit
from .tables import dynamic_code

NESTED_BLOCKSIZE = 256
_BINS = 65536


class NestedScales(NamedTuple):
    """Scales in 8 bits; the fields are those of `Packed4bit`."""

    absmax: Tensor
    nested_absmax: Tensor
    nested_code: Tensor
    nested_offset: Tensor


def decode_scales(packed: Packed4bit, first: int, last: int) -> Tensor:
    """Scales (last - first,) fp32 of the blocks first <= b < last, as stored (a view) or computed when nested."""
    absmax = packed.absmax[first:last]
    if packed.nested_absmax is None:
        return absmax
    assert packed.nested_code is not None and packed.nested_offset is not None and packed.nested_blocksize is not None
    group = torch.arange(first, last, device=absmax.device) // packed.nested_blocksize
    fraction = packed.nested_code.index_select(0, absmax.to(torch.int32))
    # Two roundings, as in bitsandbytes: no fused multiply-add here.
    return (fraction * packed.nested_absmax.index_select(0, group)).add_(packed.nested_offset)


def encode_scales(absmax: Tensor) -> NestedScales:
    """Quantises scales (blocks,) fp32 to 8 bits, in blocks of 256 around their mean.

    Bit for bit what bitsandbytes does on x86 CPUs: a scale is first rounded to one of 65,536 bins over [-1, 1] and the
    bin then takes the nearest code. bitsandbytes on CUDA compares with the midpoints directly, so a scale within half a
    bin of a midpoint can get the neighbouring code there; and the mean depends on each device's order of summation.
    """
    code = dynamic_code(absmax.device)
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    centred = absmax - offset
    groups = -(-absmax.numel() // NESTED_BLOCKSIZE)
    padded = torch.zeros(groups * NESTED_BLOCKSIZE, dtype=torch.float32, device=absmax.device)
    padded[: absmax.numel()] = centred
    padded = padded.view(groups, NESTED_BLOCKSIZE)
    nested_absmax = padded.abs().amax(1) if groups else padded.new_zeros(0)
    scaled = (padded * (1.0 / nested_absmax)[:, None]).clamp_(-1, 1)
    bins = ((scaled + 1.0) * 0.5 * (_BINS - 1) + 0.5).to(torch.int32)
    middles = 0.5 * (code[:-1] + code[1:])
    index = torch.bucketize(-1.0 + (2.0 * bins.float()) / (_BINS - 1), middles, out_int32=True).to(torch.uint8)
    index.masked_fill_((nested_absmax == 0)[:, None], 0)
    return NestedScales(index.view(-1)[: absmax.numel()], nested_absmax, code, offset)
