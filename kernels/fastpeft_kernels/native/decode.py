"""4-bit decoding in C++."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..common.writes import count_writes
from .build import native_function, native_library

if TYPE_CHECKING:
    from ..quant.storage import Packed4bit

_FUNCTIONS = {
    torch.float32: "fastpeft_decode_4bit_float32",
    torch.bfloat16: "fastpeft_decode_4bit_bfloat16",
    torch.float16: "fastpeft_decode_4bit_float16",
}
_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_ARGUMENTS = (*[_POINTER] * 6, *[_INT64] * 3, _POINTER, *[_INT64] * 3, *[_INT32] * 2)


def decode_4bit_native(packed: Packed4bit, out: Tensor, first: int, last: int, plain: bool = False) -> bool:
    """Fill `out` with rows first <= n < last, on as many threads as torch uses here.

    Args:
        packed: a weight of shape (N, K) on CPU.
        out: (last - first, K) on CPU.
        plain: without vector instructions, as on processors that have none of ours.

    Returns:
        False, with `out` untouched, when `decode_4bit_refusal` says why or the library cannot be built here.
    """
    library = None if decode_4bit_refusal(packed, out.dtype, out) else native_library()
    if library is None:
        return False
    if out.numel() == 0:
        return True
    nested = (packed.nested_absmax, packed.nested_code, packed.nested_offset)
    native_function(library, _FUNCTIONS[out.dtype], _ARGUMENTS)(
        packed.packed.data_ptr(), packed.absmax.data_ptr(), packed.code.data_ptr(),
        *(None if tensor is None else tensor.data_ptr() for tensor in nested),
        packed.blocksize, packed.nested_blocksize or 1, first * packed.shape[1],
        out.data_ptr(), last - first, packed.shape[1], out.stride(0), torch.get_num_threads(), plain,
    )  # fmt: skip
    count_writes(out)
    return True


def decode_4bit_refusal(packed: Packed4bit, dtype: torch.dtype, out: Tensor | None) -> str:
    """What is wrong with decoding `packed` in C++ to `dtype`, into `out` or into new memory; "" when nothing is."""
    if packed.device.type != "cpu":
        return f"expected tensors on cpu for 'native', got tensors on {packed.device}"
    if dtype not in _FUNCTIONS:
        return f"expected a result in one of {tuple(_FUNCTIONS)} for 'native', got {dtype}"
    if out is not None and out.shape[1] > 1 and out.stride(1) != 1:
        return f"expected out with columns of stride 1 for 'native', got strides {out.stride()}"
    return ""
