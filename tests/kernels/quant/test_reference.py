"""The PyTorch encoder and decoder: bitsandbytes' bits, and the error that four bits allow."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpeft_kernels.quant import Packed4bit, decode_4bit, encode_4bit
from fastpeft_kernels.quant.scales import decode_scales, encode_scales
from fastpeft_kernels.quant.storage import BLOCKSIZES
from fastpeft_kernels.quant.tables import TINY, code_table, dynamic_code, rank_tables
from tests.budget import assert_within_budget

pytestmark = pytest.mark.usefixtures("nan_filled")

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Rows of whole blocks; rows that straddle blocks; odd rows; less than a block; one element.
SHAPES = ((4, 128), (8, 96), (7, 33), (3, 1000), (2, 4096), (1, 5), (1, 1))

every_kind = pytest.mark.parametrize("nested", (False, True), ids=("plain", "nested"))
every_type = pytest.mark.parametrize("quant_type", ("nf4", "fp4"))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def random_weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    weight = torch.randn(shape) * torch.rand(1).item()
    weight.view(-1)[::7] = 0.0
    return weight.to(dtype)


def by_definition(packed: Packed4bit, dtype: torch.dtype) -> Tensor:
    """The docstring of Packed4bit, word for word, in `dtype` throughout."""
    flat = torch.arange(packed.numel)
    byte = packed.packed[flat // 2]
    nibble = torch.where(flat % 2 == 0, byte >> 4, byte & 15).long()
    absmax = packed.absmax
    if packed.nested:
        group = torch.arange(packed.blocks) // packed.nested_blocksize
        absmax = packed.nested_code.to(dtype)[absmax.long()] * packed.nested_absmax.to(dtype)[group]
        absmax = absmax + packed.nested_offset.to(dtype)
    return (packed.code.to(dtype)[nibble] * absmax.to(dtype)[flat // packed.blocksize]).view(packed.shape)


@every_type
@every_kind
@every_dtype
def test_encodes_to_bitsandbytes_bits(bitsandbytes: Any, quant_type: str, nested: bool, dtype: torch.dtype) -> None:
    for shape, blocksize in product(SHAPES, BLOCKSIZES):
        weight = random_weight(shape, dtype)
        ours = encode_4bit(weight, quant_type, blocksize, nested)
        theirs = bitsandbytes.storage(*bitsandbytes.encode(weight, quant_type, blocksize, nested))
        for name in ("packed", "absmax", "code", "nested_absmax", "nested_code", "nested_offset"):
            one, other = getattr(ours, name), getattr(theirs, name)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other), f"{name} of {shape} in blocks of {blocksize}"


@every_type
@every_kind
@every_dtype
def test_decodes_to_bitsandbytes_values(bitsandbytes: Any, quant_type: str, nested: bool, dtype: torch.dtype) -> None:
    for shape, blocksize in product(SHAPES, BLOCKSIZES):
        stored = bitsandbytes.encode(random_weight(shape, dtype), quant_type, blocksize, nested)
        ours = decode_4bit(bitsandbytes.storage(*stored))
        assert ours.dtype == dtype
        assert torch.equal(ours, bitsandbytes.decode(*stored)), f"{shape} in blocks of {blocksize}"


@every_kind
def test_decodes_whole_blocks_as_bitsandbytes_does_unaided(bitsandbytes: Any, nested: bool) -> None:
    stored = bitsandbytes.encode(random_weight((24, 192), torch.bfloat16), "nf4", 64, nested)
    assert torch.equal(decode_4bit(bitsandbytes.storage(*stored)), bitsandbytes.functional.dequantize_4bit(*stored))


@pytest.mark.parametrize("storage", (torch.bfloat16, torch.float16, torch.float32, torch.int8), ids=str)
def test_reads_every_quant_storage_in_place(bitsandbytes: Any, storage: torch.dtype) -> None:
    weight = random_weight((8, 96))
    packed, state = bitsandbytes.encode(weight, "nf4", 64, True, quant_storage=storage)
    assert packed.dtype == storage
    ours = bitsandbytes.storage(packed, state)
    assert ours.packed.dtype == torch.uint8 and ours.packed.data_ptr() == packed.data_ptr()
    assert torch.equal(decode_4bit(ours), decode_4bit(encode_4bit(weight, nested=True)))


def test_tables_are_bitsandbytes_tables(bitsandbytes: Any) -> None:
    for quant_type in ("nf4", "fp4"):
        theirs = bitsandbytes.functional.get_4bit_type(quant_type, device="cpu")
        assert torch.equal(code_table(quant_type, CPU).view(torch.int32), theirs.view(torch.int32))
    assert torch.equal(dynamic_code(CPU), bitsandbytes.functional.create_dynamic_map())


@every_type
@pytest.mark.parametrize("blocksize", (32, 64))
def test_awkward_values_encode_to_bitsandbytes_bits(bitsandbytes: Any, quant_type: str, blocksize: int) -> None:
    thresholds, _ = rank_tables(quant_type, CPU)
    neighbours = [thresholds, thresholds.nextafter(torch.tensor(2.0)), thresholds.nextafter(torch.tensor(-2.0))]
    ties = torch.cat([torch.ones(3), *neighbours, torch.tensor([-0.0] * 16)])
    rows = [ties, torch.zeros(64), torch.full((64,), TINY / 8), torch.full((64,), 3e38), -ties, ties * 3.7]
    # In turn with a whole block last, a partial block of zeros last, and a partial block of ties last.
    for weight in (torch.stack(rows), torch.cat([*rows, rows[1][:5]])[None], torch.cat([*rows, ties[:23]])[None]):
        ours = encode_4bit(weight, quant_type, blocksize)
        packed, state = bitsandbytes.encode(weight, quant_type, blocksize, False)
        assert torch.equal(ours.absmax, state.absmax)
        assert torch.equal(ours.packed, packed.view(-1))


def test_nested_scales_match_bitsandbytes_at_the_edges_of_its_bins(bitsandbytes: Any) -> None:
    edges = ((torch.arange(0, 65536, dtype=torch.float64) - 0.5) / 65535 * 2 - 1).float()
    edges = torch.cat([edges, edges.nextafter(torch.tensor(2.0)), edges.nextafter(torch.tensor(-2.0))]).clamp(-1, 1)
    # Pairs (x, -x) keep the mean near zero, a 1 in each group keeps its scale: blocks of one value are absmax itself.
    scales = torch.stack([edges, -edges], dim=1).view(-1)[: 65536 * 4].view(-1, 256)
    scales[:, 0], scales[:, 1] = 1.0, -1.0
    ours = encode_scales(scales.view(-1))
    index, state = bitsandbytes.functional.quantize_blockwise(scales.view(-1) - ours.nested_offset, blocksize=256)
    assert torch.equal(ours.absmax, index)
    assert torch.equal(ours.nested_absmax, state.absmax)


@every_type
@every_kind
def test_decodes_as_defined(quant_type: str, nested: bool) -> None:
    for shape, blocksize in product(SHAPES, (32, 64, 4096)):
        packed = encode_4bit(random_weight(shape), quant_type, blocksize, nested)
        oracle = by_definition(packed, torch.float64)
        assert torch.equal(decode_4bit(packed), by_definition(packed, torch.float32))
        for dtype in DTYPES:
            same_dtype = by_definition(packed, torch.float32).to(dtype)
            assert_within_budget(decode_4bit(packed, dtype=dtype), same_dtype, oracle)


@every_type
@every_dtype
def test_errs_by_half_a_gap_of_the_code_at_most(quant_type: str, dtype: torch.dtype) -> None:
    weight = random_weight((16, 200), dtype)
    rising = code_table(quant_type, CPU).sort().values
    half_gap = (rising[1:] - rising[:-1]).max().item() / 2
    for blocksize in (32, 256):
        packed = encode_4bit(weight, quant_type, blocksize)
        scale = packed.absmax.repeat_interleave(blocksize)[: packed.numel].view(packed.shape)
        error = (decode_4bit(packed, dtype=torch.float64) - weight.double()).abs()
        assert (error <= scale * (half_gap + 1e-6)).all()


def test_nesting_moves_scales_by_the_gap_of_their_code_at_most() -> None:
    weight = random_weight((64, 512))
    plain, nested = encode_4bit(weight), encode_4bit(weight, nested=True)
    code = nested.nested_code
    half_gap = (code[1:] - code[:-1]).max().item() / 2
    room = nested.nested_absmax.repeat_interleave(256)[: nested.blocks] * (half_gap + 2 / 65535)
    assert ((decode_scales(nested, 0, nested.blocks) - plain.absmax).abs() <= room).all()


def test_a_nan_spoils_its_own_block_only() -> None:
    weight = torch.randn(4, 64)
    weight[1, 3] = torch.nan
    for blocksize in (32, 64):
        decoded = decode_4bit(encode_4bit(weight, blocksize=blocksize))
        assert decoded[1, :blocksize].isnan().all()
        assert decoded.isnan().sum() == blocksize


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 150),
    quant_type=st.sampled_from(("nf4", "fp4")),
    blocksize=st.sampled_from(BLOCKSIZES),
    nested=st.booleans(),
    scale=st.floats(1e-6, 1e6),
    data=st.data(),
)
def test_any_shape(
    rows: int, columns: int, quant_type: str, blocksize: int, nested: bool, scale: float, data: st.DataObject
) -> None:
    weight = torch.randn(rows, columns) * scale
    packed = encode_4bit(weight, quant_type, blocksize, nested)
    decoded = decode_4bit(packed)
    assert torch.equal(decoded, by_definition(packed, torch.float32))
    first = data.draw(st.integers(0, rows))
    last = data.draw(st.integers(first, rows))
    assert torch.equal(decode_4bit(packed, rows=(first, last)), decoded[first:last])
    if not nested:  # what decodes exactly encodes to itself
        assert torch.equal(decode_4bit(encode_4bit(decoded, quant_type, blocksize)), decoded)
