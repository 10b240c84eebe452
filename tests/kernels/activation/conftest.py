"""Inputs as the callers lay them out, and plain PyTorch beside us."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.activation.reference import gated_activation_reference
from fastpeft_kernels.native import native_library
from tests.budget import assert_within_budget


@dataclass
class Case:
    """Inputs, and room for results in wider memory filled with NaN."""

    kind: str
    dh: Tensor
    gate: Tensor | None
    up: Tensor

    def results(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """h as the left part of a wider tensor; dgate and dup as the halves of one (dgate None without a gate)."""
        rows, columns = self.up.shape
        wider = torch.full((rows, columns + 5), torch.nan, dtype=self.up.dtype)
        both = torch.full((rows, 2 * columns), torch.nan, dtype=self.up.dtype)
        return wider[:, :columns], both[:, :columns] if self.gate is not None else None, both[:, columns:]

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What PyTorch computes in `dtype`."""
        leaves = {"dup": self.up.detach().to(dtype, copy=True).requires_grad_()}
        if self.gate is not None:
            leaves["dgate"] = self.gate.detach().to(dtype, copy=True).requires_grad_()
        h = gated_activation_reference(leaves.get("dgate"), leaves["dup"], self.kind)
        gradients = torch.autograd.grad(h, list(leaves.values()), self.dh.to(dtype))
        return {"h": h.detach(), **dict(zip(leaves, gradients, strict=True))}

    def hold(self, **ours: Tensor | None) -> None:
        """Fails unless each of `ours` is within its budget."""
        same, exact = self.plain(self.up.dtype), self.plain(torch.float64)
        for name, value in ours.items():
            if value is not None:
                assert_within_budget(value, same[name], exact[name], f"{name} of {self.kind}")


def make_case(kind: str, rows: int, columns: int, dtype: torch.dtype, gated: bool = True, scale: float = 2.0) -> Case:
    """gate and up are the halves of one tensor; dh has rows of its own distance."""
    both = torch.randn(rows, 2 * columns) * scale
    if rows * columns < 4:  # too few for a budget to mean much near a zero of the slope, which is left of 0
        both = both.abs() + 0.5
    both = both.to(dtype)
    dh = torch.randn(rows, columns + 3).to(dtype)[:, :columns]
    return Case(kind, dh, both[:, :columns] if gated else None, both[:, columns:])


def comparable(case: Case, kind: str) -> Tensor:
    """Where PyTorch's own result counts: with AVX-512 its GELU of infinity is NaN."""
    known = kind != "gelu" or not torch.nn.functional.gelu(torch.full((8,), torch.inf)).isnan().any()
    return torch.ones_like(case.gate, dtype=torch.bool) if known else case.gate != torch.inf


def special_case(kind: str, dtype: torch.dtype) -> Case:
    """Each special value as gate, beside an up of 2; then each as up, beside a gate of 1.5."""
    values = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 240.0, -240.0, 89.0, -89.0, 103.0, -103.0, 1e-7, -1e-7, 12.0]
    special = torch.tensor([values]).to(dtype)
    gate = torch.cat([special, torch.full_like(special, 1.5)], 1)
    up = torch.cat([torch.full_like(special, 2.0), special], 1)
    return Case(kind, torch.full_like(gate, 0.5), gate, up)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """The parameter; "native" is skipped where it cannot be built."""
    name: str = request.param
    if name == "native" and native_library() is None:
        pytest.skip("no C++ compiler here")
    return name
