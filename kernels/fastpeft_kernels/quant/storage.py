"""Where the bytes of a 4-bit weight are: bitsandbytes' storage, read in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QUANT_TYPES = ("nf4", "fp4")


@dataclass(frozen=True, eq=False)
class Packed4bit:
    """A matrix W of `shape` (N, K) in 4 bits an element, with one scale for each block of `blocksize` elements.

    Blocks run over W.flatten(), across row ends; the last may be partial. With e a flat index and
    blocks = ceil(N*K / blocksize):

        value(e) = code[nibble(e)] * scale(e // blocksize), in fp32, then cast
        nibble(e) = packed[e // 2] >> 4 for even e, packed[e // 2] & 15 for odd e
        scale(b) = absmax[b], or, nested, nested_code[absmax[b]] * nested_absmax[b // nested_blocksize] + nested_offset

    Args:
        packed: ceil(N*K / 2) bytes, contiguous, in any dtype (bitsandbytes' quant_storage) and shape.
        absmax: (blocks,) fp32; uint8 when nested. Any shape of that many elements.
        code: (16,) fp32, the value of each nibble.
        blocksize: 32, 64, ... or 4096 elements.
        shape: (N, K) = (out_features, in_features).
        dtype: floating dtype that was quantised; the default of decoding.
        quant_type: "nf4" or "fp4"; what `code` is.
        nested_absmax: (ceil(blocks / nested_blocksize),) fp32, or None when absmax is not quantised itself.
        nested_code: (256,) fp32, or None.
        nested_offset: one fp32 element, or None.
        nested_blocksize: a power of two, 256 in bitsandbytes, or None.

    The fields hold flat views that share memory and version counter with what was given; `packed` is one of uint8.

    Raises:
        TypeError: a tensor is missing, or of another dtype than listed.
        ValueError: any other mismatch with the above, or tensors on different devices.

    Source: QLoRA, Dettmers et al. 2023, arXiv:2305.14314; the layout is bitsandbytes'.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    blocksize: int
    shape: tuple[int, int]
    dtype: torch.dtype
    quant_type: str
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_offset: Tensor | None = None
    nested_blocksize: int | None = None

    @classmethod
    def from_tensors(
        cls,
        tensors: Sequence[Tensor],
        blocksize: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        quant_type: str,
        nested_blocksize: int | None,
    ) -> Packed4bit:
        """The weight over what `tensors` gave: three of them, or six when nested. Raises as the class."""
        if len(tensors) not in (3, 6):
            raise ValueError(f"tensors: expected 3, or 6 when nested, got {len(tensors)}")
        packed, absmax, code = tensors[:3]
        nested_absmax, nested_code, nested_offset = tensors[3:] if len(tensors) == 6 else (None, None, None)
        return cls(
            packed,
            absmax,
            code,
            blocksize,
            shape,
            dtype,
            quant_type,
            nested_absmax,
            nested_code,
            nested_offset,
            nested_blocksize,
        )

    @property
    def nested(self) -> bool:
        """Whether absmax is quantised to 8 bits itself."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def numel(self) -> int:
        """N * K."""
        return self.shape[0] * self.shape[1]

    @property
    def blocks(self) -> int:
        """Number of scales."""
        return -(-self.numel // self.blocksize)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """packed, absmax, code and, when nested, nested_absmax, nested_code, nested_offset."""
        plain = (self.packed, self.absmax, self.code)
        if self.nested_absmax is None or self.nested_code is None or self.nested_offset is None:
            return plain
        return (*plain, self.nested_absmax, self.nested_code, self.nested_offset)

    def __post_init__(self) -> None:
        _check_description(self)
        absmax_dtype = torch.float32 if self.nested_absmax is None else torch.uint8
        self._set("packed", _flat("packed", self.packed, None, None))
        self._set("packed", self.packed.view(torch.uint8))
        expected = -(-self.numel // 2)
        if self.packed.numel() != expected:
            raise ValueError(
                f"packed: expected {expected} bytes for shape {self.shape}, got {self.packed.numel()} "
                "(a shard of a distributed weight has to be gathered first)"
            )
        self._set("absmax", _flat("absmax", self.absmax, absmax_dtype, self.blocks))
        self._set("code", _flat("code", self.code, torch.float32, 16))
        if self.nested_absmax is not None:
            assert self.nested_blocksize is not None
            groups = -(-self.blocks // self.nested_blocksize)
            self._set("nested_absmax", _flat("nested_absmax", self.nested_absmax, torch.float32, groups))
            self._set("nested_code", _flat("nested_code", self.nested_code, torch.float32, 256))
            self._set("nested_offset", _flat("nested_offset", self.nested_offset, torch.float32, 1))
        for name in ("absmax", "code", "nested_absmax", "nested_code", "nested_offset"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.device != self.packed.device:
                raise ValueError(f"{name}: expected a tensor on {self.packed.device} like packed, got {tensor.device}")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def _check_description(p: Packed4bit) -> None:
    if type(p.blocksize) is not int or p.blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize: expected one of {BLOCKSIZES}, got {p.blocksize!r}")
    if p.quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type: expected one of {QUANT_TYPES}, got {p.quant_type!r}")
    if p.dtype not in DTYPES:
        raise TypeError(f"dtype: expected one of {DTYPES}, got {p.dtype!r}")
    if not isinstance(p.shape, (tuple, list)) or len(p.shape) != 2 or min(p.shape) < 0:
        raise ValueError(f"shape: expected (out_features, in_features), got {p.shape!r}")
    p._set("shape", (int(p.shape[0]), int(p.shape[1])))
    nested = {name: getattr(p, name) for name in ("nested_absmax", "nested_code", "nested_offset", "nested_blocksize")}
    missing = [name for name, value in nested.items() if value is None]
    if missing and len(missing) < len(nested):
        raise ValueError(f"{missing[0]}: expected a value, as the other nested_ arguments have one, got None")
    size = p.nested_blocksize
    if size is not None and (size < 1 or size & (size - 1)):
        raise ValueError(f"nested_blocksize: expected a power of two, got {size!r}")


def _flat(name: str, tensor: Any, dtype: torch.dtype | None, count: int | None) -> Tensor:
    """A flat view of the tensor, without its autograd history and its subclass."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if dtype is not None and tensor.dtype != dtype:
        hint = " (bitsandbytes' CPU inference layout?)" if name == "absmax" and tensor.dtype == torch.bfloat16 else ""
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}{hint}")
    if count is not None and tensor.numel() != count:
        raise ValueError(f"{name}: expected {count} elements, got shape {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    return tensor.detach().view(-1)
