"""DoRA's Triton kernels in Triton's interpreter: within the error budget, at sizes that no tile divides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.lora import Dtypes, dora
from tests.budget import assert_within_budget
from tests.kernels.lora.groups import check_group, projection

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("nan_filled")]
pytest.importorskip("triton")
F32, F16 = torch.float32, torch.float16


@pytest.mark.parametrize("rank", [1, 20, 70])
@pytest.mark.parametrize(("weight", "lora"), [(F32, F32), (F16, F16), (F16, F32)])
@pytest.mark.parametrize("turned", [False, True])
def test_norms(rank: int, weight: torch.dtype, lora: torch.dtype, turned: bool) -> None:
    from fastpeft_kernels.lora.dora_triton import row_norms_triton

    w = (torch.randn(150, 37).t() if turned else torch.randn(37, 150)).to(weight)
    up, a = torch.randn(37, rank).to(lora), torch.randn(rank, 150).to(lora)

    def norms(w: Tensor, up: Tensor, a: Tensor) -> Tensor:
        return (w + up @ a).norm(dim=1)

    wide = [t.double() for t in (w, up, a)]
    assert_within_budget(row_norms_triton(w, up, a), norms(*(t.float() for t in wide)), norms(*wide))


def test_norms_where_the_update_takes_the_weight_away() -> None:
    """All that is left is small: a sum of squares of the parts would have no digit of it."""
    from fastpeft_kernels.lora.dora_triton import row_norms_triton

    up, a = torch.randn(20, 4), torch.randn(4, 50)
    w = (-up @ a + 1e-4 * torch.randn(20, 50)).float()
    exact = (w.double() + up.double() @ a.double()).norm(dim=1)
    same = (w + up @ a).norm(dim=1)
    for norms in (row_norms_triton(w, up, a), dora.row_norms(w, up, a)):
        assert_within_budget(norms, same, exact)


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_gain_backward(dtype: torch.dtype, wanted: tuple[bool, bool]) -> None:
    from fastpeft_kernels.lora.dora_triton import gain_backward_triton

    dy, z, gain = torch.randn(150, 37).to(dtype), torch.randn(150, 37).to(dtype), torch.rand(37)
    dz = torch.empty_like(dy) if wanted[1] else None
    total = gain_backward_triton(dy, z if wanted[0] else None, gain, dz)
    if dz is not None:
        assert_within_budget(dz, (dy * gain).to(dtype), dy.double() * gain.double())
    if total is not None:
        assert_within_budget(total, (dy.float() * z.float()).sum(0), (dy.double() * z.double()).sum(0))
    assert (total is not None) == wanted[0]


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_group_by_our_kernels(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dora, "triton_serves", lambda device: True)
    monkeypatch.setattr(dora.keys, "kernels_serve", lambda device: True)
    group = [projection(24, 40, 4, bias=True, magnitude=True, scaling=0.5, dropout=dropout), projection(24, 12, 2)]
    check_group(torch.randn(33, 24, requires_grad=True), group, Dtypes(F32, F32, F32), backend="triton")
