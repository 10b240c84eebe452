"""Seeds that a caller gives, and a scaling that is a tensor: used as they are, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastpeft_kernels.lora import lora_linear, lora_linear_group
from tests.kernels.lora.groups import projection

X = torch.randn(4, 16)


def test_not_training_drops_nothing() -> None:
    group = [projection(16, 8, 2, dropout=0.5)]
    seeds = [torch.tensor([3])]
    expected = lora_linear_group(X, group, training=False)
    torch.testing.assert_close(lora_linear_group(X, group, training=False, seeds=seeds), expected, rtol=0, atol=0)
    assert not torch.equal(lora_linear_group(X, group, seeds=seeds)[0], expected[0])


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (None, r"seeds\[1\]: expected an int64 tensor \(1,\) where something is dropped, got None"),
        (torch.tensor([1.0]), r"seeds\[1\]: expected int64 \(1,\) on cpu, got torch.float32 \(1,\) on cpu"),
        (torch.tensor(1), r"seeds\[1\]: expected int64 \(1,\) on cpu, got torch.int64 \(\) on cpu"),
        (torch.empty(1, dtype=torch.int64, device="meta"), r"seeds\[1\]: .* on meta"),
    ],
)
def test_a_seed_that_is_none(seed: Any, message: str) -> None:
    group = [projection(16, 8, 2), projection(16, 8, 2, dropout=0.5)]
    with pytest.raises(ValueError, match=message):
        lora_linear_group(X, group, seeds=[None, seed])


def test_as_many_as_projections() -> None:
    with pytest.raises(ValueError, match="seeds: expected 1, one for each projection, got 2"):
        lora_linear_group(X, [projection(16, 8, 2)], seeds=[None, None])


def test_a_dtype_that_does_not_float() -> None:
    with pytest.raises(TypeError, match=r"compute_dtype: expected a floating dtype of .*, got torch\.int8"):
        lora_linear_group(X, [projection(16, 8, 2)], compute_dtype=torch.int8)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (torch.ones(8, 1), r"scaling: expected shape \(\), got \(8, 1\)"),
        (torch.tensor(1.0, requires_grad=True), "scaling: expected a tensor without gradient"),
        (torch.tensor(1), "scaling: expected a floating dtype, got torch.int64"),
    ],
)
def test_a_scaling_that_is_no_number(scaling: torch.Tensor, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        lora_linear(X, torch.randn(8, 16), torch.randn(2, 16), torch.randn(8, 2), scaling=scaling)
