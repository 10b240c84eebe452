"""The Triton kernel in Triton's interpreter."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.rope import ANGLES, LAYOUTS, rotary
from fastpeft_kernels.rope.reference import rotary_reference
from fastpeft_kernels.rope.rotation import Rotation
from tests.budget import assert_within_budget

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("nan_filled")]

# batch, heads of q and of k, tokens, dim, turned: more heads than a program takes; odd; a part; the smallest.
SHAPES = ((2, 17, 2, 3, 8, 8), (1, 3, 1, 2, 12, 6), (2, 2, 2, 2, 10, 4), (1, 1, 1, 1, 2, 2))
DTYPES = ((torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32))


def steps(compute: Any, given: list[Tensor], dys: list[Tensor]) -> list[Tensor]:
    """Results and gradients of q and k; given: q, k, cos, sin."""
    q, k, cos, sin = given
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    outs = compute(*leaves, cos, sin)
    grads = torch.autograd.grad(outs, leaves, [d.to(y.dtype) for d, y in zip(dys, outs, strict=True)])
    return [*(y.detach() for y in outs), *grads]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("angles", ANGLES)
def test_within_budget(layout: str, angles: str) -> None:
    kernel = partial(rotary, layout=layout, angles=angles, backend="triton")
    for (batch, q_heads, k_heads, tokens, dim, turned), (dtype, table) in product(SHAPES, DTYPES):
        wider = [torch.randn(batch, tokens, heads, dim + 3).to(dtype) for heads in (q_heads, k_heads)]
        q, k = (x[..., 3:].transpose(1, 2) for x in wider)
        before = q.clone()
        features = turned // 2 if angles == "half" else turned
        cos, sin = (torch.randn(batch if dim > 8 else 1, tokens, features).to(table) for _ in range(2))
        rotation = Rotation(layout, angles, torch.promote_types(dtype, table))
        dys = [torch.randn(x.shape).to(rotation.out) for x in (q, k)]
        ours = steps(kernel, [q, k, cos, sin], dys)
        same = steps(partial(rotary_reference, rotation=rotation), [q, k, cos, sin], dys)
        exact = steps(
            partial(rotary_reference, rotation=rotation._replace(out=torch.float64)),
            [t.double() for t in (q, k, cos, sin)],
            dys,
        )
        for name, *three in zip(("q", "k", "dq", "dk"), ours, same, exact, strict=True):
            assert_within_budget(*three, name)
        assert torch.equal(q, before)
        assert [y.stride() for y in ours[:2]] == [torch.empty_like(x).stride() for x in (q, k)]


def test_other_strides_and_one_gradient() -> None:
    cos, sin = (torch.randn(1, 5, 4) for _ in range(2))
    q, k = torch.randn(2, 5, 4, 6).permute(0, 3, 1, 2), torch.randn(2, 5, 1, 4).expand(2, 5, 3, 4).transpose(1, 2)
    rotation = Rotation("halved", "each", torch.float32)
    torch.testing.assert_close(rotary(q, k, cos, sin, backend="triton"), rotary_reference(q, k, cos, sin, rotation))
    for which in (0, 1):
        leaf = (q, k)[which].clone().requires_grad_()
        given = [leaf if i == which else x for i, x in enumerate((q, k))]
        outs = rotary(*given, cos, sin, backend="triton")
        assert [y.requires_grad for y in outs] == [i == which for i in (0, 1)]
        got, want = (
            torch.autograd.grad(f(*given)[which].square().sum(), leaf)[0]
            for f in (
                lambda q, k: rotary(q, k, cos, sin, backend="triton"),
                lambda q, k: rotary_reference(q, k, cos, sin, rotation),
            )
        )
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_queries_alone(layout: str) -> None:
    q, cos, sin = torch.randn(2, 3, 5, 8), torch.randn(1, 5, 3), torch.randn(1, 5, 3)
    leaf, both = q.clone().requires_grad_(), q.clone().requires_grad_()
    turn = partial(rotary, cos=cos, sin=sin, layout=layout, angles="half", backend="triton")
    y, none = turn(leaf, None)
    want = turn(both, q)[0]
    assert none is None and torch.equal(y, want)
    dy = torch.randn(y.shape)
    assert torch.equal(torch.autograd.grad(y, leaf, dy)[0], torch.autograd.grad(want, both, dy)[0])


def test_empty() -> None:
    cos = torch.zeros(1, 0, 4)
    q, k = rotary(torch.zeros(2, 3, 0, 4), torch.zeros(2, 1, 0, 4), cos, cos, backend="triton")
    assert q.shape == (2, 3, 0, 4) and k.shape == (2, 1, 0, 4)
    cos = torch.randn(1, 5, 4)
    q, k = rotary(torch.zeros(2, 0, 5, 4), torch.ones(2, 1, 5, 4), cos, cos, backend="triton")
    assert q.shape == (2, 0, 5, 4) and k.isfinite().all()
