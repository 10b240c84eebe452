"""Checks that need a CUDA GPU: the kernels where each row of a batch reads a matrix of its own, against fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.random import draw_seed
from .configs import DOWN, INPUT, UP, WEIGHT, Config
from .gpu_support import BF16, F16, F32, F64, MASK, dropped, dtype_name, mixed_rows, product_in_fp32, rand, within
from .mixed_rows import RowSlots, owners_of

# Tokens of a row, features, rank: all aligned; nothing aligned; nearly nothing.
_SHAPES = ((256, 1536, 64), (77, 1001, 19), (1, 5, 1))
_INDEX = mixed_rows(9)


def mixed_checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named checks. Each returns figures, or raises AssertionError."""
    for dtype in (BF16, F16):
        for name, check, choices in (
            ("down", _check_down, DOWN),
            ("update", _check_update, INPUT),
            ("up backward", _check_up, UP),
            ("weight gradient", _check_weight, WEIGHT),
        ):
            for config in choices:
                yield f"mixed batch, {name} {dtype_name(dtype)} {config.label}", partial(check, dtype, config)


def _slots() -> list[int]:
    return [owners_of(_INDEX).index(number) for number in _INDEX]


def _by_row(t: Tensor, stack: Tensor) -> Tensor:
    """Each row's tokens by the matrix of its slot."""
    return torch.cat([part @ stack[slot] for part, slot in zip(t.chunk(len(_INDEX)), _slots(), strict=True)])


def _by_slot(t: Tensor, u: Tensor) -> Tensor:
    """t^T u over the tokens of each slot, of 16-bit operands in fp32."""
    parts = zip(t.chunk(len(_INDEX)), u.chunk(len(_INDEX)), _slots(), strict=True)
    sums: list[Tensor | None] = [None] * len(owners_of(_INDEX))
    for one, other, slot in parts:
        product = one.t() @ other if one.dtype == F64 else product_in_fp32(one.t(), other)
        before = sums[slot]
        sums[slot] = product if before is None else before + product
    return torch.stack([each for each in sums if each is not None])


def _operands(each: int, features: int, rank: int, dtype: torch.dtype) -> tuple[RowSlots, Tensor, Tensor, Tensor]:
    """(rows, a matrix (tokens, features), a stack (slots, features, rank), a matrix (tokens, rank))."""
    tokens, slots = each * len(_INDEX), len(owners_of(_INDEX))
    wide, narrow = rand(tokens, features, dtype=dtype), rand(tokens, rank, dtype=dtype)
    return RowSlots(_INDEX, each), wide, rand(slots, features, rank, dtype=dtype), narrow


def _check_down(dtype: torch.dtype, config: Config) -> dict[str, Any]:
    from .forward import lora_down

    worst, seed = 0.0, draw_seed(torch.device("cuda"))
    for shape in _SHAPES:
        rows, x, stack, room = _operands(*shape, dtype)
        for mask in ({}, {"seed": seed, **MASK}):
            s = lora_down(x, stack.mT, out=torch.full_like(room, torch.nan), rows=rows, config=config, **mask)
            same, exact = (_by_row(dropped(x.to(d), mask), stack.to(d)) for d in (dtype, F64))
            worst = max(worst, within(s, same, exact, f"S of {shape} {bool(mask)}"))
    return {"share_of_budget": worst}


def _check_update(dtype: torch.dtype, config: Config) -> dict[str, Any]:
    from .backward import lora_down_bwd_input_

    worst, seed = 0.0, draw_seed(torch.device("cuda"))
    for shape in _SHAPES:
        rows, before, stack, s = _operands(*shape, dtype)
        bias = rand(shape[1], dtype=dtype)
        y = torch.full_like(before, torch.nan)
        lora_down_bwd_input_(y, s, stack.mT, rows=rows, bias=bias, accumulate=False, config=config)
        same, exact = (_by_row(s.to(d), stack.to(d).mT) + bias.to(d) for d in (dtype, F64))
        worst = max(worst, within(y, same, exact, f"Y of {shape}"))
        for mask in ({}, {"seed": seed, **MASK}):
            dx = lora_down_bwd_input_(before.clone(), s, stack.mT.contiguous(), rows=rows, config=config, **mask)
            same, exact = (before.to(d) + dropped(_by_row(s.to(d), stack.to(d).mT), mask) for d in (dtype, F64))
            worst = max(worst, within(dx, same, exact, f"dX of {shape} {bool(mask)}"))
    return {"share_of_budget": worst}


def _check_up(dtype: torch.dtype, config: Config) -> dict[str, Any]:
    from .backward import lora_up_bwd

    worst = 0.0
    for each, features, rank in _SHAPES:
        rows, dy, stack, s = _operands(each, features, min(rank, config.block_r), dtype)
        ds = torch.full_like(s, torch.nan)
        db = lora_up_bwd(dy, stack, s, ds, rows=rows, config=config)
        same, exact = (_by_row(dy.to(d), stack.to(d)) for d in (dtype, F64))
        worst = max(worst, within(ds, same, exact, f"dS of {each, features, rank}"))
        worst = max(worst, within(db, _by_slot(dy, s), _by_slot(dy.double(), s.double()), f"dB of {each, features}"))
        assert torch.equal(db, lora_up_bwd(dy, stack, s, ds, rows=rows, config=config)), "another result"
    return {"share_of_budget": worst}


def _check_weight(dtype: torch.dtype, config: Config) -> dict[str, Any]:
    from .backward import lora_down_bwd_weight

    worst, seed = 0.0, draw_seed(torch.device("cuda"))
    for shape in _SHAPES:
        rows, x, _, ds = _operands(*shape, dtype)
        for mask in ({}, {"seed": seed, **MASK}):
            da = lora_down_bwd_weight(x, ds, rows=rows, config=config, **mask)
            same, exact = _by_slot(ds, dropped(x, mask)), _by_slot(ds.double(), dropped(x.double(), mask))
            worst = max(worst, within(da, same, exact, f"dA of {shape} {bool(mask)}"))
            assert torch.equal(da, lora_down_bwd_weight(x, ds, rows=rows, config=config, **mask)), "another result"
    assert da.dtype == F32
    return {"share_of_budget": worst}
