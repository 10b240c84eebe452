"""Checks that need a CUDA GPU: every kernel, configuration and dtype, and whole groups, against fp64.

The kernels are called below the gate of `backends.triton_refusal`: whether dropout may run on a Hopper with an old
assembler is decided by what is found here. Needs neither peft nor bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..common.device import holds_huge_tensors
from ..common.gpu_verdicts import Verdicts
from ..common.random import draw_seed, dropout_bits, keep_threshold
from ..tuning.choosing import forced
from . import packing, parts
from .api import run_group
from .backends import triton_refusal
from .configs import DOWN, INPUT, LINEAR, UP, WEIGHT, Config, linear_tiles
from .gpu_graph import graph_checks
from .gpu_mixed import mixed_checks
from .gpu_support import (
    BF16,
    CHOICES,
    DEVICE,
    F16,
    F32,
    F64,
    MASK,
    capability,
    derive,
    dropped,
    dtype_name,
    make_projection,
    mixed_rows,
    product_in_fp32,
    rand,
    reference,
    reference_device,
    same_dtypes,
    within,
    worse,
)
from .projection import Dtypes, Group

Check = tuple[str, Callable[[], dict[str, Any]]]
_DTYPES = (BF16, F16, F32)
# Tokens, features in, features out, rank: all aligned; nothing aligned; nearly nothing.
_SHAPES = ((1024, 1536, 1280, 64), (333, 1001, 777, 19), (3, 5, 7, 1))
_ALIGNED = (1024, 1528, 1288, 24)  # aligned rows that no tile divides: what descriptors must get right
_MANY_TILES = (4100, 264, 4104, 24)  # several for each program that takes one after the other
_GROUP_SHAPES = ((512, 768), (77, 96))  # tokens, features in
_MANY = 2**31


def checks() -> Iterator[Check]:
    """Named checks. Each returns figures, or raises AssertionError."""
    for dtype in _DTYPES:
        yield f"dropout {dtype_name(dtype)}", partial(_check_dropout, dtype)
    for dtype in _DTYPES:
        yield f"packing {dtype_name(dtype)}", partial(_check_packing, dtype)
    for name, check, dtype, config in _kernel_checks():
        yield f"{name} {dtype_name(dtype)} {config.label}", partial(check, dtype, config)
    if holds_huge_tensors():
        yield "more than 2**31 elements: dropout and down", _check_many_down
        yield "more than 2**31 elements: weight and input gradients", _check_many_backward
        yield "more than 2**31 elements: linear", _check_many_linear
    for backend in (*CHOICES, "triton"):
        for dtypes in (same_dtypes(BF16), same_dtypes(F16), Dtypes(BF16, F32, BF16), same_dtypes(F32)):
            if dtypes.lora == F32 and backend != "library":  # ours compute in 16 bits only
                continue
            for p in (0.0, 0.25):
                for base in ("dense", "nf4"):
                    name = f"{backend} {'/'.join(map(dtype_name, (dtypes.compute, dtypes.lora)))} {base} {p=}"
                    yield f"group {name}", partial(_check_group, backend, dtypes, base, p)
                    yield f"group with DoRA {name}", partial(_check_group, backend, dtypes, base, p, dora=True)
                    yield f"mixed group {name}", partial(_check_group, backend, dtypes, base, p, mixed=True)
    yield from mixed_checks()
    yield from graph_checks()


def _kernel_checks() -> Iterator[tuple[str, Callable[..., dict[str, Any]], torch.dtype, Config]]:
    """(name, check, dtype, config)."""
    for dtype in (BF16, F16):
        for name, check, choices in (
            ("down", _check_down, DOWN),
            ("linear", _check_linear, LINEAR),
            ("linear, descriptors", _check_linear, _descriptor_tiles()),
            ("up backward", _check_up, UP),
            ("weight gradient", _check_weight, WEIGHT),
            ("input gradient", _check_input, INPUT),
        ):
            for config in choices:
                if not (name == "linear" and config.block_n > 128 and capability() not in (80, 90, 100)):
                    yield name, check, dtype, config


def _descriptor_tiles() -> list[Config]:
    return [config for config in linear_tiles(DEVICE).values() if config.tma]


def _masks(seed: Tensor) -> tuple[dict[str, Any], ...]:
    return {}, {"seed": seed, **MASK}


def _check_packing(dtype: torch.dtype) -> dict[str, Any]:
    """The same bits as PyTorch's casts and products; five adapters take two launches."""
    group = [
        make_projection(96, out, ranks, same_dtypes(F32), "dense", 0.0)
        for out, ranks in ((77, (16, 1)), (40, (3, 8, 5)))
    ]
    ours, theirs = packing.pack(group, dtype), parts.pack(group, dtype)
    assert ours.a is not None and theirs.a is not None and torch.equal(ours.a, theirs.a), "A differs"
    for i, (mine, other) in enumerate(zip(ours.b, theirs.b, strict=True)):
        assert mine is not None and other is not None and torch.equal(mine, other), f"B of projection {i} differs"
    return {}


def _check_dropout(dtype: torch.dtype) -> dict[str, Any]:
    from ..common.triton_random import dropout_triton

    for tokens, features, _, _ in _SHAPES:
        x, seed = rand(tokens, features, dtype=dtype), draw_seed(DEVICE)
        x[0, 0], x[-1, -1] = torch.inf, torch.nan
        for view in (x, x.t(), x[:, ::2], x[:0]):
            keep = dropout_bits(seed, 0, view.shape[0], view.shape[1], 3) >= keep_threshold(0.3)
            want = torch.where(keep, view * (1.0 / 0.7), 0.0)
            got = dropout_triton(view, seed, **MASK)
            assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)), f"{tuple(view.shape)} {view.stride()}"
    return {}


def _check_down(dtype: torch.dtype, config: Config) -> dict[str, Any]:
    from .forward import lora_down

    worst = 0.0
    for tokens, features, _, rank in _SHAPES:
        x, a, seed = rand(tokens, features, dtype=dtype), rand(rank, features, dtype=dtype), draw_seed(DEVICE)
        room = torch.full((tokens, rank + 3), torch.nan, dtype=dtype, device=DEVICE)
        for mask in _masks(seed):
            for rows in (x,) if mask else (x, x.t().contiguous().t()):  # each layout is another compilation
                s = lora_down(rows, a, out=room[:, 1:-2], config=config, **mask)
                same, exact = (dropped(x.to(d), mask) @ a.to(d).t() for d in (dtype, F64))
                worst = max(worst, within(s, same, exact, f"S of {tokens, features, rank} {bool(mask)}"))
        assert room[:, 0].isnan().all() and room[:, -2:].isnan().all(), "wrote beside the result"
    return {"share_of_budget": worst}


def _check_linear(dtype: torch.dtype, config: Config) -> dict[str, Any]:
    from .forward import lora_linear

    worst = 0.0
    for tokens, features, out_features, rank in (_SHAPES[0], _ALIGNED) if config.tma else _SHAPES:
        x, w = rand(tokens, features, dtype=dtype), rand(out_features, features, dtype=dtype)
        s, b = rand(tokens, rank, dtype=dtype), rand(out_features, rank, dtype=dtype)
        bias, before = rand(out_features, dtype=dtype), rand(tokens, out_features, dtype=dtype)
        for wide in (None, F32) if not config.tma else (None,):
            out = torch.full((tokens, out_features), torch.nan, dtype=wide or dtype, device=DEVICE)
            y = lora_linear(x, w, s, b, bias, out=out, config=config)
            same = (x @ w.t() + bias).addmm(s, b.t()).to(out.dtype)
            exact = x.double() @ w.double().t() + bias.double() + s.double() @ b.double().t()
            worst = max(worst, within(y, same, exact, f"Y of {tokens, features, out_features, rank} {wide}"))
        turned = w.t().contiguous().t(), s, b.t().contiguous().t()
        y = lora_linear(x, *turned, out=before.clone(), accumulate=True, config=config)
        same = before.addmm(x, w.t()).addmm(s, b.t())
        exact = before.double() + x.double() @ w.double().t() + s.double() @ b.double().t()
        worst = max(worst, within(y, same, exact, f"Y + ... of {tokens, features, out_features, rank}"))
        worst = max(worst, within(lora_linear(x, w, config=config), x @ w.t(), x.double() @ w.double().t(), "X W^T"))
    if config.tma and dtype == BF16:
        worst = max(worst, _check_descriptors(config))
    return {"share_of_budget": worst}


def _check_descriptors(config: Config) -> float:
    """What is other code of the kernel's: W and B in every order, and dX in fp32. The first two are what is timed."""
    from .forward import lora_linear

    worst, (tokens, features, out_features, rank) = 0.0, _MANY_TILES
    x, w = rand(tokens, features, dtype=BF16), rand(out_features, features, dtype=BF16)
    s, b, before = rand(tokens, rank, dtype=BF16), rand(out_features, rank, dtype=BF16), rand(tokens, out_features)
    turned_w, turned_b = w.t().contiguous().t(), b.t().contiguous().t()
    same = (x @ w.t()).addmm(s, b.t())
    exact = x.double() @ w.double().t() + s.double() @ b.double().t()
    for weights in ((w, b), (turned_w, turned_b), (w, turned_b), (turned_w, b)):
        y = lora_linear(x, weights[0], s, weights[1], config=config)
        worst = max(worst, within(y, same, exact, f"Y, strides {[t.stride() for t in weights]}"))
    y = lora_linear(x, turned_w, s, turned_b, out=before.clone(), accumulate=True, config=config)
    worst = max(worst, within(y, before + same, before.double() + exact, "Y + ... in fp32"))
    more = [(rand(tokens, n, dtype=BF16), rand(n, out_features, dtype=BF16).t()) for n in (1000, 72)]
    y = lora_linear(x, turned_w, s, turned_b, more=more, config=config)
    for x, w in more:
        same, exact = same.addmm(x, w.t()), exact + x.double() @ w.double().t()
    return max(worst, within(y, same, exact, "the sum of three products"))


def _check_up(dtype: torch.dtype, config: Config) -> dict[str, Any]:
    from .backward import lora_up_bwd

    worst = 0.0
    for tokens, _, out_features, rank in _SHAPES:
        rank = min(rank, config.block_r)
        dy, b = rand(tokens, out_features, dtype=dtype), rand(out_features, rank, dtype=dtype)
        s = rand(tokens, rank, dtype=dtype)
        ds = torch.full((tokens, rank), torch.nan, dtype=dtype, device=DEVICE)
        db = lora_up_bwd(dy, b, s, ds, config=config)
        worst = max(worst, within(ds, dy @ b, dy.double() @ b.double(), f"dS of {tokens, out_features, rank}"))
        same, exact = product_in_fp32(dy.t(), s), dy.double().t() @ s.double()
        worst = max(worst, within(db.sum(0), same, exact, f"dB of {tokens, out_features, rank}"))
        assert torch.equal(db, lora_up_bwd(dy, b, s, ds, config=config)), "another result the second time"
    return {"share_of_budget": worst}


def _check_weight(dtype: torch.dtype, config: Config) -> dict[str, Any]:
    from .backward import lora_down_bwd_weight

    worst = 0.0
    for tokens, features, _, rank in _SHAPES:
        x, ds, seed = rand(tokens, features, dtype=dtype), rand(tokens, rank, dtype=dtype), draw_seed(DEVICE)
        for mask in _masks(seed):
            da = lora_down_bwd_weight(x, ds, config=config, **mask)
            same = product_in_fp32(ds.t(), dropped(x, mask))
            exact = ds.double().t() @ dropped(x.double(), mask)
            worst = max(worst, within(da.sum(0), same, exact, f"dA of {tokens, features, rank} {bool(mask)}"))
            turned = lora_down_bwd_weight(x, ds, config=config, features_first=not mask, **mask)
            assert torch.equal(turned if mask else turned.transpose(1, 2), da), "another result the second time"
    return {"share_of_budget": worst}


def _check_input(dtype: torch.dtype, config: Config) -> dict[str, Any]:
    from .backward import lora_down_bwd_input_

    worst = 0.0
    for tokens, features, _, rank in _SHAPES:
        ds, a, seed = rand(tokens, rank, dtype=dtype), rand(rank, features, dtype=dtype), draw_seed(DEVICE)
        for wide, mask in product((dtype, F32) if dtype == BF16 else (dtype,), _masks(seed)):
            before = rand(tokens, features, dtype=wide)
            dx = lora_down_bwd_input_(before.clone(), ds, a, config=config, **mask)
            same, exact = (before.to(d) + dropped(ds.to(e) @ a.to(e), mask) for d, e in ((wide, dtype), (F64, F64)))
            worst = max(worst, within(dx, same, exact, f"dX of {tokens, features, rank} {wide} {bool(mask)}"))
    return {"share_of_budget": worst}


def _check_many_down() -> dict[str, Any]:
    from ..common.triton_random import dropout_triton
    from .forward import lora_down

    columns, seed = 4096, draw_seed(DEVICE)
    rows = _MANY // columns + 300
    x, a = torch.randn((rows, columns), dtype=BF16, device=DEVICE), rand(16, columns, dtype=BF16)
    y = dropout_triton(x, seed, **MASK)
    plain, masked = lora_down(x, a), lora_down(x, a, seed=seed, **MASK)
    for first in (0, _MANY // columns - 150, rows - 300):
        part = slice(first, first + 300)
        keep = dropout_bits(seed, first, 300, columns, 3) >= keep_threshold(0.3)
        assert torch.equal(y[part], torch.where(keep, x[part] * (1 / 0.7), 0.0)), f"dropout, rows from {first}"
        within(plain[part], x[part] @ a.t(), x[part].double() @ a.double().t(), f"S, rows from {first}")
        same, exact = (torch.where(keep, x[part].to(d), 0.0) * (1 / 0.7) @ a.to(d).t() for d in (BF16, F64))
        within(masked[part], same, exact, f"S with dropout, rows from {first}")
    return {"elements": x.numel()}


def _check_many_backward() -> dict[str, Any]:
    from .backward import lora_down_bwd_input_, lora_down_bwd_weight

    columns, seed, chunk = 4096, draw_seed(DEVICE), 1 << 14
    rows = _MANY // columns + 300
    x, ds = torch.randn((rows, columns), dtype=BF16, device=DEVICE), rand(rows, 16, dtype=BF16)
    a = rand(16, columns, dtype=BF16)
    same, exact = (torch.zeros((16, columns), dtype=d, device=DEVICE) for d in (F32, F64))
    for first in range(0, rows, chunk):
        part = slice(first, min(first + chunk, rows))
        keep = dropout_bits(seed, first, part.stop - first, columns, 3) >= keep_threshold(0.3)
        values = torch.where(keep, x[part], 0.0)
        same += product_in_fp32(ds[part].t(), values * (1 / 0.7))
        exact += ds[part].double().t() @ values.double() / 0.7
    within(lora_down_bwd_weight(x, ds, seed=seed, **MASK).sum(0), same, exact, "dA")
    before = {first: x[first : first + 300].clone() for first in (0, _MANY // columns - 150, rows - 300)}
    lora_down_bwd_input_(x, ds, a, seed=seed, **MASK)
    for first, old in before.items():
        keep = dropout_bits(seed, first, 300, columns, 3) >= keep_threshold(0.3)
        part = slice(first, first + 300)
        plain, wide = (old.to(d) + torch.where(keep, ds[part].to(d) @ a.to(d), 0.0) * (1 / 0.7) for d in (BF16, F64))
        within(x[part], plain, wide, f"dX, rows from {first}")
    return {"elements": x.numel()}


def _check_many_linear() -> dict[str, Any]:
    from .forward import lora_linear

    columns = 4096
    rows = _MANY // columns + 300
    x, w = rand(rows, 64, dtype=BF16), rand(columns, 64, dtype=BF16)
    s, b = rand(rows, 16, dtype=BF16), rand(columns, 16, dtype=BF16)
    one_of_a_kind = {config.persistent: config for config in _descriptor_tiles()}
    for config in (LINEAR[0], *one_of_a_kind.values()):
        y = lora_linear(x, w, s, b, config=config)
        for first in (0, _MANY // columns - 150, rows - 300):
            part = slice(first, first + 300)
            exact = x[part].double() @ w.double().t() + s[part].double() @ b.double().t()
            same = (x[part] @ w.t()).addmm(s[part], b.t())
            within(y[part], same, exact, f"Y, rows from {first}, {config}")
        del y
    return {"elements": rows * columns}


def _check_group(
    backend: str, dtypes: Dtypes, base: str, p: float, dora: bool = False, mixed: bool = False
) -> dict[str, Any]:
    """Three siblings, one with two adapters, one bare: outputs, dX and each parameter's gradient, twice.

    Args:
        dora: with a fourth that has a magnitude.
        mixed: a row's adapter is the first, the second or none, for rows of many tokens and of one.
    """
    verdicts = Verdicts()
    for tokens, features in _GROUP_SHAPES:
        lead = (8, tokens // 8) if mixed and tokens % 8 == 0 else (tokens,)
        x = rand(*lead, features, dtype=dtypes.compute).requires_grad_()
        group = [
            make_projection(features, 640, (16,), dtypes, base, p, bias=True),
            make_projection(features, 192, (8, 40), dtypes, base, p),
            make_projection(features, 128, (), dtypes, base, p),
        ]
        if dora:
            group.append(make_projection(features, 384, (16,), dtypes, base, p, bias=True, magnitude=True))
        index = mixed_rows(lead[0]) if mixed else None
        seeds = [draw_seed(DEVICE) if p and projection.adapters else None for projection in group]
        dys = [rand(*lead, projection.weight.shape[0], dtype=dtypes.out) for projection in group]
        run = partial(run_group, backend="triton" if backend == "triton" else "auto", adapter_index=index)
        whole = Group(group, dtypes, seeds, adapter_index=index)
        if backend == "triton" and (reason := triton_refusal(x, whole)):
            return {"skipped": reason}
        with forced(CHOICES.get(backend, {})):
            ours, again = (derive(run, x, group, dtypes, seeds, dys) for _ in range(2))
        for a, b in zip(ours, again, strict=True):
            verdicts.equal(b, a, "another result the second time")
        same = reference(x, whole, dys, dtypes, reference_device(dtypes))
        exact = reference(x, whole, dys, same_dtypes(F64), DEVICE, F64)
        if mixed and dtypes.lora == F32:  # sums of each adapter's rows, by batched products
            there = reference(x, whole, dys, dtypes, torch.device("cpu"))
            same = [worse(*each) for each in zip(same, there, exact, strict=True)]
        for i, triple in enumerate(zip(ours, same, exact, strict=True)):
            verdicts.within(*triple, f"result {i} of {tokens} tokens")
    return {"share_of_budget": verdicts.settle()}
