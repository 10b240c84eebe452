"""4-bit encoding and decoding in plain PyTorch: the oracle on every device, and what runs where no kernel of ours can.

Encoding gives, bit for bit, what bitsandbytes 0.50 gives on x86 CPUs; decoding, what it gives everywhere, but for:

* Its AVX512 decoder (in_features a multiple of 16, blocksize < 2048) takes wrong scales when in_features is not a
  multiple of blocksize. Its CUDA and generic decoders do not, and neither does this one.
* The sign of FP4's second zero: its CUDA and scalar decoders give -0.0, its stored table, its generic decoder and this
  one +0.0.
* Its CUDA encoder divides approximately (fast-math), rounds FP4's thresholds to 6 to 8 digits (0.583333, 0.00260417),
  sends FP4's ties towards zero instead of down, codes a block of zeros as nibble 0 instead of the zero's, and quantises
  nested scales a little differently (`scales.encode_scales`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scales import decode_scales
from .storage import Packed4bit
from .tables import TINY, rank_tables

# Elements decoded at a time. On CPU a chunk's temporaries (6 bytes an element) stay in the last-level cache: 2**20 was
# the fastest of 2**16 to 2**24 (4096 x 4096, one EPYC core). Elsewhere a launch should be worth its while.
_CPU_CHUNK = 1 << 20
_CHUNK = 1 << 24


def decode_4bit_reference(packed: Packed4bit, out: Tensor, first: int, last: int) -> Tensor:
    """Decodes rows first <= n < last into `out`.

    Args:
        packed: a weight of shape (N, K).
        out: (last - first, K), floating, any strides, on the weight's device.
        first, last: row range.

    Returns:
        `out`.
    """
    columns, blocksize = packed.shape[1], packed.blocksize
    if out.numel() == 0:
        return out
    chunk = _CPU_CHUNK if packed.device.type == "cpu" else _CHUNK
    rows = min(max(1, chunk // columns), last - first)
    first_block = first * columns // blocksize
    scales = decode_scales(packed, first_block, -(-last * columns // blocksize))
    pairs = _pair_table(packed.code)
    # A chunk of rows may begin and end within a block.
    room = (rows * columns // blocksize + 2) * blocksize
    values = torch.empty(room, dtype=torch.float32, device=packed.device)
    index = torch.empty(room // 2, dtype=torch.int32, device=packed.device)
    for row in range(first, last, rows):
        end = min(row + rows, last)
        begin_block, end_block = row * columns // blocksize, -(-end * columns // blocksize)
        source = packed.packed[begin_block * blocksize // 2 : end_block * blocksize // 2]
        index[: source.numel()].copy_(source)
        torch.index_select(pairs, 0, index[: source.numel()], out=values.view(torch.int64)[: source.numel()])
        blocks = values[: (end_block - begin_block) * blocksize].view(-1, blocksize)
        blocks.mul_(scales[begin_block - first_block : end_block - first_block, None])
        skip = row * columns - begin_block * blocksize
        out[row - first : end - first].copy_(values[skip : skip + (end - row) * columns].view(end - row, columns))
    return out


def encode_4bit_reference(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Encodes `weight`, (N, K) in fp32, fp16 or bf16 with any strides.

    Returns:
        `packed` (ceil(N*K / 2),) uint8 and `absmax` (blocks,) fp32, not nested, as in `Packed4bit`.
    """
    flat = weight.detach().reshape(-1)
    full = flat.numel() // blocksize
    packed = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-flat.numel() // blocksize), dtype=torch.float32, device=flat.device)
    thresholds, nibbles = rank_tables(quant_type, flat.device)

    def put(scaled: Tensor, at: int) -> None:
        code = nibbles.index_select(0, torch.bucketize(scaled, thresholds, out_int32=True))
        packed[at // 2 : (at + code.numel()) // 2] = (code[::2] << 4) | code[1::2]

    step = _CHUNK // blocksize
    for block in range(0, full, step):
        end = min(block + step, full)
        values = flat[block * blocksize : end * blocksize].float().view(-1, blocksize)
        largest = values.abs().amax(1)
        absmax[block:end] = largest
        put((values * (1.0 / largest.clamp(min=TINY))[:, None]).view(-1), block * blocksize)
    if full < absmax.numel():
        values = flat[full * blocksize :].float()
        largest = values.abs().max().clamp(min=TINY)
        absmax[full] = largest
        # bitsandbytes divides here, where it multiplies by the reciprocal in full blocks.
        put(torch.nn.functional.pad(values / largest, (0, values.numel() % 2)), full * blocksize)
    return packed, absmax


def _pair_table(code: Tensor) -> Tensor:
    """(256,) int64: for each byte the bits of its two fp32 values, so that one look-up decodes both."""
    byte = torch.arange(256, device=code.device)
    return torch.stack([code[byte >> 4], code[byte & 15]], dim=1).view(torch.int64).view(-1)
