"""The Triton kernels in Triton's interpreter: the reference's bits in every configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastpeft_kernels.quant import decode_4bit, encode_4bit
from fastpeft_kernels.quant.reference import encode_4bit_reference
from fastpeft_kernels.quant.tables import TINY, rank_tables

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("nan_filled")]

DTYPES = (torch.float32, torch.float16)  # the interpreter computes bfloat16 wrongly
# Rows of whole words and blocks; of words that straddle blocks; odd rows; less than a word; less than a byte.
SHAPES = ((8, 64), (6, 40), (5, 33), (3, 1), (1, 1))

every_kind = pytest.mark.parametrize("nested", (False, True), ids=("plain", "nested"))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def configs(name: str) -> list[Any]:
    forward = pytest.importorskip("fastpeft_kernels.quant.forward")
    return list(getattr(forward, name))


@every_shape
@every_kind
@every_dtype
def test_decodes_to_the_references_bits(shape: tuple[int, int], nested: bool, dtype: torch.dtype) -> None:
    packed = encode_4bit(torch.randn(shape, dtype=dtype), "fp4", 32, nested, backend="torch")
    whole = decode_4bit(packed, backend="torch")
    for rows in ((0, shape[0]), (shape[0] // 2, shape[0])):
        assert torch.equal(decode_4bit(packed, rows=rows, backend="triton"), whole[slice(*rows)])


@every_shape
@every_kind
def test_decodes_into_any_strides(shape: tuple[int, int], nested: bool) -> None:
    packed = encode_4bit(torch.randn(shape), "nf4", 64, nested, backend="torch")
    rows, columns = shape
    room = torch.full((rows, columns + 3), torch.nan)
    turned = torch.full((columns, rows), torch.nan).t()
    for out in (room[:, 1:-2], turned):
        version = out._version
        assert decode_4bit(packed, out, backend="triton") is out
        assert torch.equal(out, decode_4bit(packed, backend="torch"))
        assert out._version > version, "autograd cannot see the write"
    assert room[:, 0].isnan().all() and room[:, -2:].isnan().all(), "wrote beside out"


def test_every_decode_configuration() -> None:
    from fastpeft_kernels.quant.forward import decode_4bit_triton

    packed = encode_4bit(torch.randn(37, 61), nested=True, backend="torch")
    for config in configs("DECODE_CONFIGS"):
        out = torch.full((30, 61), torch.nan)
        decode_4bit_triton(packed, out, 5, 35, config)
        assert torch.equal(out, decode_4bit(packed, rows=(5, 35), backend="torch")), config


@pytest.mark.parametrize("offset", (0, 1, 4))
def test_reads_bytes_where_words_do_not_fit(offset: int) -> None:
    packed = encode_4bit(torch.randn(5, 43), backend="torch")
    room = torch.zeros(packed.packed.numel() + offset, dtype=torch.uint8)
    room[offset:] = packed.packed
    moved = replace(packed, packed=room[offset:])
    assert torch.equal(decode_4bit(moved, backend="triton"), decode_4bit(packed, backend="torch"))


@pytest.mark.parametrize("blocksize", (32, 64, 4096))
@pytest.mark.parametrize("quant_type", ("nf4", "fp4"))
@every_dtype
@pytest.mark.parametrize("all_pairs", (False, pytest.param(True, marks=pytest.mark.full)), ids=("", "all-pairs"))
def test_encodes_to_the_references_bits(quant_type: str, blocksize: int, dtype: torch.dtype, all_pairs: bool) -> None:
    """In every configuration some shapes, in the default one all; or all in all."""
    from fastpeft_kernels.quant.forward import encode_4bit_triton

    for shape in (*SHAPES, (0, 4)):
        weight = torch.randn(shape, dtype=dtype)
        weight.view(-1)[::5] = 0.0
        want = encode_4bit_reference(weight, quant_type, blocksize)
        every = configs("ENCODE_CONFIGS")
        for config in every if all_pairs or shape in SHAPES[1:3] else every[:1]:
            got = encode_4bit_triton(weight, quant_type, blocksize, config)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), (shape, config)


def test_awkward_values_encode_to_the_references_bits() -> None:
    for quant_type in ("nf4", "fp4"):
        ties = torch.cat([torch.ones(1), rank_tables(quant_type, torch.device("cpu"))[0], torch.full((16,), -0.0)])
        rows = [
            ties,
            torch.zeros(32),
            torch.full((32,), TINY / 8),
            torch.randn(32).index_fill_(0, torch.tensor(3), torch.nan),
        ]
        for weight in (torch.stack(rows), torch.cat([*rows, torch.zeros(5)])[None], torch.cat([*rows, ties[:7]])[None]):
            got = encode_4bit(weight, quant_type, 32, backend="triton")
            want = encode_4bit(weight, quant_type, 32, backend="torch")
            assert torch.equal(got.packed, want.packed)
            assert torch.equal(got.absmax.view(torch.int32), want.absmax.view(torch.int32))


def test_nested_scales_are_the_same() -> None:
    weight = torch.randn(20, 64)
    got = encode_4bit(weight, nested=True, blocksize=32, backend="triton")
    want = encode_4bit(weight, nested=True, blocksize=32, backend="torch")
    assert all(torch.equal(a, b) for a, b in zip(got.tensors, want.tensors, strict=True))


def test_refuses_bfloat16() -> None:
    with pytest.raises(ValueError, match=r"backend: expected fp32 or fp16 in Triton's interpreter"):
        encode_4bit(torch.randn(4, 4, dtype=torch.bfloat16), backend="triton")
