"""Weights that PyTorch decodes: against the documented format, written out once more in fp64."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft_kernels.weights import HqqWeight, PackedWeight, ScaledWeight, blocks, unflatten_weight

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def scaled(codes_dtype: torch.dtype, block: tuple[int, int], with_zero: bool, factor: float) -> tuple[Any, Tensor]:
    """(weight, its values in fp32) of a size that is no whole number of blocks."""
    rows, columns = 37, 24
    if codes_dtype.is_floating_point:
        codes = (torch.randn(rows, columns) * 20).to(codes_dtype)
    else:
        lowest = 0 if codes_dtype == torch.uint8 else -128
        codes = torch.randint(lowest, lowest + 256, (rows, columns), dtype=torch.int32).to(codes_dtype)
    count = (-(rows // -block[0]), -(columns // -block[1]))
    scale = torch.rand(count) + 0.5
    zero = torch.randint(-3, 4, count, dtype=torch.int8) if with_zero and codes_dtype == torch.int8 else None
    if zero is not None:
        codes.clamp_(-120, 120)
    weight = ScaledWeight(codes, scale, zero, block=block, dtype=torch.bfloat16, factor=factor)
    row, column = torch.arange(rows) // block[0], torch.arange(columns) // block[1]
    values = codes.float() - (0.0 if zero is None else zero.float()[row][:, column])
    return weight, values * (scale * factor)[row][:, column]


def hqq(bits: int, by_rows: bool, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """Groups of 8 along the flat matrix of 37 x 24, so that they straddle nothing, or of 12 that lie across it."""
    size, count = 37 * 24, {1: 8, 2: 4, 3: 10, 4: 2, 8: 1}[bits]
    rows, columns = (size // 8, 8) if by_rows else (12, size // 12)
    stored = -(rows // -count)
    codes = torch.randint(0, 2**bits, (stored * count, columns), dtype=torch.int32)
    packed = torch.zeros(stored, columns, dtype=torch.int32)
    for part in range(count):
        packed += codes[part * stored : (part + 1) * stored] * 2 ** (bits * (count - 1 - part))
    statistics = (rows, 1) if by_rows else (1, columns)
    scale, zero = (torch.rand(statistics) + 0.5).to(dtype), (torch.rand(statistics) * 5).to(dtype)
    weight = HqqWeight(packed if bits == 3 else packed.to(torch.uint8), scale, zero, bits, (37, 24))
    values = ((codes[:rows].double() - zero.double()).to(dtype).double() * scale.double()).to(dtype)
    return weight, values.reshape(37, 24).float()


def packed(bits: int, awq: bool, shuffled: bool, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """48 x 32, groups of 8 input features; the words are put together one code at a time."""
    rows, columns, per_word = 48, 32, 32 // bits
    order = (0, 2, 4, 6, 1, 3, 5, 7) if awq else range(per_word)
    groups = torch.arange(columns) // 8
    groups = groups[torch.randperm(columns)] if shuffled else groups
    codes, zeros = torch.randint(0, 2**bits, (columns, rows)), torch.randint(0, 2**bits, (4, rows))
    scales = (torch.rand(4, rows) + 0.5).to(dtype)

    def words(values: Tensor) -> Tensor:
        made = torch.zeros(values.shape[0], values.shape[1] // per_word, dtype=torch.int64)
        for nibble, place in enumerate(order):
            made += values[:, place::per_word] * 2 ** (bits * nibble)
        return made.to(torch.int32)

    stored = words(codes) if awq else words(codes.t().contiguous()).t().contiguous()
    weight = PackedWeight(stored, words(zeros), scales, 8 if awq else groups.int(), bits, awq)
    values = ((codes - zeros[groups]).double() * scales[groups].double()).to(dtype)
    return weight, values.t().float()


SCALED = [
    (torch.int8, (1, 24), False, 1.0 / 127.0),
    (torch.int8, (1, 24), True, 1.0),
    (torch.int8, (1, 8), True, 1.0),
    (torch.uint8, (37, 24), False, 1.0),
    (torch.float8_e4m3fn, (16, 16), False, 1.0),
    (torch.float8_e5m2, (1, 24), False, 0.5),
]
MADE = [
    *(partial(scaled, *case) for case in SCALED),
    *(partial(hqq, bits, bits != 2, torch.bfloat16) for bits in (1, 2, 3, 4, 8)),
    partial(hqq, 4, False, torch.float16),
    partial(packed, 2, False, False, torch.bfloat16),
    partial(packed, 4, False, True, torch.bfloat16),
    partial(packed, 8, False, True, torch.bfloat16),
    partial(packed, 4, True, False, torch.bfloat16),
]
every_weight = pytest.mark.parametrize("made", MADE)


@every_weight
def test_values_are_rounded_as_the_format_says(made: Any) -> None:
    """Those of fp32 where a scale is applied to one byte, else those of the scales' dtype; bit for bit."""
    weight, values = made()
    assert weight.decode().dtype == weight.dtype
    for dtype in DTYPES:
        assert torch.equal(weight.decode(dtype=dtype), values.to(dtype))
        out = torch.full((5, weight.shape[1]), float("nan"), dtype=dtype)
        assert weight.decode(out=out, rows=(13, 18)) is out
        assert torch.equal(out, values[13:18].to(dtype))
        columns = torch.full((weight.shape[1], 36), float("nan"), dtype=dtype).t()
        assert torch.equal(weight.decode(out=columns, rows=(0, 36)), values[:36].to(dtype))
    assert weight.decode(rows=(4, 4)).shape == (0, weight.shape[1])


@pytest.mark.parametrize("codes", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_every_float8_code(codes: torch.dtype, dtype: torch.dtype) -> None:
    """Infinities and those that are no number too."""
    values = torch.arange(256, dtype=torch.uint8).view(codes).view(4, 64)
    weight = ScaledWeight(values, torch.ones(4, 1), block=(1, 64), dtype=dtype)
    torch.testing.assert_close(weight.decode(dtype=dtype), values.to(dtype), rtol=0, atol=0, equal_nan=True)


@every_weight
def test_nothing_comes_from_the_host(made: Any) -> None:
    """A table that were copied to a GPU at each decode would have it wait."""

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert function not in (torch.ops.aten.lift_fresh.default, torch.ops.aten._local_scalar_dense.default)
            return function(*args, **(kwargs or {}))

    weight, _ = made()
    with Copies():
        weight.decode(rows=(3, 36))


@every_weight
def test_a_block_of_rows_at_a_time(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, values = made()
    seen = []
    decode_rows = weight.decode_rows
    weight.decode_rows = lambda out, first, last: (seen.append((first, last)), decode_rows(out, first, last))
    monkeypatch.setattr(blocks, "BLOCK", 10 * weight.shape[1] + 1)
    assert torch.equal(weight.decode(dtype=torch.float32, rows=(3, 36)), values[3:36])
    assert seen == [(3, 13), (13, 23), (23, 33), (33, 36)]


@every_weight
def test_flatten_passes_through_json_and_shares_storage(made: Any) -> None:
    weight, _ = made()
    tensors, meta = weight.flatten()
    again = unflatten_weight(weight.kind, tensors, json.loads(json.dumps(meta)))
    assert torch.equal(again.decode(), weight.decode())
    assert (again.shape, again.dtype, again.device) == (weight.shape, weight.dtype, weight.device)
    stamp = again.stamp()
    tensors[0].zero_()
    with pytest.raises(RuntimeError, match="changed or moved between forward and backward"):
        again.check_unchanged(stamp)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"codes": torch.zeros(4, 6)}, TypeError, "codes: expected one of"),
        ({"scale": torch.zeros(4, 1, dtype=torch.int8)}, TypeError, "scale: expected one of"),
        ({"codes": torch.zeros(4, dtype=torch.int8)}, ValueError, r"codes: expected \(out_features, in_features\)"),
        ({"scale": torch.zeros(4)}, ValueError, r"scale: expected shape \(4, 1\), got \(4,\)"),
        (
            {"zero": torch.zeros(4, 1)},
            TypeError,
            "zero: expected the integers of the codes",
        ),
        ({"zero": torch.zeros(1, 1, dtype=torch.int8)}, ValueError, r"zero: expected shape \(4, 1\), got \(1, 1\)"),
        (
            {"zero": torch.zeros(4, 1, dtype=torch.int8, device="meta")},
            ValueError,
            "zero: expected a tensor on cpu, got meta",
        ),
        ({"block": (0, 6)}, ValueError, "block: expected at least one row and one column"),
    ],
)
def test_scaled_weight_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    right = {
        "codes": torch.zeros(4, 6, dtype=torch.int8),
        "scale": torch.ones(4, 1),
        "block": (1, 6),
        "dtype": torch.float32,
    }
    ScaledWeight(**right)
    with pytest.raises(error, match=message):
        ScaledWeight(**{**right, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bits": 5}, ValueError, r"bits: expected one of \[1, 2, 3, 4, 8\], got 5"),
        ({"packed": torch.zeros(4, 6, dtype=torch.int32)}, TypeError, "packed: expected torch.uint8 for 4 bits"),
        ({"packed": torch.zeros(4, 7, dtype=torch.uint8)}, ValueError, "packed: expected the codes of"),
        ({"packed": torch.zeros(5, 6, dtype=torch.uint8)}, ValueError, "packed: expected the codes of"),
        ({"zero": torch.ones(8, 1)}, TypeError, "scale, zero: expected one of fp32, bf16 and fp16"),
        ({"scale": torch.ones(8, 1, device="meta").half()}, ValueError, "scale: expected a tensor on cpu, got meta"),
        ({"zero": torch.ones(8, 2).half()}, ValueError, r"scale, zero: expected shape \(8, 1\) or \(1, 6\)"),
    ],
)
def test_hqq_weight_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    right = {
        "packed": torch.zeros(4, 6, dtype=torch.uint8),
        "scale": torch.ones(8, 1).half(),
        "zero": torch.ones(8, 1).half(),
        "bits": 4,
        "shape": (4, 12),
    }
    HqqWeight(**right)
    with pytest.raises(error, match=message):
        HqqWeight(**{**right, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bits": 3}, ValueError, r"bits: expected one of \(2, 4, 8\), got 3"),
        ({"bits": 8, "awq": True}, ValueError, r"bits: expected one of \(4,\), got 8"),
        ({"codes": torch.zeros(2, 24)}, TypeError, "codes: expected torch.int32"),
        (
            {"codes": torch.zeros(3, 24, dtype=torch.int32)},
            ValueError,
            r"codes: expected shape \(2, 24\), got \(3, 24\)",
        ),
        ({"zeros": torch.zeros(2, 4, dtype=torch.int32)}, ValueError, r"zeros: expected shape \(2, 3\), got \(2, 4\)"),
        ({"scales": torch.ones(2, 24).double()}, TypeError, "scales: expected fp32, bf16 or fp16"),
        ({"scales": torch.ones(24)}, ValueError, "codes, scales: expected matrices"),
        ({"groups": torch.zeros(16)}, TypeError, "groups: expected a vector of int32 or int64"),
        ({"groups": 0}, ValueError, "groups: expected at least one input feature, got 0"),
        ({"groups": 4}, ValueError, "scales: expected 4 groups of 4, got 2"),
        ({"groups": torch.zeros(16, dtype=torch.int32, device="meta")}, ValueError, "groups: expected a tensor on cpu"),
    ],
)
def test_packed_weight_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    right = {
        "codes": torch.zeros(2, 24, dtype=torch.int32),
        "zeros": torch.zeros(2, 3, dtype=torch.int32),
        "scales": torch.ones(2, 24).half(),
        "groups": torch.arange(16, dtype=torch.int32) // 8,
        "bits": 4,
        "awq": False,
    }
    PackedWeight(**right)
    with pytest.raises(error, match=message):
        PackedWeight(**{**right, **changes})
