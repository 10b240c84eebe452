"""Checks that need a CUDA GPU: groups by C++ (`direct`), whose backward runs in autograd's threads there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.gpu_verdicts import Verdicts
from ..native.extension import group_extension
from . import direct
from .gpu_graph import change, check_replay
from .gpu_support import (
    BF16,
    DEVICE,
    F16,
    F32,
    F64,
    derive,
    dtype_name,
    make_projection,
    mixed_rows,
    rand,
    reference,
    reference_device,
    same_dtypes,
    with_numbers,
    worse,
)
from .projection import Dtypes, Group, LoraProjection

_SHAPES = ((64, 512), (77, 96), (37, 200))
"""Tokens and features."""
_NOT_HERE = {"skipped": "the C++ for groups could not be built here"}


def direct_checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named checks. Each returns figures, or raises AssertionError."""
    for base in ("dense", "nf4"):
        for dtypes in (same_dtypes(BF16), Dtypes(BF16, F32, BF16), same_dtypes(F16), same_dtypes(F32)):
            names = "/".join(map(dtype_name, (dtypes.compute, dtypes.lora)))
            for mixed in (False, True):
                yield f"{'mixed ' * mixed}group by C++ {names} {base}", partial(_check_group, dtypes, base, mixed)
        for mixed in (False, True):
            yield f"CUDA graph of a {'mixed ' * mixed}group by C++ {base}", partial(_check_graph, base, mixed)
    yield "group by C++: what backward refuses, retained graphs, outputs without gradients", _check_states


def by_cpp(
    x: Tensor,
    projections: Sequence[LoraProjection],
    dtypes: Dtypes,
    seeds: Sequence[Tensor | None],
    adapter_index: tuple[int, ...] | None = None,
) -> tuple[Tensor, ...]:
    """Whether or not it would be chosen for this size."""
    group = Group(projections, dtypes, seeds, adapter_index=adapter_index)
    return direct.apply(x, group, direct.fits(x, group) or direct.ALL)


def _siblings(features: int, dtypes: Dtypes, base: str, mixed: bool = False) -> list[LoraProjection]:
    """With one adapter each or, where the batch is mixed, two."""
    return [
        with_numbers(make_projection(features, 640, (16, 8)[: 1 + mixed], dtypes, base, 0.0, bias=True)),
        make_projection(features, 128, (), dtypes, base, 0.0),
        with_numbers(make_projection(features, 192, (40, 16)[: 1 + mixed], dtypes, base, 0.0)),
    ]


def _check_group(dtypes: Dtypes, base: str, mixed: bool) -> dict[str, Any]:
    if group_extension(wait=True) is None:
        return _NOT_HERE
    verdicts, chosen = Verdicts(), 0
    for tokens, features in _SHAPES:
        lead = (8, tokens // 8) if mixed and tokens % 8 == 0 else (tokens,)
        x = rand(*lead, features, dtype=dtypes.compute).requires_grad_()
        projections, index = _siblings(features, dtypes, base, mixed), mixed_rows(lead[0]) if mixed else None
        seeds, group = [None] * 3, Group(projections, dtypes, [None] * 3, adapter_index=index)
        chosen += direct.fits(x, group) is not None
        dys = [rand(*lead, projection.weight.shape[0], dtype=dtypes.out) for projection in projections]
        run = partial(by_cpp, adapter_index=index)
        ours, again = (derive(run, x, projections, dtypes, seeds, dys) for _ in range(2))
        for a, b in zip(ours, again, strict=True):
            verdicts.equal(b, a, "another result the second time")
        same = reference(x, group, dys, dtypes, reference_device(dtypes))
        exact = reference(x, group, dys, same_dtypes(F64), DEVICE, F64)
        if mixed and dtypes.lora == F32:  # sums of each adapter's rows, by batched products
            there = reference(x, group, dys, dtypes, torch.device("cpu"))
            same = [worse(*each) for each in zip(same, there, exact, strict=True)]
        for i, triple in enumerate(zip(ours, same, exact, strict=True)):
            verdicts.within(*triple, f"result {i} of {tokens} tokens")
    return {"share_of_budget": verdicts.settle(), "sizes_for_which_it_is_chosen": chosen}


def _check_graph(base: str, mixed: bool) -> dict[str, Any]:
    if group_extension(wait=True) is None:
        return _NOT_HERE
    dtypes = same_dtypes(BF16)
    x, projections = rand(8, 8, 512, dtype=BF16).requires_grad_(), _siblings(512, dtypes, base, mixed)
    dys = [rand(8, 8, projection.weight.shape[0], dtype=BF16) for projection in projections]
    seeds, run = [None] * 3, partial(by_cpp, adapter_index=mixed_rows(8) if mixed else None)
    check_replay(
        lambda: derive(run, x, projections, dtypes, seeds, dys),
        lambda: change(x, projections, seeds),
    )
    return {}


def _check_states() -> dict[str, Any]:
    if group_extension(wait=True) is None:
        return _NOT_HERE
    dtypes, seeds = same_dtypes(BF16), [None] * 3
    for base in ("dense", "nf4"):
        x, projections = rand(16, 512, dtype=BF16).requires_grad_(), _siblings(512, dtypes, base)
        loss = torch.stack([y.float().sum() for y in by_cpp(x, projections, dtypes, seeds)]).sum()
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        (second,) = torch.autograd.grad(loss, x)
        assert torch.equal(first, second), f"{base}: a retained graph gives another gradient"
        lone = by_cpp(x, projections, dtypes, seeds)[0]
        wanted = [adapter.b for projection in projections for adapter in projection.adapters]
        db, without = torch.autograd.grad(lone.float().sum(), wanted, allow_unused=True)
        assert db.isfinite().all() and without is None, f"{base}: an output without gradient"
        loss = by_cpp(x, projections, dtypes, seeds)[0].float().sum()
        projections[0].weight.flatten()[0][0].add_(1)
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            assert "changed or moved between forward and backward" in str(error), error
        else:
            raise AssertionError(f"{base}: a changed weight was not noticed")
    torch.cuda.synchronize()
    return {}
