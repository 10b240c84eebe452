"""Checks that need a CUDA GPU: every configuration of the Triton kernels gives the reference's bits, on any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..common.device import holds_huge_tensors
from ..common.gpu_verdicts import Verdicts
from .api import decode_4bit, encode_4bit
from .reference import decode_4bit_reference, encode_4bit_reference
from .storage import BLOCKSIZES, DTYPES, QUANT_TYPES, Packed4bit

_DEVICE = torch.device("cuda")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# A usual shape; rows that straddle blocks; odd rows; less than a word; less than a byte.
_SHAPES = ((256, 512), (130, 1000), (37, 333), (5, 1), (1, 1))
_MANY = 2**31


def checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named checks. Each returns figures, or raises AssertionError."""
    from .forward import DECODE_CONFIGS, ENCODE_CONFIGS

    for decode_config in DECODE_CONFIGS:
        yield f"decode {decode_config}", partial(_check_decode, decode_config)
    for encode_config in ENCODE_CONFIGS:
        yield f"encode {encode_config}", partial(_check_encode, encode_config)
    yield "decode, every blocksize", _check_blocksizes
    yield "decode into strided memory", _check_strided
    if holds_huge_tensors():
        yield "decode more than 2**31 elements", _check_many_decoded
        yield "encode more than 2**31 elements", _check_many_encoded


def _check_decode(config: Any) -> dict[str, Any]:
    elements, verdicts = 0, Verdicts()
    for shape, quant_type, nested, dtype in product(_SHAPES, QUANT_TYPES, (False, True), (*DTYPES, torch.float64)):
        packed = encode_4bit(_random(shape, torch.float32), quant_type, 64, nested, backend="torch")
        for rows in ((0, shape[0]), (shape[0] // 3, shape[0])):
            what = f"{shape} {quant_type} {nested=} {dtype} {rows=}"
            elements += _compare_decode(verdicts, packed, rows, dtype, config, what)
    verdicts.settle()
    return {"elements": elements}


def _check_encode(config: Any) -> dict[str, Any]:
    from .forward import encode_4bit_triton

    elements, verdicts = 0, Verdicts()
    for shape, quant_type, dtype, blocksize in product(_SHAPES, QUANT_TYPES, DTYPES, (32, 64, 4096)):
        weight = _random(shape, dtype)
        weight.view(-1)[:: blocksize + 1] = 0.0
        want = encode_4bit_reference(weight, quant_type, blocksize)
        got = encode_4bit_triton(weight, quant_type, blocksize, config)
        what = f"{shape} {quant_type} {dtype} {blocksize=}"
        verdicts.equal(got[0], want[0], f"packed, {what}")
        verdicts.equal(got[1], want[1], f"absmax, {what}")
        elements += weight.numel()
    verdicts.settle()
    return {"elements": elements}


def _check_blocksizes() -> dict[str, Any]:
    from .forward import DECODE_CONFIGS

    elements, verdicts = 0, Verdicts()
    for shape, blocksize, nested in product(_SHAPES, BLOCKSIZES, (False, True)):
        packed = encode_4bit(_random(shape, torch.bfloat16), "nf4", blocksize, nested, backend="torch")
        what = f"{shape} {blocksize=} {nested=}"
        elements += _compare_decode(verdicts, packed, (0, shape[0]), torch.bfloat16, DECODE_CONFIGS[0], what)
    verdicts.settle()
    return {"elements": elements}


def _check_strided() -> dict[str, Any]:
    elements = 0
    for (rows, columns), nested, dtype in product(_SHAPES, (False, True), DTYPES):
        packed = encode_4bit(_random((rows, columns), dtype), "nf4", 64, nested, backend="torch")
        want = decode_4bit(packed, backend="torch")
        beside = torch.full((rows, columns + 16), torch.nan, dtype=dtype, device=_DEVICE)
        turned = torch.full((columns, rows), torch.nan, dtype=dtype, device=_DEVICE).t()
        for out in (beside[:, :columns], turned):
            decode_4bit(packed, out, backend="triton")
            _assert_same(out, want, f"{(rows, columns)} {nested=} {dtype} strides {out.stride()}")
            elements += out.numel()
        assert beside[:, columns:].isnan().all(), "wrote beside the result"
    return {"elements": elements}


def _check_many_decoded() -> dict[str, Any]:
    elements = 0
    for columns, beside in product((4104, 4105), (0, 8)):
        rows = _MANY // columns + 70
        packed = _random_storage(rows, columns)
        out = torch.full((rows, columns + beside), torch.nan, dtype=torch.bfloat16, device=_DEVICE)[:, :columns]
        decode_4bit(packed, out, backend="triton")
        for first, last in ((0, 64), (_MANY // columns - 32, _MANY // columns + 32), (rows - 5, rows)):
            want = torch.empty((last - first, columns), dtype=torch.bfloat16, device=_DEVICE)
            decode_4bit_reference(packed, want, first, last)
            _assert_same(out[first:last], want, f"rows {first}:{last}, strides {out.stride()}")
            part = decode_4bit(packed, rows=(first, last), backend="triton")
            _assert_same(part, want, f"only rows {first}:{last} of {columns} columns")
        elements += out.numel()
    return {"elements": elements}


def _check_many_encoded() -> dict[str, Any]:
    from .forward import encode_4bit_triton

    columns, blocksize = 4096, 64
    rows = _MANY // columns + 70
    weight = torch.randn((rows, columns), dtype=torch.bfloat16, device=_DEVICE)
    packed, absmax = encode_4bit_triton(weight, "nf4", blocksize)
    for first, last in ((0, 64), (_MANY // columns - 32, _MANY // columns + 32), (rows - 5, rows)):
        want = encode_4bit_reference(weight[first:last], "nf4", blocksize)
        _assert_same(packed[first * columns // 2 : last * columns // 2], want[0], f"packed, rows {first}:{last}")
        per_row = columns // blocksize
        _assert_same(absmax[first * per_row : last * per_row], want[1], f"absmax, rows {first}:{last}")
    return {"elements": weight.numel()}


def _compare_decode(
    verdicts: Verdicts, packed: Packed4bit, rows: tuple[int, int], dtype: torch.dtype, config: Any, what: str
) -> int:
    from .forward import decode_4bit_triton

    shape = (rows[1] - rows[0], packed.shape[1])
    out = torch.full(shape, torch.nan, dtype=dtype, device=_DEVICE)
    decode_4bit_triton(packed, out, *rows, config)
    want = decode_4bit_reference(packed, torch.empty_like(out), *rows)
    bits = _BITS[dtype.itemsize]
    verdicts.equal(out.view(bits), want.view(bits), what)
    return out.numel()


def _assert_same(got: Tensor, want: Tensor, what: str) -> None:
    bits = _BITS[want.element_size()]
    differ = got.contiguous().view(bits) != want.contiguous().view(bits)
    if differ.any():
        where = tuple(differ.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {differ.numel()} differ from the reference, "
            f"first at {where}: expected {want[where].item()!r}, got {got[where].item()!r}"
        )


def _random(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=_DEVICE).to(dtype)


def _random_storage(rows: int, columns: int) -> Packed4bit:
    """A nested weight that was never dense: large ones would not fit in between."""
    small = encode_4bit(_random((64, 1024), torch.bfloat16), nested=True, backend="torch")
    elements = rows * columns
    blocks = -(-elements // 64)
    return Packed4bit(
        torch.randint(0, 256, (-(-elements // 2),), dtype=torch.uint8, device=_DEVICE),
        torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=_DEVICE),
        small.code,
        64,
        (rows, columns),
        torch.bfloat16,
        "nf4",
        torch.rand(-(-blocks // 256), device=_DEVICE) + 0.5,
        small.nested_code,
        small.nested_offset,
        256,
    )
