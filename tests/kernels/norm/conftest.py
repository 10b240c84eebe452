"""Norms of every kind, and plain PyTorch beside us."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastpeft_kernels.norm import gated_rms_norm, layer_norm, rms_norm
from fastpeft_kernels.norm.form import gated_form, layer_form, rms_form
from fastpeft_kernels.norm.reference import norm_reference
from tests.budget import assert_within_budget

GATED: dict[str, dict[str, Any]] = {
    "gate after": {"norm_before_gate": True, "rounding": "input"},
    "gate after, sigmoid": {"norm_before_gate": True, "rounding": "once", "activation": "sigmoid"},
    "gate before, in groups": {"norm_before_gate": False, "rounding": "input"},
}
KINDS = ("input", "weight", "once", "gemma", "layer", *GATED)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of one block and of more; odd; narrow; one; none.
SHAPES = ((3, 5, 65), (2, 700), (9, 3), (4, 1), (1, 1), (0, 8))


@dataclass
class Case:
    """One call, with the gradients of its results."""

    kind: str
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float = 1e-5
    gate: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        named = {"x": self.x, "weight": self.weight, "bias": self.bias, "gate": self.gate}
        return {name: t for name, t in named.items() if t is not None}

    def leaves(self, dtype: torch.dtype | None = None) -> Case:
        """The same numbers as new leaves, of another dtype if one is given."""
        own = {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in self.tensors().items()}
        return replace(self, **own)

    def ours(self, backend: str) -> Tensor:
        if self.kind == "layer":
            return layer_norm(self.x, self.weight, self.bias, self.eps, backend=backend)
        if self.gate is not None:
            how = {**GATED[self.kind], "groups": self.groups()}
            return gated_rms_norm(self.x, self.gate, self.weight, self.eps, **how, backend=backend)
        offset, rounding = (1.0, "once") if self.kind == "gemma" else (0.0, self.kind)
        return rms_norm(self.x, self.weight, self.eps, offset=offset, rounding=rounding, backend=backend)

    def groups(self) -> int:
        features = self.x.shape[-1]
        return next(g for g in (5, 4, 3, 1) if features % g == 0) if "groups" in self.kind else 1

    def plain(self) -> Tensor:
        dtype = self.x.dtype if self.weight is None else self.weight.dtype
        if self.kind == "layer":
            form = layer_form(self.x.dtype, self.eps)
        elif self.gate is not None:
            how = {"activation": "silu", **GATED[self.kind], "groups": self.groups()}
            form = gated_form(self.x.dtype, dtype, self.eps, **how)
        elif self.kind == "gemma":
            form = rms_form(self.x.dtype, dtype, self.eps, 1.0, "once")
        else:
            form = rms_form(self.x.dtype, dtype, self.eps, 0.0, self.kind)
        return norm_reference(self.x, self.weight, self.bias, form, self.gate)


def results(case: Case, compute: Any, dy: Tensor) -> dict[str, Tensor]:
    """The result and the gradients of every tensor."""
    y, leaves = compute(case), case.tensors()
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def hold(case: Case, backend: str) -> None:
    """Fails unless all results and gradients are within their budgets."""
    leaves = case.leaves()
    with torch.no_grad():
        y = leaves.plain()
    dy = torch.randn(y.shape).to(y.dtype)
    ours = results(leaves, lambda c: c.ours(backend), dy)
    same = results(case.leaves(), Case.plain, dy)
    exact = results(case.leaves(torch.float64), Case.plain, dy)
    for name, value in ours.items():
        assert_within_budget(value, same[name], exact[name], f"{name} of {case.kind}, {tuple(case.x.shape)}")


def make_case(
    kind: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    weight: torch.dtype | None = None,
    bare: bool = False,
) -> Case:
    """x is a part of wider memory, not centred around zero; `bare` is without weight and bias."""
    x = (torch.randn(*shape[:-1], shape[-1] + 3) + 0.5).to(dtype)[..., : shape[-1]]
    w, b = (torch.randn(shape[-1]).to(weight or dtype) for _ in range(2))
    gate = torch.randn(*shape[:-1], shape[-1] + 1).to(dtype)[..., 1:] if kind in GATED else None
    # One element's gradient is nothing but what eps leaves of it, the rest cancels: with little, only rounding is left.
    eps = 20.0 if shape[-1] < 4 else 1e-5
    return Case(kind, x, None if bare else w, b if kind == "layer" and not bare else None, eps, gate)
