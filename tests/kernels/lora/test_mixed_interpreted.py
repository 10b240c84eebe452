"""Mixed batches by the Triton kernels in Triton's interpreter, within the error budget."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastpeft_kernels.lora import Dtypes
from fastpeft_kernels.lora.mixed_rows import RowSlots
from tests.budget import assert_within_budget
from tests.kernels.lora.groups import check_group, parameters, projection
from tests.kernels.lora.test_mixed import WAYS, siblings
from tests.kernels.lora.test_triton_interpreted import SEED, check, configs, dropped, matrix

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("nan_filled")]
pytest.importorskip("triton")

F32, F16 = torch.float32, torch.float16
full = pytest.mark.full
every_dtype = pytest.mark.parametrize("dtype", (pytest.param(F32, marks=full), F16), ids=("fp32", "fp16"))
drops_or_not = pytest.mark.parametrize("p", (pytest.param(0.0, marks=full), 0.4), ids=("", "dropout"))
ROWS = RowSlots((7, 3, 3, 7), 23)  # no tile divides what lies together: a row, two, and a row
TOKENS, FEATURES, RANK = 4 * 23, 37, 20


def by_row(t: Tensor, stack: Tensor) -> Tensor:
    """Each row's tokens by the matrix of its slot: what all of these kernels compute but for sums over tokens."""
    owners = tuple(dict.fromkeys(ROWS.index))
    slots = [owners.index(number) for number in ROWS.index]
    return torch.cat([part @ stack[slot] for part, slot in zip(t.split(ROWS.each), slots, strict=True)])


def by_slot(t: Tensor, u: Tensor) -> Tensor:
    """t^T u over the tokens of each slot."""
    parts = zip(t.split(ROWS.each), u.split(ROWS.each), ROWS.index, strict=True)
    sums = {number: torch.zeros(t.shape[1], u.shape[1], dtype=t.dtype) for number in ROWS.index}
    for one, other, number in parts:
        sums[number] = sums[number] + one.t() @ other
    return torch.stack(list(sums.values()))


@every_dtype
@drops_or_not
def test_down_in_every_configuration(dtype: torch.dtype, p: float) -> None:
    from fastpeft_kernels.lora.forward import lora_down

    x, a = matrix(TOKENS, FEATURES, dtype), torch.randn(2, RANK, FEATURES).to(dtype)
    for config in configs("DOWN"):
        room = torch.full((TOKENS, RANK + 2), torch.nan, dtype=dtype)
        s = lora_down(x, a, seed=SEED, p=p, stream=2, out=room[:, 1:-1], rows=ROWS, config=config)
        check(s, lambda x, a: by_row(dropped(x, p, x.dtype), a.mT), x, a)
        assert room[:, [0, -1]].isnan().all()


@every_dtype
@drops_or_not
def test_update_in_every_configuration(dtype: torch.dtype, p: float) -> None:
    """Y = S B^T + bias of a stack that is turned, and dX += dS A."""
    from fastpeft_kernels.lora.backward import lora_down_bwd_input_

    s, b, bias = matrix(TOKENS, RANK, dtype), torch.randn(2, FEATURES, RANK).to(dtype), torch.randn(FEATURES).to(dtype)
    before = matrix(TOKENS, FEATURES, dtype)
    for config in configs("INPUT"):
        out = torch.full((TOKENS, FEATURES), torch.nan, dtype=dtype)
        lora_down_bwd_input_(out, s, b.mT, rows=ROWS, bias=bias, accumulate=False, config=config)
        check(out, lambda s, b, bias: by_row(s, b.mT) + bias, s, b, bias)
        mask = {"seed": SEED, "p": p, "stream": 2}
        dx = lora_down_bwd_input_(before.clone(), s, b.mT.contiguous(), rows=ROWS, config=config, **mask)
        check(dx, lambda s, b, dx: dx + dropped(by_row(s, b.mT), p, s.dtype), s, b, before)


@every_dtype
@drops_or_not
def test_weight_gradient_in_every_configuration(dtype: torch.dtype, p: float) -> None:
    from fastpeft_kernels.lora.backward import lora_down_bwd_weight

    x, ds = matrix(TOKENS, FEATURES, dtype), matrix(TOKENS, RANK, dtype)
    for config in configs("WEIGHT"):
        da = lora_down_bwd_weight(x, ds, seed=SEED, p=p, stream=2, rows=ROWS, config=config)
        check(da, lambda x, ds: by_slot(ds, dropped(x, p, x.dtype)), x.float(), ds.float())
    options = {"seed": SEED, "p": p, "stream": 2, "config": config}
    turned = lora_down_bwd_weight(x, ds, rows=ROWS, features_first=True, **options)
    assert torch.equal(turned.mT, da)


def test_up_backward_in_every_configuration() -> None:
    from fastpeft_kernels.lora.backward import lora_up_bwd

    dy, b, s = matrix(TOKENS, FEATURES, F16), torch.randn(2, FEATURES, 11).to(F16), matrix(TOKENS, 11, F16)
    for config in configs("UP"):
        ds = torch.full((TOKENS, 16), torch.nan, dtype=F16)[:, 2:13]
        db = lora_up_bwd(dy, b, s, ds, rows=ROWS, config=config)
        check(ds, by_row, dy, b)
        check(db, by_slot, dy.float(), s.float())
        turned = torch.full((TOKENS, 11), torch.nan, dtype=F16)
        lora_up_bwd(dy, b.mT.contiguous().mT, s, turned, rows=ROWS, config=config)
        assert torch.equal(turned, ds)


@given(index=st.lists(st.integers(-1, 3), max_size=7), each=st.integers(0, 70), times=st.integers(1, 5))
def test_blocks_and_splits_hold_each_token_once(index: list[int], each: int, times: int) -> None:
    cpu, block_m = torch.device("cpu"), 16
    rows, owners = RowSlots(tuple(index), each), list(dict.fromkeys(index))
    splits, starts = rows.splits(times * block_m, block_m, cpu)
    for table, most in ((rows.blocks(block_m, cpu), block_m), (splits, (times + times // 2) * block_m)):
        held = []
        for first, end, slot in table.tolist():
            assert 0 < end - first <= most and {index[token // each] for token in range(first, end)} == {owners[slot]}
            held += range(first, end)
        assert sorted(held) == list(range(len(index) * each))
    slots = [slot for slot, (first, last) in enumerate(pairwise(starts.tolist())) for _ in range(first, last)]
    assert slots == [slot for _, _, slot in splits.tolist()] and len(starts) == len(owners) + 1


@every_dtype
@pytest.mark.parametrize("way", [pytest.param("as they lie", marks=full), "each row alone"])
@pytest.mark.parametrize("chances", [(0.0,) * 3, pytest.param((0.5,) * 3, marks=full), (0.5, 0.0, 0.25)], ids=str)
def test_siblings(way: str, chances: tuple[float, ...], dtype: torch.dtype) -> None:
    """Adapters of differing ranks, rows without one, a projection without any."""
    index, each = WAYS[way][0], 3
    group = siblings(dtype)
    drops = tuple(replace(a, dropout=p) for a, p in zip(group[0].adapters, chances, strict=True))
    group[0] = replace(group[0], adapters=drops)
    x = torch.randn(6, each, 24).to(dtype).requires_grad_()
    check_group(x, group, Dtypes(dtype, dtype, dtype), adapter_index=index, backend="triton")


@full
@pytest.mark.parametrize("dtypes", [Dtypes(F16, F32, F16), Dtypes(F16, F16, F32), Dtypes(F32, F16, F32)], ids=str)
def test_mixed_dtypes(dtypes: Dtypes) -> None:
    x = torch.randn(6, 5, 24).to(F32 if dtypes.out == F32 else dtypes.compute).requires_grad_()
    check_group(x, siblings(dtypes.compute, F32), dtypes, adapter_index=WAYS["each row alone"][0], backend="triton")


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (3,), (1, 1), (5, 2, 3)], ids=str)
def test_small_and_empty_batches(shape: tuple[int, ...]) -> None:
    group = siblings()
    x = torch.randn(*shape, 24).requires_grad_()
    index = [2, 0, 2, -1, 0][: shape[0]]
    check_group(x, group, Dtypes(F32, F32, F32), adapter_index=index, backend="triton")


def test_an_adapter_that_is_not_finite_spoils_its_own_rows_alone() -> None:
    from fastpeft_kernels.lora import lora_linear_group

    index, group, x = [2, 0, -1, 0, 2], siblings(), torch.randn(5, 3, 24).requires_grad_()
    with torch.no_grad():
        for spoilt in (a for p in group for a in p.adapters if a.index == 2):
            spoilt.a.fill_(torch.nan)
    ys = lora_linear_group(x, group, adapter_index=index, backend="triton")
    dx, *found = torch.autograd.grad(sum(y.sum() for y in ys), [x, *parameters(group)])
    for t in (*ys[:2], dx):
        assert t[1:4].isfinite().all() and not t[[0, 4]].isfinite().any()
    numbers = [a.index for p in group for a in p.adapters for _ in ("a", "b")]
    assert all(gradient.isfinite().all() for number, gradient in zip(numbers, found, strict=True) if number != 2)


def test_no_batched_product_is_left_and_the_same_result_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpeft_kernels.lora import lora_linear_group

    def never(*args: object, **options: object) -> None:
        raise AssertionError("the library was taken")

    for name in ("bmm", "baddbmm"):
        monkeypatch.setattr(torch, name, never)
    group, x, runs = siblings(), torch.randn(6, 3, 24).requires_grad_(), []
    for _ in range(2):
        ys = lora_linear_group(x, group, adapter_index=[2, 0, -1, 0, 2, 2], backend="triton")
        runs.append([*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), [x, *parameters(group)])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_products_of_one_adapter_for_every_row_are_those_without_a_mixed_batch() -> None:
    """On whole numbers nothing is rounded."""
    from fastpeft_kernels.lora import lora_linear_group

    group = [projection(24, 16, 20)]
    with torch.no_grad():
        for t in (group[0].weight.weight, *parameters(group)):
            t.copy_(torch.randint(-3, 4, t.shape))
    x = torch.randint(-3, 4, (4, 9, 24)).float().requires_grad_()
    found = []
    for index in (None, [0, 0, 0, 0]):
        y = lora_linear_group(x, group, adapter_index=index, backend="triton")[0]
        found.append([y, *torch.autograd.grad(y.sum(), [x, *parameters(group)])])
    for one, other in zip(*found, strict=True):
        assert_within_budget(one, other, other.double())
