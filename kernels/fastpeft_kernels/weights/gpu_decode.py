"""Checks that need a CUDA GPU: weights that PyTorch decodes give the same bits there as on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.gpu_verdicts import Verdicts
from .base import FrozenWeight, unflatten_weight
from .hqq import HqqWeight
from .mxfp4 import Mxfp4Weight
from .packed import PackedWeight
from .scaled import ScaledWeight

ROWS, COLUMNS, GROUP = 96, 256, 32


def checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named checks. Each returns figures, or raises AssertionError."""
    for name, make in _MADE.items():
        yield f"decode {name}", partial(_check, make)


def _check(make: Callable[[], FrozenWeight]) -> dict[str, Any]:
    there = make()
    tensors, meta = there.flatten()
    here = unflatten_weight(there.kind, tuple(t.cuda() for t in tensors), meta)
    verdicts = Verdicts()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows in ((0, ROWS), (33, 70)):
            out = torch.full((rows[1] - rows[0], COLUMNS), torch.nan, dtype=dtype, device="cuda")
            here.decode(out=out, rows=rows)
            verdicts.equal(out, there.decode(dtype=dtype, rows=rows).cuda(), f"{dtype} {rows=}")
    verdicts.settle()
    return {}


def _codes(rows: int, columns: int, dtype: torch.dtype = torch.int8) -> Tensor:
    lowest = -128 if dtype == torch.int8 else 0
    return torch.randint(lowest, lowest + 256, (rows, columns), dtype=torch.int32).to(dtype)


def _scaled(codes: Tensor, block: tuple[int, int]) -> FrozenWeight:
    scale = torch.rand(-(ROWS // -block[0]), -(COLUMNS // -block[1])) + 0.5
    return ScaledWeight(codes, scale, None, block=block, dtype=torch.bfloat16)


def _hqq(bits: int) -> FrozenWeight:
    groups, per_byte = ROWS * COLUMNS // GROUP, 8 // bits
    scale, zero = (torch.rand(groups, 1) + 0.5).bfloat16(), (torch.rand(groups, 1) * 5).bfloat16()
    return HqqWeight(_codes(groups // per_byte, GROUP, torch.uint8), scale, zero, bits, (ROWS, COLUMNS))


def _packed(bits: int, awq: bool) -> FrozenWeight:
    per_word = 32 // bits
    words, zeros = (
        torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)
        for shape in (
            (COLUMNS, ROWS // per_word) if awq else (COLUMNS // per_word, ROWS),
            (COLUMNS // GROUP, ROWS // per_word),
        )
    )
    scales = (torch.rand(COLUMNS // GROUP, ROWS) + 0.5).bfloat16()
    groups = GROUP if awq else (torch.arange(COLUMNS) // GROUP).int()
    return PackedWeight(words, zeros, scales, groups, bits, awq)


def _mxfp4() -> FrozenWeight:
    exponents = torch.randint(115, 130, (ROWS, COLUMNS // 32), dtype=torch.uint8)
    return Mxfp4Weight(_codes(ROWS, COLUMNS // 2, torch.uint8), exponents, torch.bfloat16)


def _fp8() -> FrozenWeight:
    return _scaled((torch.randn(ROWS, COLUMNS) * 20).to(torch.float8_e4m3fn), (32, 64))


_MADE: dict[str, Callable[[], FrozenWeight]] = {
    "int8": lambda: _scaled(_codes(ROWS, COLUMNS), (1, COLUMNS)),
    "fp8 in blocks": _fp8,
    "HQQ 4 bits": partial(_hqq, 4),
    "HQQ 8 bits": partial(_hqq, 8),
    "GPTQ 4 bits": partial(_packed, 4, False),
    "GPTQ 8 bits": partial(_packed, 8, False),
    "AWQ 4 bits": partial(_packed, 4, True),
    "MXFP4": _mxfp4,
}
