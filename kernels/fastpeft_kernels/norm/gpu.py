"""Checks that need a CUDA GPU: every way to compute the norms within its budget, on any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..common.device import holds_huge_tensors
from ..common.gpu_verdicts import Verdicts
from .api import DTYPES, run_norm
from .form import Form, gated_form, layer_form, most_features, rms_form
from .reference import norm_reference

_DEVICE = torch.device("cuda")
_ODD = (37, 333)
"""In every combination; the others in bf16, frozen and with all that there is: each takes kernels of its own."""
# A head; a hidden state; narrow; one; wide; the widest that a program holds with a gate, and without.
_SHAPES = ((3, 50, 128), (65, 4096), (1000, 7), (1, 1), (9, 8192), (5, 16384), (3, 32768))
_MANY = 2**31
_GATED = {
    "gate after": (True, "silu", 1),
    "gate after, sigmoid": (True, "sigmoid", 1),
    "gate before": (False, "silu", 4),
}
"""Whether the norm comes before the gate, the gate's activation, and into how many groups rows are divided."""
_KINDS = ("input", "weight", "once", "gemma", "layer")


def checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named checks. Each returns figures, or raises AssertionError."""
    for kind in (*_KINDS, *_GATED):
        yield f"correct {kind} triton", partial(_check, kind, "triton")
    for kind in ("input", "once", "layer"):
        yield f"correct {kind} aten", partial(_check, kind, "aten")
    yield "the default, in any layout", _check_default
    yield "rows that begin anywhere", _check_unaligned
    yield "longer rows than a program holds", _check_wide
    yield "the same in a CUDA graph", _check_graph
    if holds_huge_tensors():
        yield "more than 2**31 elements", _check_many


def _form(kind: str, x: torch.dtype, weight: torch.dtype, eps: float) -> Form:
    if kind == "layer":
        return layer_form(x, eps)
    if kind in _GATED:
        norm_before_gate, activation, groups = _GATED[kind]
        rounding = "once" if activation == "sigmoid" else "input"
        return gated_form(x, weight, eps, rounding, norm_before_gate, activation, groups)
    return rms_form(x, weight, eps, 1.0, "once") if kind == "gemma" else rms_form(x, weight, eps, 0.0, kind)


def _check(kind: str, backend: str) -> dict[str, Any]:
    verdicts = Verdicts()
    form = _form(kind, torch.bfloat16, torch.bfloat16, 1e-6)
    shapes = [s for s in _SHAPES if s[-1] % form.groups == 0 and s[-1] // form.groups <= most_features(form)]
    odd = _ODD if form.groups == 1 else (37, 332)
    for dtype, weight, trained in product(DTYPES, (None, torch.float32), (False, True)):
        if backend == "aten" and (trained or weight is not None):
            continue  # what it does not take, and sums over rows in PyTorch's own rounding
        _compare(verdicts, kind, backend, odd, dtype, weight or dtype, trained)
    for shape, both in product(shapes, (False, True)):
        if backend != "aten" or not both:
            trained = both and shape[-1] > 4  # of one sum over rows chance decides which rounding is nearer
            _compare(verdicts, kind, backend, shape, torch.bfloat16, torch.bfloat16, trained)
    return {"largest_share_of_budget": verdicts.settle()}


def _check_default() -> dict[str, Any]:
    """Rows of a wider tensor, transposed ones, and expanded gradients."""
    verdicts = Verdicts()
    whole = torch.randn((6, 40, 3 * 64), device=_DEVICE).bfloat16()
    for x in (whole[..., 64:128], whole.transpose(0, 1), whole.transpose(1, 2), whole[:1].expand(3, -1, -1)):
        form = _form("gemma", x.dtype, torch.bfloat16, 1e-6)
        weight = torch.randn(x.shape[-1], device=_DEVICE).bfloat16()
        leaf = x.detach().requires_grad_()
        y = run_norm(leaf, weight, None, form)
        (dx,) = torch.autograd.grad(y.sum(), leaf)
        same, exact = (
            norm_reference(x.to(d), weight.to(d), None, _form("gemma", d, d, 1e-6)) for d in (x.dtype, torch.float64)
        )
        verdicts.within(y.detach(), same, exact, f"strides {x.stride()}")
        dense = x.contiguous().requires_grad_()
        (want,) = torch.autograd.grad(run_norm(dense, weight, None, form).sum(), dense)
        verdicts.equal(dx.contiguous(), want, f"gradient, strides {x.stride()}")
    return {"largest_share_of_budget": verdicts.settle()}


def _check_unaligned() -> dict[str, Any]:
    """By turns with rows at multiples of 16 bytes, which another binary of the same kernel reads."""
    verdicts = Verdicts()
    memory = torch.randn(719 * 64 + 1, device=_DEVICE).bfloat16()
    weight = torch.randn(64, device=_DEVICE).bfloat16()
    for x in (memory[:-1], memory[1:], memory[:-1], memory[1:]):
        rows = x.view(719, 64)
        y = run_norm(rows, weight, None, _form("gemma", x.dtype, x.dtype, 1e-6), "triton")
        same, exact = (
            norm_reference(rows.to(d), weight.to(d), None, _form("gemma", d, d, 1e-6)) for d in (x.dtype, torch.float64)
        )
        verdicts.within(y, same, exact, f"from element {x.storage_offset()} on")
    return {"largest_share_of_budget": verdicts.settle()}


def _check_wide() -> dict[str, Any]:
    verdicts = Verdicts()
    for kind, features in (("gemma", 40000), ("layer", 40000), ("gate after", 16384)):
        _compare(verdicts, kind, "auto", (3, features), torch.bfloat16, torch.bfloat16, True)
    return {"largest_share_of_budget": verdicts.settle()}


def _check_graph() -> dict[str, Any]:
    x = torch.randn((64, 1024), device=_DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1024, device=_DEVICE, dtype=torch.bfloat16)
    form = _form("gemma", x.dtype, x.dtype, 1e-6)

    def step() -> tuple[Tensor, Tensor]:
        y = run_norm(x, weight, None, form, "triton")
        return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.normal_()
    graph.replay()
    verdicts = Verdicts()
    for replayed, called, what in zip(captured, step(), ("y", "dx"), strict=True):
        verdicts.equal(replayed, called, what)
    verdicts.settle()
    return {}


def _check_many() -> dict[str, Any]:
    features = 4096
    rows = _MANY // features + 70
    x = torch.randn((rows, features), dtype=torch.bfloat16, device=_DEVICE, requires_grad=True)
    weight = torch.randn(features, dtype=torch.bfloat16, device=_DEVICE)
    form = _form("gemma", x.dtype, x.dtype, 1e-6)
    y = run_norm(x, weight, None, form, "triton")
    (dx,) = torch.autograd.grad(y, x, y.detach())
    for part in (slice(0, 64), slice(_MANY // features - 32, _MANY // features + 32), slice(rows - 5, rows)):
        own = x.detach()[part].clone().requires_grad_()
        want = run_norm(own, weight, None, form, "triton")
        assert torch.equal(y[part], want), f"y, rows {part}"
        assert torch.equal(dx[part], torch.autograd.grad(want, own, want.detach())[0]), f"dx, rows {part}"
    return {"elements": rows * features}


def _compare(
    verdicts: Verdicts,
    kind: str,
    backend: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    trained: bool,
) -> None:
    # With one element only what eps leaves of the gradient is not rounding.
    eps = 20.0 if shape[-1] < 8 else 1e-5
    x, dy = (torch.randn(shape, device=_DEVICE).to(dtype) for _ in range(2))
    x += 0.5
    weight, bias = (torch.randn(shape[-1], device=_DEVICE).to(weight_dtype) for _ in range(2))
    given = {"x": x, "weight": weight} | ({"bias": bias} if kind == "layer" else {})
    if kind in _GATED:
        given["gate"] = torch.randn(shape, device=_DEVICE).to(dtype)

    def step(compute: Any, in_dtype: torch.dtype | None) -> dict[str, Tensor]:
        leaves = {name: t.detach().to(in_dtype or t.dtype) for name, t in given.items()}
        for name, leaf in leaves.items():
            leaf.requires_grad_(trained or name in ("x", "gate"))
        form = _form(kind, leaves["x"].dtype, leaves["weight"].dtype, eps)
        y = compute(leaves["x"], leaves["weight"], leaves.get("bias"), form, gate=leaves.get("gate"))
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        grads = torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype))
        return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}

    ours, twice = (step(partial(run_norm, backend=backend), None) for _ in range(2))
    same, exact = step(norm_reference, None), step(norm_reference, torch.float64)
    for name, value in ours.items():
        what = f"{name} of {kind}, {shape} {dtype} {weight_dtype} {trained=}"
        if backend == "triton":
            verdicts.equal(twice[name], value, f"{what}: not the same twice")
        verdicts.within(value, same[name], exact[name], what)
