"""The Triton kernels in Triton's interpreter."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from fastpeft_kernels.norm import gated_rms_norm, rms_norm

from .conftest import KINDS, hold, make_case

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("nan_filled")]

# The interpreter computes bfloat16 wrongly.
DTYPES = ((torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_within_budget(kind: str) -> None:
    for (dtype, weight), shape in product(DTYPES, ((2, 3, 65), (70, 33), (1, 1), (0, 4))):
        hold(make_case(kind, shape, dtype, weight=weight), "triton")
    if kind != "gemma":
        hold(make_case(kind, (5, 7), torch.float32, bare=True), "triton")


def test_sums_of_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = pytest.importorskip("fastpeft_kernels.norm.backward")
    monkeypatch.setattr(backward, "PARTIAL_SUMS", 3)  # each program takes several tiles, the last fewer
    for kind in ("layer", "gate before, in groups"):
        hold(make_case(kind, (67, 700), torch.float32), "triton")


def test_other_strides_and_no_gradient_of_x() -> None:
    whole = torch.randn(3, 4, 12)
    for x in (whole.transpose(0, 1), whole.transpose(1, 2), whole[..., 1:]):
        y = rms_norm(x, torch.ones(x.shape[-1]), 1e-6, backend="triton")
        torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, x.shape[-1:], None, 1e-6))
    weight = torch.ones(12, requires_grad=True)
    rms_norm(whole, weight, 1e-6, backend="triton").sum().backward()
    torch.testing.assert_close(weight.grad, torch.nn.functional.rms_norm(whole, (12,), None, 1e-6).sum((0, 1)))


def test_too_many_features() -> None:
    with pytest.raises(ValueError, match="x: expected at most 32768 features a group for 'triton', got 32769"):
        rms_norm(torch.zeros(1, 32769), None, 1e-6, backend="triton")
    x = torch.zeros(1, 2 * 8193)
    with pytest.raises(ValueError, match="x: expected at most 8192 features a group for 'triton', got 8193"):
        gated_rms_norm(x, x, None, 1e-6, groups=2, backend="triton")
