"""Checks that need a CUDA GPU: every configuration of the Triton kernels within its budget, on any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..common.device import holds_huge_tensors
from ..common.gpu_verdicts import Verdicts
from .api import DTYPES, KINDS, gated_activation, gated_activation_backward
from .reference import gated_activation_reference

_DEVICE = torch.device("cuda")
# Whole tiles; more than one a row, the last in part; odd; narrow; one.
_SHAPES = ((64, 1024), (33, 5504), (37, 333), (1000, 7), (1, 1))
_MANY = 2**31


def checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named checks. Each returns figures, or raises AssertionError."""
    from .tiles import CONFIGS

    for config in CONFIGS:
        yield f"correct {config}", partial(_check, config)
    yield "infinities, NaN and large values", _check_special
    yield "in place", _check_in_place
    if holds_huge_tensors():
        yield "more than 2**31 elements", _check_many


def _check(config: Any) -> dict[str, Any]:
    verdicts = Verdicts()
    for shape, kind, dtype, gated in product(_SHAPES, KINDS, DTYPES, (True, False)):
        gate, up, dh = _inputs(shape, dtype, gated)
        same = _plain(dh, gate, up, kind)
        exact = _plain(dh.double(), None if gate is None else gate.double(), up.double(), kind)
        for with_h in (True, False):
            ours, twice = (_ours(config, dh, gate, up, kind, with_h, verdicts) for _ in range(2))
            for key, value in ours.items():
                what = f"{key}, {shape} {kind} {dtype} {gated=} {with_h=}"
                verdicts.equal(twice[key], value, f"{what}: not the same twice")
                name = key.removeprefix("again ")
                verdicts.within(value, same[name], exact[name], what)
    return {"largest_share_of_budget": verdicts.settle()}


def _check_special() -> dict[str, Any]:
    values = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e4, -1e4, 80.0, -80.0, -88.0, 1e-6, -1e-6]
    for kind, dtype, gated in product(KINDS, DTYPES, (True, False)):
        x = torch.tensor(values, device=_DEVICE, dtype=dtype).expand(3, -1).contiguous()
        up, dh = torch.full_like(x, 2.0), torch.full_like(x, 0.5)
        ours = _ours(None, dh, x if gated else None, up if gated else x, kind)
        same = _plain(dh, x if gated else None, up if gated else x, kind)
        for key, value in same.items():
            eps = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(
                ours[key], value, rtol=eps, atol=eps, equal_nan=True, msg=f"{kind} {key} {dtype}"
            )
    return {}


def _check_in_place() -> dict[str, Any]:
    for shape, kind, dtype in product(_SHAPES, ("silu", "gelu"), DTYPES):
        gate, up, dh = _inputs(shape, dtype, True)
        assert gate is not None
        want = _ours(None, dh, gate, up, kind)
        gated_activation_backward(dh, gate, up, kind, dgate=gate, dup=up, h=dh, backend="triton")
        for key, value in (("h", dh), ("dgate", gate), ("dup", up)):
            assert torch.equal(value, want[key]), f"{key} in place, {shape} {kind} {dtype}"
    return {}


def _check_many() -> dict[str, Any]:
    columns = 4104
    rows = _MANY // columns + 70
    both = torch.randn((rows, 2 * columns), dtype=torch.bfloat16, device=_DEVICE)
    gate, up = both[:, :columns], both[:, columns:]
    dh = torch.randn((rows, columns), dtype=torch.bfloat16, device=_DEVICE)
    parts = [slice(0, 64), slice(_MANY // columns - 32, _MANY // columns + 32), slice(rows - 5, rows)]
    before = [(dh[part].clone(), gate[part].clone(), up[part].clone()) for part in parts]
    out = gated_activation(gate, up, "silu", backend="triton")
    wanted = [gated_activation(g, u, "silu", backend="triton") for _, g, u in before]
    assert all(torch.equal(out[part], want) for part, want in zip(parts, wanted, strict=True)), "forward"
    gated_activation_backward(dh, gate, up, "silu", dgate=gate, dup=up, h=dh, backend="triton")
    for part, inputs in zip(parts, before, strict=True):
        want = _ours(None, *inputs, "silu")
        same = (
            torch.equal(dh[part], want["h"]),
            torch.equal(gate[part], want["dgate"]),
            torch.equal(up[part], want["dup"]),
        )
        assert all(same), f"backward, rows {part}: h, dgate, dup equal: {same}"
    return {"elements": rows * columns}


def _inputs(shape: tuple[int, int], dtype: torch.dtype, gated: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """gate and up as the halves of one tensor, and dh."""
    both = 2.0 * torch.randn((shape[0], 2 * shape[1]), device=_DEVICE)
    if both.numel() < 8:  # too few for a budget to mean much near a zero of the slope, which is left of 0
        both = both.abs() + 0.5
    both = both.to(dtype)
    dh = torch.randn(shape, device=_DEVICE).to(dtype)
    return (both[:, : shape[1]] if gated else None), both[:, shape[1] :], dh


def _ours(
    config: Any,
    dh: Tensor,
    gate: Tensor | None,
    up: Tensor,
    kind: str,
    with_h: bool = True,
    verdicts: Verdicts | None = None,
) -> dict[str, Tensor]:
    """Forward, and backward into parts of wider memory that is filled with NaN; nothing may be written beside it."""
    from .backward import gated_activation_backward_triton
    from .forward import gated_activation_triton
    from .tiles import CONFIGS

    config = config or CONFIGS[0]
    rows, columns = up.shape
    room = torch.full((rows, 4 * columns + 3), torch.nan, device=_DEVICE, dtype=up.dtype)
    h, dgate, dup, again = (room[:, i * columns : (i + 1) * columns] for i in range(4))
    gated_activation_triton(gate, up, kind, h, config)
    gated_activation_backward_triton(
        dh, gate, up, kind, None if gate is None else dgate, dup, again if with_h else None, config
    )
    beside = room[:, 4 * columns :]
    own = verdicts or Verdicts()
    own.equal(beside, torch.full_like(beside, torch.nan), "wrote beside the results")
    if verdicts is None:
        own.settle()
    results = {"h": h, "dup": dup} | ({} if gate is None else {"dgate": dgate}) | ({"again h": again} if with_h else {})
    return {name: value.clone() for name, value in results.items()}


def _plain(dh: Tensor, gate: Tensor | None, up: Tensor, kind: str) -> dict[str, Tensor]:
    leaves = {"dup": up.detach().clone().requires_grad_()}
    if gate is not None:
        leaves["dgate"] = gate.detach().clone().requires_grad_()
    with torch.enable_grad():
        h = gated_activation_reference(leaves.get("dgate"), leaves["dup"], kind)
        gradients = torch.autograd.grad(h, list(leaves.values()), dh)
    return {"h": h.detach(), **dict(zip(leaves, gradients, strict=True))}
