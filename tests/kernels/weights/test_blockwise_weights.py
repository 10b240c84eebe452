"""Weights that PyTorch decodes: against the documented format, written out once more in fp64."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.weights import ScaledWeight, blocks, unflatten_weight

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


SCALED = [
    (torch.int8, (1, 24), False, 1.0 / 127.0),
    (torch.int8, (1, 24), True, 1.0),
    (torch.int8, (1, 8), True, 1.0),
    (torch.uint8, (37, 24), False, 1.0),
    (torch.float8_e4m3fn, (16, 16), False, 1.0),
    (torch.float8_e5m2, (1, 24), False, 0.5),
]
every_weight = pytest.mark.parametrize("made", [lambda case=case: scaled(*case) for case in SCALED])


@every_weight
def test_values_are_those_of_fp32_rounded_once(made: Any) -> None:
    weight, values = made()
    assert weight.decode().dtype == torch.bfloat16
    for dtype in DTYPES:
        assert torch.equal(weight.decode(dtype=dtype), values.to(dtype))
        out = torch.full((5, 24), float("nan"), dtype=dtype)
        assert weight.decode(out=out, rows=(13, 18)) is out
        assert torch.equal(out, values[13:18].to(dtype))
    assert weight.decode(rows=(4, 4)).shape == (0, 24)


@every_weight
def test_a_block_of_rows_at_a_time(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, values = made()
    seen = []
    decode_rows = weight.decode_rows
    weight.decode_rows = lambda out, first, last: (seen.append((first, last)), decode_rows(out, first, last))
    monkeypatch.setattr(blocks, "BLOCK", 10 * 24 + 1)
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
        ({"zero": torch.zeros(1, 1)}, ValueError, r"zero: expected shape \(4, 1\), got \(1, 1\)"),
        ({"zero": torch.zeros(4, 1, device="meta")}, ValueError, "zero: expected a tensor on cpu, got meta"),
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
