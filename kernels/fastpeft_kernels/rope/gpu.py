"""Checks that need a CUDA GPU: the kernel for rotary embeddings within its budget, in any layout and of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..common.device import holds_huge_tensors
from ..common.gpu_verdicts import Verdicts
from .api import DTYPES, run_rotary
from .reference import rotary_reference
from .rotation import ANGLES, LAYOUTS, Rotation

_DEVICE = torch.device("cuda")
# batch, heads of q and of k, tokens, dim, turned: usual; odd numbers; part of a head; small; keys of one head.
_SHAPES = ((2, 32, 8, 100, 128, 128), (3, 17, 5, 33, 96, 96), (1, 8, 8, 65, 80, 32), (2, 3, 1, 7, 6, 2))
_ODD = _SHAPES[1]
"""In every combination of dtypes, the others in bf16: each takes kernels of its own."""


def checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named checks. Each returns figures, or raises AssertionError."""
    for layout in LAYOUTS:
        yield f"correct {layout}", partial(_check, layout)
    yield "any strides, one of the two gradients", _check_strides
    yield "queries alone", _check_alone
    yield "the same in a CUDA graph", _check_graph
    if holds_huge_tensors():
        yield "more than 2**31 elements", _check_many


def _check(layout: str) -> dict[str, Any]:
    verdicts = Verdicts()
    for shape, dtype, table, angles in product(_SHAPES, DTYPES, (None, torch.float32), ANGLES):
        if shape != _ODD and (dtype != torch.bfloat16 or table):
            continue
        q, k, cos, sin, dq, dk = _inputs(shape, dtype, table or dtype, angles)
        rotation = Rotation(layout, angles, torch.promote_types(dtype, table or dtype))
        ours, twice = (_step(partial(run_rotary, backend="triton"), q, k, cos, sin, rotation, dq, dk) for _ in range(2))
        same = _step(rotary_reference, q, k, cos, sin, rotation, dq, dk)
        wide = rotation._replace(out=torch.float64)
        exact = _step(rotary_reference, q.double(), k.double(), cos.double(), sin.double(), wide, dq, dk)
        for name, a, b, c, d in zip(("q", "k", "dq", "dk"), ours, same, exact, twice, strict=True):
            what = f"{name}, {shape} {layout} {angles} {dtype} {table}"
            verdicts.within(a, b, c, what)
            verdicts.equal(d, a, f"{what}: not the same twice")
    return {"largest_share_of_budget": verdicts.settle()}


def _check_strides() -> dict[str, Any]:
    verdicts = Verdicts()
    whole = torch.randn((2, 40, 12, 3 * 64), device=_DEVICE).bfloat16()  # batch, tokens, heads, q k v
    views = (
        (whole[..., :64].transpose(1, 2), whole[:, :, :4, 64:128].transpose(1, 2)),
        (whole[..., :64].transpose(1, 2).contiguous(), whole[..., ::3].transpose(1, 2)),
        (
            whole[:, :1, :, :64].expand(-1, 40, -1, -1).transpose(1, 2),
            whole[:1, ..., :64].expand(2, -1, -1, -1).transpose(1, 2),
        ),
    )
    for q, k in views:
        _compare_dense(verdicts, q, k)
    verdicts.settle()
    return {}


def _check_alone() -> dict[str, Any]:
    verdicts = Verdicts()
    for layout in LAYOUTS:
        q, _, cos, sin, dq, _ = _inputs((2, 17, 1, 33, 96, 96), torch.bfloat16, torch.bfloat16, "half")
        rotation = Rotation(layout, "half", torch.bfloat16)
        found = []
        for k in (None, q):
            leaf = q.detach().requires_grad_()
            y = run_rotary(leaf, k, cos, sin, rotation, "triton")[0]
            found.append((y.detach(), *torch.autograd.grad(y, [leaf], [dq])))
        for alone, beside in zip(*found, strict=True):
            verdicts.equal(alone, beside, layout)
    verdicts.settle()
    return {}


def _compare_dense(verdicts: Verdicts, q: Tensor, k: Tensor) -> None:
    """The same bits as of contiguous copies, and as one gradient alone."""
    cos, sin = (torch.randn((1, 40, 64), device=_DEVICE).bfloat16() for _ in range(2))
    rotation = Rotation("halved", "each", torch.bfloat16)
    dq, dk = (torch.randn(x.shape, device=_DEVICE).bfloat16() for x in (q, k))
    what = f"strides {q.stride()}, {k.stride()}"
    ours = _step(partial(run_rotary, backend="triton"), q, k, cos, sin, rotation, dq, dk)
    dense = _step(partial(run_rotary, backend="triton"), q.contiguous(), k.contiguous(), cos, sin, rotation, dq, dk)
    for a, b in zip(ours, dense, strict=True):
        verdicts.equal(a.contiguous(), b.contiguous(), what)
    leaf = q.detach().requires_grad_()
    (alone,) = torch.autograd.grad(run_rotary(leaf, k, cos, sin, rotation, "triton")[0], [leaf], [dq])
    verdicts.equal(alone.contiguous(), dense[2].contiguous(), f"{what}, gradient of q alone")
    leaf = k.detach().requires_grad_()
    (alone,) = torch.autograd.grad(run_rotary(q, leaf, cos, sin, rotation, "triton")[1], [leaf], [dk])
    verdicts.equal(alone.contiguous(), dense[3].contiguous(), f"{what}, gradient of k alone")


def _check_graph() -> dict[str, Any]:
    q, k, cos, sin, _, _ = _inputs((1, 8, 2, 64, 64, 64), torch.bfloat16, torch.bfloat16)
    rotation = Rotation("halved", "each", torch.bfloat16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run_rotary(q, k, cos, sin, rotation, "triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_rotary(q, k, cos, sin, rotation, "triton")
    q.normal_()
    graph.replay()
    verdicts = Verdicts()
    for replayed, called in zip(captured, run_rotary(q, k, cos, sin, rotation, "triton"), strict=True):
        verdicts.equal(replayed, called, "replayed")
    verdicts.settle()
    return {}


def _check_many() -> dict[str, Any]:
    tokens = 2**31 // (32 * 128) + 70
    q = torch.randn((1, tokens, 32, 128), dtype=torch.bfloat16, device=_DEVICE).transpose(1, 2)
    k = torch.randn((1, tokens, 1, 128), dtype=torch.bfloat16, device=_DEVICE).transpose(1, 2)
    cos, sin = (torch.randn((1, tokens, 128), dtype=torch.bfloat16, device=_DEVICE) for _ in range(2))
    rotation = Rotation("halved", "each", torch.bfloat16)
    whole = run_rotary(q, k, cos, sin, rotation, "triton")
    middle = 2**31 // (32 * 128)
    for part in (slice(0, 64), slice(middle - 32, middle + 32), slice(tokens - 5, tokens)):
        tables = (cos[:, part], sin[:, part])
        want = run_rotary(q[:, :, part], k[:, :, part], *tables, rotation, "triton")
        assert all(torch.equal(a[:, :, part], b) for a, b in zip(whole, want, strict=True)), f"tokens {part}"
    return {"elements": q.numel()}


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, table: torch.dtype, angles: str = "each") -> list[Tensor]:
    """q, k, cos, sin and the gradients; q and k as a model's projections lie."""
    batch, q_heads, k_heads, tokens, dim, turned = shape
    made = []
    for heads in (q_heads, k_heads):
        made.append(torch.randn((batch, tokens, heads, dim), device=_DEVICE).to(dtype).transpose(1, 2))
    features = turned // 2 if angles == "half" else turned
    cos, sin = (torch.randn((batch, tokens, features), device=_DEVICE).to(table) for _ in range(2))
    out = torch.promote_types(dtype, table)
    return [*made, cos, sin, *(torch.randn(x.shape, device=_DEVICE).to(out) for x in made)]


def _step(
    compute: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation, dq: Tensor, dk: Tensor
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    outs = compute(*leaves, cos, sin, rotation)
    grads = torch.autograd.grad(outs, leaves, [d.to(out.dtype) for d, out in zip((dq, dk), outs, strict=True)])
    return [*(out.detach() for out in outs), *grads]
