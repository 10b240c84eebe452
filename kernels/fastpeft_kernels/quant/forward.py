"""Triton kernels for 4-bit weights: decode to a dense matrix, encode from one.

Decode on paper. An element costs half a byte of code, 4/64 byte of scale (1/64 + 4/16384 nested) and 2 bytes of bf16
written: 2.56 bytes (2.52). 4096 x 4096 moves 43 MB, which an H200's 4.8 TB/s need 9 us for, and four fifths of that is
the write. So the kernel is laid out for the store: a thread takes words of 8 elements, 4 bytes read (a warp reads
whole 128-byte lines) and, in 16-bit types, one 16-byte store each. A word never straddles blocks, so its scale is
computed once for 8 elements, nested or not: there is no second launch for the scales.

What competes with the memory is the issue of instructions. Compiled for sm_90 an element costs 8.3 of them (shift,
mask, look-up, multiply, half a conversion, and a share of the word's addresses, masks and scale): 4.7 us for 4096 x
4096 on 132 SMs at 1.75 GHz, beside those 9 us. The 16 values are looked up in shared memory, where 16 entries never
conflict; gathered from L1 they need 64-bit addresses, 9.8 instructions an element. Predicted: 10 to 11 us, 80 to 90 %
of memory speed, plus the launch. Measured on an H200: 15.1 us, 2.8 TB/s, 0.87 of a copy's rate; 41.4 us for
4096 x 14336, 0.90 of it. There the look-up through L1 was as fast, and fewer words a program.

Encode runs once in a model's life. An element costs 2.56 bytes and 74 instructions, most of them comparisons with the
15 thresholds: 42 us for 4096 x 4096, 17 ms for the 7e9 weights of a model. Predicted, its time not yet measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.integers import cdiv
from ..common.launching import Launcher
from ..common.writes import count_writes
from .storage import Packed4bit
from .tables import TINY, rank_tables

_TINY = tl.constexpr(TINY)
_MAX_GRID_Y = 65535


@dataclass(frozen=True)
class DecodeConfig:
    """Words of 8 elements decoded by a program (a power of two), its warps, and where the code is looked up."""

    block_words: int
    num_warps: int
    shared_table: bool = True


@dataclass(frozen=True)
class EncodeConfig:
    """Elements encoded by a program (a power of two; at least one block is taken), and its warps."""

    tile: int
    num_warps: int


# First the default: on an H200 the fastest, for large weights and small ones.
DECODE_CONFIGS = (
    DecodeConfig(256, 2, shared_table=False),
    DecodeConfig(256, 1),
    DecodeConfig(128, 1, shared_table=False),
    DecodeConfig(128, 2),
    DecodeConfig(512, 4),
    DecodeConfig(1024, 8),
)
DECODE_NAMES = (
    "triton",
    *(f"triton {c.block_words}x{c.num_warps}{'' if c.shared_table else ' global'}" for c in DECODE_CONFIGS[1:]),
)
"""Backends of `decode_4bit` that a measurement may choose: each of DECODE_CONFIGS by a name that files keep."""
# First the default: 16 elements a thread.
ENCODE_CONFIGS = (EncodeConfig(2048, 4), EncodeConfig(1024, 4), EncodeConfig(4096, 8))
CONFIGS = DECODE_CONFIGS


@triton.jit
def decode_4bit_kernel(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    out_ptr,
    total_bytes,
    first,
    length,
    words,
    stride_run,
    stride,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    ONE_RUN: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHARED_TABLE: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """Decodes runs of `length` consecutive elements, each from where the one before it ends, a word of 8 at a time.

    packed_ptr (total_bytes / 4,) int32 or (total_bytes,) uint8; absmax_ptr (blocks,) fp32 or uint8; code_ptr (16,)
    fp32; nested_*_ptr as in `Packed4bit`, not read when NESTED_BLOCKSIZE is 0; out_ptr (runs, length) of strides
    (stride_run, stride), floating.

    first: where run 0 begins, in words if ALIGNED, else in elements. words: ceil(length / 8).
    ONE_RUN: the programs share the only run; else the first axis of the grid is the run. ALIGNED: every run begins
    with a word. SHARED_TABLE: the code is looked up in shared memory, not through L1.
    """
    if ONE_RUN:
        run = tl.zeros((), tl.int64)
        start = tl.program_id(0).to(tl.int64) * BLOCK_WORDS
    else:
        run = tl.program_id(0).to(tl.int64)
        start = tl.program_id(1).to(tl.int64) * BLOCK_WORDS
    if ALIGNED:
        lead = 0
        first_word = first + run * words
    else:
        lead = (first + run * length) % 8
        first_word = (first + run * length) // 8
        words = (lead + length + 7) // 8

    word = tl.arange(0, BLOCK_WORDS)
    present = start + word < words
    if packed_ptr.dtype.element_ty == tl.int32:
        bits = tl.load(packed_ptr + first_word + start + word, mask=present, other=0)
    else:
        byte = tl.arange(0, 4)[None, :]
        at = (first_word + start) * 4 + (word[:, None] * 4 + byte)
        bits = tl.load(packed_ptr + at, mask=present[:, None] & (at < total_bytes), other=0)
        bits = tl.sum(bits.to(tl.int32) << (byte * 8), axis=1)
    # The even element of a byte is in its high nibble.
    nibbles = (bits[:, None] >> ((tl.arange(0, 8) ^ 1) * 4)[None, :]) & 15
    if SHARED_TABLE:
        table = tl.load(code_ptr + tl.arange(0, 16))
        values = tl.reshape(tl.gather(table, tl.reshape(nibbles, (BLOCK_WORDS * 8,)), 0), (BLOCK_WORDS, 8))
    else:
        values = tl.load(code_ptr + nibbles)

    block = (first_word + start + word) // (BLOCKSIZE // 8)
    if NESTED_BLOCKSIZE == 0:
        scale = tl.load(absmax_ptr + block, mask=present, other=0.0)
    else:
        fraction = tl.load(nested_code_ptr + tl.load(absmax_ptr + block, mask=present, other=0).to(tl.int32))
        largest = tl.load(nested_absmax_ptr + block // NESTED_BLOCKSIZE, mask=present, other=0.0)
        # bitsandbytes rounds the product before it adds; written like this no compiler may contract the two.
        scale = tl.fma(fraction, largest, 0.0) + tl.load(nested_offset_ptr)
    values = (values * scale[:, None]).to(out_ptr.dtype.element_ty)

    at = start * 8 - lead + (word[:, None] * 8 + tl.arange(0, 8)[None, :])
    mask = at < length
    if not ALIGNED:
        mask = mask & (at >= 0)
    tl.store(out_ptr + run * stride_run + at * stride, values, mask=mask)


_launch_decode = Launcher(decode_4bit_kernel)


def decode_4bit_triton(
    packed: Packed4bit, out: Tensor, first: int, last: int, config: DecodeConfig = DECODE_CONFIGS[0]
) -> Tensor:
    """Decodes rows first <= n < last into `out`, (last - first, K) with any strides; returns it.

    Raises:
        ValueError: not on a CUDA device (unless Triton interprets), or a non-contiguous `out` with K beyond 67 million.
    """
    _check_device(packed.device, out.dtype)
    columns = packed.shape[1]
    if out.numel() == 0:
        return out
    one_run = out.is_contiguous()
    length = out.numel() if one_run else columns
    aligned = first * columns % 8 == 0 and (one_run or columns % 8 == 0)
    words = cdiv(length, 8)
    # A run that does not begin with a word may reach into one word more.
    programs = cdiv(words if aligned else words + 1, config.block_words)
    if not one_run and programs > _MAX_GRID_Y:
        raise ValueError(f"out: expected a contiguous tensor for {columns} in_features, got strides {out.stride()}")
    _launch_decode(
        out.device,
        (programs,) if one_run else (out.shape[0], programs),
        _as_words(packed.packed, -(-last * columns // 8)),
        packed.absmax,
        packed.code,
        packed.nested_absmax,
        packed.nested_code,
        packed.nested_offset,
        out,
        packed.packed.numel(),
        first * columns // 8 if aligned else first * columns,
        length,
        words,
        0 if one_run else out.stride(0),
        1 if one_run else out.stride(1),
        BLOCKSIZE=packed.blocksize,
        NESTED_BLOCKSIZE=packed.nested_blocksize or 0,
        ONE_RUN=one_run,
        ALIGNED=aligned,
        SHARED_TABLE=config.shared_table,
        BLOCK_WORDS=config.block_words,
        num_warps=config.num_warps,
    )
    count_writes(out)
    return out


def _as_words(packed: Tensor, needed: int) -> Tensor:
    """The bytes as int32 where they hold so many whole words, aligned; else as they are, and the kernel reads bytes."""
    if packed.storage_offset() % 4 or packed.data_ptr() % 4 or packed.numel() < needed * 4:
        return packed
    return packed[: packed.numel() // 4 * 4].view(torch.int32)


@triton.jit
def encode_4bit_kernel(
    weight_ptr,
    thresholds_ptr,
    nibbles_ptr,
    packed_ptr,
    absmax_ptr,
    elements,
    blocks,
    BLOCKSIZE: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Encodes BLOCKS blocks of a contiguous weight.

    weight_ptr (elements,) floating; thresholds_ptr (15,) fp32 and nibbles_ptr (16,) uint8 as `tables.rank_tables`;
    packed_ptr (ceil(elements / 2),) uint8; absmax_ptr (blocks,) fp32. TAIL: the last block is partial.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    inside = start * BLOCKSIZE + element < elements
    values = tl.load(weight_ptr + start * BLOCKSIZE + element, mask=inside, other=0.0).to(tl.float32)

    largest = tl.max(tl.abs(values), axis=1)
    # tl.max skips NaN; a block with one must decode to NaN.
    largest = tl.where(tl.max((values != values).to(tl.int32), axis=1) > 0, float("nan"), largest)
    divisor = tl.where(largest < _TINY, _TINY, largest)
    scaled = values * tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), divisor)[:, None]
    if TAIL:
        tail = start + block == blocks - 1
        scaled = tl.where(tail[:, None], tl.div_rn(values, tl.broadcast_to(divisor[:, None], values.shape)), scaled)
        largest = tl.where(tail, divisor, largest)
    tl.store(absmax_ptr + start + block, largest, mask=start + block < blocks)

    rank = tl.zeros((BLOCKS, BLOCKSIZE), tl.int32)
    for i in tl.static_range(15):
        rank += tl.where(scaled <= tl.load(thresholds_ptr + i), 0, 1)
    nibbles = tl.load(nibbles_ptr + rank)
    high, low = tl.split(tl.reshape(nibbles, (BLOCKS, BLOCKSIZE // 2, 2)))
    byte = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    at = start * (BLOCKSIZE // 2) + byte
    tl.store(packed_ptr + at, (high << 4) | low, mask=at * 2 < elements)


_launch_encode = Launcher(encode_4bit_kernel)


def encode_4bit_triton(
    weight: Tensor, quant_type: str, blocksize: int, config: EncodeConfig = ENCODE_CONFIGS[0]
) -> tuple[Tensor, Tensor]:
    """`packed` (ceil(N*K / 2),) uint8 and `absmax` (blocks,) fp32 of `weight`, (N, K) with any strides.

    Raises:
        ValueError: not on a CUDA device (unless Triton interprets).
    """
    _check_device(weight.device, weight.dtype)
    flat = weight.detach().reshape(-1)
    elements = flat.numel()
    blocks = cdiv(elements, blocksize)
    packed = torch.empty(cdiv(elements, 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    if elements == 0:
        return packed, absmax
    thresholds, nibbles = rank_tables(quant_type, weight.device)
    per_program = max(1, config.tile // blocksize)
    _launch_encode(
        weight.device,
        (cdiv(blocks, per_program),),
        flat,
        thresholds,
        nibbles,
        packed,
        absmax,
        elements,
        blocks,
        BLOCKSIZE=blocksize,
        TAIL=elements % blocksize != 0,
        BLOCKS=per_program,
        num_warps=config.num_warps,
    )
    return packed, absmax


def _check_device(device: torch.device, dtype: torch.dtype) -> None:
    if isinstance(decode_4bit_kernel, triton.JITFunction):
        if device.type != "cuda":
            raise ValueError(f"backend: expected CUDA tensors for 'triton', got tensors on {device}")
    elif dtype == torch.bfloat16:
        raise ValueError("backend: expected fp32 or fp16 in Triton's interpreter, which computes bfloat16 wrongly")
