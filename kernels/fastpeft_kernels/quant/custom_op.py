"""Decoding as torch.library ops, for torch.compile and dispatch modes.

Traced as they stand, the reference's loop over chunks would be unrolled and its roundings contracted by the compiler.
As an op it stays one node with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..native import decode_4bit_native
from .choosing import decode_backend
from .reference import decode_4bit_reference
from .storage import Packed4bit


def decode_into(packed: Packed4bit, out: Tensor, first: int, last: int, backend: str) -> Tensor:
    """Decodes rows first <= n < last into `out`; arguments are known to be right.

    Args:
        backend: "torch"; one of `forward.DECODE_NAMES`; "native", which leaves to "torch" what the C++ library cannot
            do; or "auto".
    """
    if backend == "auto":
        backend = decode_backend(packed, out)
    if backend == "native" and decode_4bit_native(packed, out, first, last):
        return out
    if not backend.startswith("triton"):
        return decode_4bit_reference(packed, out, first, last)
    from .forward import DECODE_CONFIGS, DECODE_NAMES, decode_4bit_triton

    return decode_4bit_triton(packed, out, first, last, DECODE_CONFIGS[DECODE_NAMES.index(backend)])


@torch.library.custom_op("fastpeft::decode_4bit", mutates_args=())
def decode_4bit_op(
    tensors: Sequence[Tensor],
    shape: Sequence[int],
    blocksize: int,
    nested_blocksize: int,
    quant_type: str,
    first: int,
    last: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Rows first <= n < last of the weight over `Packed4bit.tensors`; nested_blocksize is 0 when not nested."""
    out = tensors[0].new_empty((last - first, shape[1]), dtype=dtype)
    packed = _rebuild(tensors, shape, blocksize, nested_blocksize, quant_type)
    return decode_into(packed, out, first, last, backend)


@decode_4bit_op.register_fake
def _(
    tensors: Sequence[Tensor],
    shape: Sequence[int],
    blocksize: int,
    nested_blocksize: int,
    quant_type: str,
    first: int,
    last: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return tensors[0].new_empty((last - first, shape[1]), dtype=dtype)


@torch.library.custom_op("fastpeft::decode_4bit_out", mutates_args={"out"})
def decode_4bit_out_op(
    tensors: Sequence[Tensor],
    shape: Sequence[int],
    blocksize: int,
    nested_blocksize: int,
    quant_type: str,
    first: int,
    last: int,
    out: Tensor,
    backend: str,
) -> None:
    """The same into `out`."""
    packed = _rebuild(tensors, shape, blocksize, nested_blocksize, quant_type)
    decode_into(packed, out, first, last, backend)


@decode_4bit_out_op.register_fake
def _(
    tensors: Sequence[Tensor],
    shape: Sequence[int],
    blocksize: int,
    nested_blocksize: int,
    quant_type: str,
    first: int,
    last: int,
    out: Tensor,
    backend: str,
) -> None:
    return None


def _rebuild(
    tensors: Sequence[Tensor], shape: Sequence[int], blocksize: int, nested_blocksize: int, quant_type: str
) -> Packed4bit:
    # The dtype is that of the result, which is made already.
    return Packed4bit.from_tensors(
        tensors, blocksize, (shape[0], shape[1]), torch.float32, quant_type, nested_blocksize or None
    )
