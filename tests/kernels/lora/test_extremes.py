"""Values at the edge of what a dtype holds: what PyTorch gives, or an infinity where PyTorch gives one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.lora import Dtypes, LoraProjection, lora_linear_group
from fastpeft_kernels.lora.reference import lora_group_reference
from tests.kernels.lora.groups import check_group, parameters, projection

F32, F16 = torch.float32, torch.float16
Found = list[Tensor]


def beside_pytorch(x: Tensor, group: list[LoraProjection]) -> tuple[Found, Found]:
    """Outputs and all gradients, ours and PyTorch's."""
    found = []
    for run in (lora_linear_group, lambda x, g: lora_group_reference(x, g, Dtypes(F32, F32, F32), [None] * len(g))):
        ys = run(x, group)
        found.append([*ys, *torch.autograd.grad([y.sum() for y in ys], [x, *parameters(group)])])
    return found[0], found[1]


def spoiled(where: str, value: float) -> tuple[Tensor, list[LoraProjection]]:
    group = [projection(12, 8, 3, bias=True), projection(12, 6, 2)]
    x = torch.randn(5, 12, requires_grad=True)
    with torch.no_grad():
        {"x": x, "a": group[0].adapters[0].a, "b": group[0].adapters[0].b}[where][2, 1] = value
    return x, group


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "a", "b"])
def test_what_is_not_finite_reaches_what_it_reaches_in_pytorch(value: float, where: str) -> None:
    for ours, theirs in zip(*beside_pytorch(*spoiled(where, value)), strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())


def test_s_beyond_fp16() -> None:
    """x A^T past 65504 for one token: an infinity only where PyTorch or the oracle has one."""
    group = [projection(16, out, rank, dtype=F16) for out, rank in ((8, 4), (6, 2))]
    x = torch.randn(9, 16)
    x[3] *= 3e4
    check_group(x.to(F16).requires_grad_(), group, Dtypes(F16, F16, F16))
