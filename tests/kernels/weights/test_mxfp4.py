"""MXFP4 against transformers' own decoding of gpt-oss's experts, and in the experts' op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from fastpeft_kernels.experts import ExpertProjection, Experts, Gating, lora_experts
from fastpeft_kernels.weights import DenseWeight, Mxfp4Weight, unflatten_weight
from tests.kernels.experts.mixtures import routing

EXPERTS, ROWS, GROUPS = 3, 10, 2


def stored() -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of every kind, with exponents around those of weights."""
    return torch.randint(0, 256, (EXPERTS * ROWS, GROUPS * 16), dtype=torch.uint8), torch.randint(
        115, 130, (EXPERTS * ROWS, GROUPS), dtype=torch.uint8
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_values_are_transformers_own(dtype: torch.dtype) -> None:
    codes, scales = stored()
    theirs = convert_moe_packed_tensors(
        codes.view(EXPERTS, ROWS, GROUPS, 16), scales.view(EXPERTS, ROWS, GROUPS), dtype=dtype
    )
    weight = Mxfp4Weight(codes, scales, dtype)
    expected = theirs.transpose(1, 2).reshape(EXPERTS * ROWS, -1)
    assert torch.equal(weight.decode(), expected)
    assert torch.equal(weight.decode(rows=(7, 12)), expected[7:12])
    filled = torch.full((EXPERTS * ROWS, GROUPS * 32), float("nan"), dtype=torch.float64)
    assert torch.equal(weight.decode(out=filled), expected.double())
    again = unflatten_weight(weight.kind, *weight.flatten())
    assert again.dtype == dtype and torch.equal(again.decode(), expected)


def test_every_code_and_the_smallest_scales() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(2).view(1, 16, 2)
    packed = codes[..., 0] | codes[..., 1] << 4
    for exponent in (0, 1, 127, 252):
        weight = Mxfp4Weight(packed, torch.tensor([[exponent]], dtype=torch.uint8), torch.float64)
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
        expected = torch.cat([values, -values]).repeat(2)[codes.flatten().long()] * 2.0 ** (exponent - 127)
        assert torch.equal(weight.decode(out=torch.empty(1, 32, dtype=torch.float64))[0], expected)


def test_a_write_changes_the_stamp() -> None:
    weight = Mxfp4Weight(*stored())
    stamp = weight.stamp()
    weight.check_unchanged(stamp)
    weight.scales.add_(1)
    with pytest.raises(RuntimeError, match="was changed"):
        weight.check_unchanged(stamp)


def test_as_a_mixture_s_experts() -> None:
    """The same as over the decoded matrices."""
    inner, down = (
        (torch.randint(0, 256, (4 * n, m // 2), dtype=torch.uint8), 4 * n, m) for n, m in ((64, 32), (32, 32))
    )
    weights = [
        Mxfp4Weight(codes, torch.full((rows, m // 32), 122, dtype=torch.uint8), torch.float32)
        for codes, rows, m in (inner, down)
    ]
    x, (index, chosen) = torch.randn(9, 32), routing(9, 2, 4)
    results = [
        lora_experts(x, index, chosen, Experts(*[ExpertProjection(w, 4) for w in pair], Gating("silu")))
        for pair in (weights, [DenseWeight(w.decode()) for w in weights])
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("codes", "scales", "error", "message"),
    [
        (torch.zeros(4, 16), torch.zeros(4, 1).byte(), TypeError, "codes: expected torch.uint8, got torch.float32"),
        (torch.zeros(4, 16).byte(), torch.zeros(4, 1), TypeError, "scales: expected torch.uint8, got torch.float32"),
        (torch.zeros(4, 9).byte(), torch.zeros(4, 1).byte(), ValueError, r"codes: expected .*, got \(4, 9\)"),
        (
            torch.zeros(4, 16).byte(),
            torch.zeros(4, 2).byte(),
            ValueError,
            r"scales: expected shape \(4, 1\), got \(4, 2\)",
        ),
    ],
)
def test_bad_storage(codes: Any, scales: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Mxfp4Weight(codes, scales)
