"""4-bit weights as the peers of a benchmark take them: one storage for all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpeft_kernels.quant import Packed4bit, encode_4bit

from ..left_out import NotHereError

BLOCKSIZE = 64


def encode(weight: Tensor) -> Packed4bit:
    """NF4 with nested scales, as QLoRA has it."""
    return encode_4bit(weight, "nf4", BLOCKSIZE, nested=True)


def stored_bytes(rows: int, columns: int) -> int:
    """What `encode` makes of a matrix."""
    blocks = rows * columns // BLOCKSIZE
    return rows * columns // 2 + blocks + 4 * -(-blocks // 256)


def decode(packed: Packed4bit, dtype: torch.dtype) -> Tensor:
    """The values in plain PyTorch, (out_features, in_features); whole blocks only. The definition is `Packed4bit`'s."""
    scale = packed.absmax
    if packed.nested_absmax is not None:
        assert packed.nested_code is not None and packed.nested_offset is not None
        outer = packed.nested_absmax.repeat_interleave(packed.nested_blocksize)[: scale.numel()]  # type: ignore[arg-type]
        scale = packed.nested_code[scale.int()] * outer + packed.nested_offset
    nibbles = torch.stack([packed.packed >> 4, packed.packed & 15], 1).view(-1, packed.blocksize)
    return (packed.code[nibbles.int()] * scale[:, None]).to(dtype).view(packed.shape)


def bitsandbytes_state(packed: Packed4bit) -> Any:
    """bitsandbytes' QuantState over the same memory. Raises NotHereError where it is not installed."""
    try:
        from bitsandbytes.functional import QuantState
    except ImportError as error:
        raise NotHereError(str(error)) from error
    more: dict[str, Any] = {"blocksize": packed.blocksize, "quant_type": packed.quant_type, "dtype": packed.dtype}
    if packed.nested_absmax is not None:
        inner = QuantState(packed.nested_absmax, None, packed.nested_code, packed.nested_blocksize, None, torch.float32)
        more |= {"offset": packed.nested_offset, "state2": inner}
    return QuantState(packed.absmax, torch.Size(packed.shape), packed.code, **more)


def bitsandbytes_linear(packed: Packed4bit, bias: Tensor | None) -> Any:
    """bitsandbytes' Linear4bit over the same memory, frozen. Raises NotHereError where it is not installed."""
    state = bitsandbytes_state(packed)
    from bitsandbytes.nn import Linear4bit, Params4bit

    rows, columns = packed.shape
    new = Linear4bit(columns, rows, False, packed.dtype, quant_type=packed.quant_type, device="meta")
    new.weight = Params4bit(
        packed.packed.view(-1, 1), quant_state=state, quant_type=packed.quant_type, bnb_quantized=True, module=new
    )
    new.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
    new.support_avx512bf16_for_cpu = False  # else an eval forward on such a CPU rearranges the weights in place
    return new
