"""Checks that need a CUDA GPU: the fused kernels in every configuration against plain PyTorch and fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activation import KINDS
from ..activation.reference import gated_activation_reference
from ..common.device import holds_huge_tensors
from ..common.gpu_verdicts import Verdicts

Check = tuple[str, Callable[[], dict[str, Any]]]
_DEVICE = torch.device("cuda")
BF16, F16 = torch.bfloat16, torch.float16
# Tokens, features, ranks of gate, up and down. Whole tiles; aligned rows that no tile divides; nothing aligned.
_WHOLE, _RAGGED, _ODD = (1024, 1536, 16, 16, 16), (1000, 1520, 16, 16, 16), (333, 777, 16, 5, 12)
_MANY = 2**31


class _Case(NamedTuple):
    """Inputs; gate and up are the halves of one tensor. Without a gate its adapter goes, too."""

    kind: str
    gate: Tensor | None
    up: Tensor
    dh: Tensor
    factors: dict[str, tuple[Tensor, Tensor]]
    a: Tensor
    ds_down: Tensor | None


def checks() -> Iterator[Check]:
    """Named checks. Each returns figures, or raises AssertionError."""
    from . import fused_backward, fused_forward

    for dtype in (BF16, F16):
        for check, module in ((_check_forward, fused_forward), (_check_backward, fused_backward)):
            for config in module.CONFIGS:
                by_element = dtype == BF16 and (config is module.CONFIGS[0] or config.parts > 1)  # slow to compile
                sizes = (_WHOLE, _RAGGED, _ODD) if by_element else (_WHOLE, _RAGGED)
                what = f"{module.__name__.rpartition('.')[2]} {config.label} {str(dtype).removeprefix('torch.')}"
                yield what, partial(check, "silu", dtype, sizes, config)
    for kind, gated in [*((kind, True) for kind in KINDS[1:]), ("silu", False), ("gelu", False)]:
        for check in (_check_forward, _check_backward):
            name = f"fused {check.__name__.rpartition('_')[2]} {kind}{'' if gated else ' without gate'}"
            yield name, partial(check, kind, BF16, (_RAGGED,), None, gated)
    for bits in product((True, False), repeat=3):
        if not all(bits):
            names = [name for name, there in zip(("gate", "up", "down"), bits, strict=True) if there]
            name = f"fused backward with {' and '.join(names) or 'no'} adapters"
            yield name, partial(_check_backward, "silu", BF16, (_RAGGED,), None, True, names)
    if holds_huge_tensors():
        yield "more than 2**31 elements: fused forward and backward", _check_many


def _check_forward(
    kind: str, dtype: torch.dtype, sizes: tuple[tuple[int, ...], ...], config: Any, gated: bool = True
) -> dict[str, Any]:
    from .fused_forward import gated_activation_with_down

    verdicts = Verdicts()
    for size in sizes:
        case = _make(size, kind, dtype, gated)
        what = f"{size} {kind} {gated=}"
        room = torch.full((size[0], size[1] + 16), torch.nan, dtype=dtype, device=_DEVICE)
        h, beside = room[:, : size[1]], room[:, size[1] :]
        s = gated_activation_with_down(case.gate, case.up, kind, h, case.a, config=config)
        verdicts.equal(beside, torch.full_like(beside, torch.nan), f"wrote beside h, {what}")
        same, exact = (
            gated_activation_reference(None if case.gate is None else case.gate.to(d), case.up.to(d), kind)
            for d in (dtype, torch.float64)
        )
        verdicts.within(h, same, exact, f"h, {what}")
        verdicts.within(s, h @ case.a.t(), h.double() @ case.a.double().t(), f"S, {what}")
        for place in (case.gate, case.up):
            if place is not None:  # fresh memory, as its halves lie
                gate, up = _copied(case)
                into = gate if place is case.gate and gate is not None else up
                again = gated_activation_with_down(gate, up, kind, into, case.a, config=config)
                verdicts.equal(into, h, f"h in place, {what}")
                verdicts.equal(again, s, f"S in place, {what}")
    return {"share_of_budget": verdicts.settle()}


def _check_backward(
    kind: str,
    dtype: torch.dtype,
    sizes: tuple[tuple[int, ...], ...],
    config: Any,
    gated: bool = True,
    names: Any = ("gate", "up", "down"),
) -> dict[str, Any]:
    verdicts = Verdicts()
    for size in sizes:
        case = _make(size, kind, dtype, gated, names)
        what = f"{size} {kind} {gated=}"
        room = torch.full((size[0], 2 * size[1] + 16), torch.nan, dtype=dtype, device=_DEVICE)
        dgate = room[:, : size[1]] if gated else None
        dup, beside = room[:, size[1] : 2 * size[1]], room[:, 2 * size[1] :]
        results = _run_backward(case, case.gate, case.up, dgate, dup, config)
        verdicts.equal(beside, torch.full_like(beside, torch.nan), f"wrote beside dup, {what}")
        same, exact = (_gradients(case, d) for d in (dtype, torch.float64))
        for name, ours in (("dup", dup), ("dgate", dgate)):
            if ours is not None:
                verdicts.within(ours, same[name], exact[name], f"{name}, {what}")
        for name, (b, s) in case.factors.items():
            dy = dup if name == "up" or dgate is None else dgate
            verdicts.within(results[f"ds_{name}"], dy @ b, dy.double() @ b.double(), f"dS of {name}, {what}")
            plain = _product_in_fp32(dy.t(), s)
            verdicts.within(results[f"db_{name}"], plain, dy.double().t() @ s.double(), f"dB of {name}, {what}")
        if case.ds_down is not None:  # h is nowhere: the whole chain, in the dtype of its operands
            plain, wide = case.ds_down.t() @ same["h"], case.ds_down.double().t() @ exact["h"]
            verdicts.within(results["da_down"].to(dtype), plain, wide, f"dA of down, {what}")
        gate, up = _copied(case)
        again = _run_backward(case, gate, up, gate, up, config)
        for name, value in results.items():
            verdicts.equal(again[name], value, f"{name} in place, {what}")
        verdicts.equal(up, dup, f"dup in place, {what}")
        if gate is not None and dgate is not None:
            verdicts.equal(gate, dgate, f"dgate in place, {what}")
    return {"share_of_budget": verdicts.settle()}


def _check_many() -> dict[str, Any]:
    """In place, on rows at the beginning, around the 2**31st element and at the end."""
    from .fused_forward import gated_activation_with_down

    columns = 4112  # whole rows take 16-byte loads, no tile divides them
    rows = _MANY // columns + 70
    case = _make((rows, columns, 16, 16, 16), "silu", BF16, True)
    parts = [slice(0, 64), slice(_MANY // columns - 32, _MANY // columns + 32), slice(rows - 5, rows)]
    small = [_part(case, part) for part in parts]
    h = torch.empty_like(case.dh)
    s = gated_activation_with_down(case.gate, case.up, "silu", h, case.a)
    verdicts = Verdicts()
    for part, few in zip(parts, small, strict=True):
        wanted = torch.empty_like(few.dh)
        gated_activation_with_down(few.gate, few.up, "silu", wanted, few.a)
        verdicts.equal(h[part], wanted, f"h, rows {part}")
        verdicts.within(s[part], wanted @ case.a.t(), wanted.double() @ case.a.double().t(), f"S, rows {part}")
    del h
    results = _run_backward(case, case.gate, case.up, case.gate, case.up, None)
    for part, few in zip(parts, small, strict=True):
        dgate, dup = (torch.empty_like(few.dh) for _ in range(2))
        _run_backward(few, few.gate, few.up, dgate, dup, None)
        for name, dy, ours in (("gate", dgate, case.gate), ("up", dup, case.up)):
            assert ours is not None
            verdicts.equal(ours[part], dy, f"d{name}, rows {part}")
            b, ds = case.factors[name][0], results[f"ds_{name}"][part]
            verdicts.within(ds, dy @ b, dy.double() @ b.double(), f"dS of {name}, rows {part}")
    return {"share_of_budget": verdicts.settle(), "elements": case.up.numel()}


def _make(
    size: tuple[int, ...], kind: str, dtype: torch.dtype, gated: bool, names: Any = ("gate", "up", "down")
) -> _Case:
    tokens, features, *ranks = size

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn((rows, columns), device=_DEVICE, dtype=dtype)

    both = normal(tokens, 2 * features).mul_(2.0)
    factors = {
        name: (normal(features, rank), normal(tokens, rank))
        for name, rank in zip(("gate", "up"), ranks, strict=False)
        if name in names and (gated or name == "up")
    }
    gate = both[:, :features] if gated else None
    ds_down = normal(tokens, ranks[2]) if "down" in names else None
    a = normal(ranks[2], features)
    return _Case(kind, gate, both[:, features:], normal(tokens, features), factors, a, ds_down)


def _part(case: _Case, rows: slice) -> _Case:
    """Copies of some rows."""
    gate, up = _copied(case._replace(gate=None if case.gate is None else case.gate[rows], up=case.up[rows]))
    factors = {name: (b, s[rows]) for name, (b, s) in case.factors.items()}
    ds_down = None if case.ds_down is None else case.ds_down[rows]
    return case._replace(gate=gate, up=up, dh=case.dh[rows].clone(), factors=factors, ds_down=ds_down)


def _copied(case: _Case) -> tuple[Tensor | None, Tensor]:
    """gate and up as the halves of another tensor."""
    if case.gate is None:
        return None, torch.cat([case.up, case.up], 1)[:, case.up.shape[1] :]
    both = torch.cat([case.gate, case.up], 1)
    return both[:, : case.up.shape[1]], both[:, case.up.shape[1] :]


def _run_backward(
    case: _Case, gate: Tensor | None, up: Tensor, dgate: Tensor | None, dup: Tensor, config: Any
) -> dict[str, Tensor]:
    """dS and the sums of the partial sums, by name."""
    from .fused_backward import UpAdapter, gated_activation_backward_with_adapters

    adapters = {name: UpAdapter(*pair) for name, pair in case.factors.items()}
    got = gated_activation_backward_with_adapters(
        case.dh, gate, up, case.kind, dgate=dgate, dup=dup, gate_adapter=adapters.get("gate"),
        up_adapter=adapters.get("up"), ds_down=case.ds_down, config=config,
    )  # fmt: skip
    shares = got.ds.split([adapter.b.shape[1] for adapter in adapters.values()], dim=1) if adapters else ()
    results = {f"ds_{name}": ds for name, ds in zip(adapters, shares, strict=True)}
    sums = {"db_gate": got.db_gate, "db_up": got.db_up, "da_down": got.da_down}
    return results | {name: part.sum(0) for name, part in sums.items() if part is not None}


def _gradients(case: _Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """h, dgate and dup by autograd in `dtype`."""
    leaves = {"dup": case.up.to(dtype, copy=True).requires_grad_()}
    if case.gate is not None:
        leaves["dgate"] = case.gate.to(dtype, copy=True).requires_grad_()
    with torch.enable_grad():
        h = gated_activation_reference(leaves.get("dgate"), leaves["dup"], case.kind)
        gradients = torch.autograd.grad(h, list(leaves.values()), case.dh.to(dtype))
    return {"h": h.detach(), **dict(zip(leaves, gradients, strict=True))}


def _product_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b as the library accumulates it: the operands as they are, the result in fp32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
