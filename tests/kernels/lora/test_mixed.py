"""Batches whose rows have adapters of their own, in each way that rows are put together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastpeft_kernels.lora import Dtypes, LoraProjection, lora_linear_group
from fastpeft_kernels.lora.mixed_rows import row_groups
from fastpeft_kernels.lora.projection import Group
from fastpeft_kernels.lora.reference import lora_group_reference
from tests.kernels.allocations import largest
from tests.kernels.lora.groups import adapter, check_group, parameters, projection

pytestmark = pytest.mark.usefixtures("nan_filled")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
WAYS = {
    "as they lie": ([0, 0, -1, -1, 2, 2], 3),
    "each row alone": ([2, 0, -1, 0, 2, 2], 9),
    "rows taken by adapter": ([2, 0, -1, 0, 2, 2], 1),
}


def siblings(dtype: torch.dtype = F32, lora_dtype: torch.dtype | None = None, **fields: float) -> list[LoraProjection]:
    """Adapters 0, 1 and 2 of differing ranks, of which the second projection lacks 0, and the third has none."""
    group = [projection(24, 40, 4, 3, 6, dtype=dtype, lora_dtype=lora_dtype, bias=True, scaling=2.0, **fields)]
    group += [projection(24, 16, 5, 5, dtype=dtype, lora_dtype=lora_dtype), projection(24, 8, dtype=dtype)]
    offsets = (0, 1, 0)
    return [
        replace(p, adapters=tuple(replace(a, index=i + offset) for i, a in enumerate(p.adapters)))
        for p, offset in zip(group, offsets, strict=True)
    ]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtypes", [Dtypes(F32, F32, F32), Dtypes(BF16, BF16, BF16), Dtypes(BF16, F32, BF16)])
def test_within_the_budget(way: str, dtypes: Dtypes) -> None:
    index, each = WAYS[way]
    group = siblings(dtypes.compute, dtypes.lora)
    check_group(torch.randn(6, each, 24).to(dtypes.compute).requires_grad_(), group, dtypes, adapter_index=index)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chances", [(0.5, 0.5, 0.5), (0.5, 0.0, 0.25)])
def test_each_row_has_its_adapter_s_dropout(way: str, chances: tuple[float, ...]) -> None:
    index, each = WAYS[way]
    group = siblings()
    dropping = tuple(replace(a, dropout=p) for a, p in zip(group[0].adapters, chances, strict=True))
    group[0] = replace(group[0], adapters=dropping)
    check_group(torch.randn(6, each, 24).requires_grad_(), group, Dtypes(F32, F32, F32), adapter_index=index)


@pytest.mark.parametrize("dtypes", [Dtypes(F32, F32, F32), Dtypes(BF16, BF16, BF16), Dtypes(F16, F32, F16)])
@pytest.mark.parametrize("tensors", ["", "0", "012"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_each_adapter_has_its_scaling(dtypes: Dtypes, tensors: str, p: float) -> None:
    """Numbers, some of them tensors; 1 / 3 has no exact value in any of the dtypes."""
    index, each = WAYS["each row alone"]
    group = [
        replace(
            one,
            adapters=tuple(
                replace(a, scaling=torch.tensor(value) if str(a.index) in tensors else value, dropout=p)
                for a, value in zip(one.adapters, scalings, strict=False)
            ),
        )
        for one, scalings in zip(siblings(dtypes.compute), ((1 / 3, 2.0, 0.0), (-7.1, 1 / 3), ()), strict=True)
    ]
    check_group(torch.randn(6, each, 24).to(dtypes.compute).requires_grad_(), group, dtypes, adapter_index=index)


def test_an_infinite_scaling_spoils_its_own_rows_alone() -> None:
    group = [replace(p, adapters=tuple(replace(a, scaling=float("inf")) for a in p.adapters)) for p in siblings()]
    for y in lora_linear_group(torch.randn(6, 3, 24), group, adapter_index=[2, 2, -1, -1, 5, 2])[:2]:
        assert y[2:5].isfinite().all()
        assert not y[[0, 1, 5]].isfinite().any()


def test_scalings_have_the_width_of_wide_parameters() -> None:
    group = siblings(torch.float64)
    group = [replace(p, adapters=tuple(replace(a, scaling=1 / (3 + a.index)) for a in p.adapters)) for p in group]
    x, dtypes, index = torch.randn(6, 3, 24, dtype=torch.float64), Dtypes(*[torch.float64] * 3), [2, 0, -1, 0, 2, 2]
    ys = lora_linear_group(x, group, adapter_index=index)
    expected = lora_group_reference(x, group, dtypes, [None] * 3, tuple(index))
    for y, other in zip(ys, expected, strict=True):
        assert (y - other).abs().max() <= 1e-13 * other.abs().max()


def test_parameters_of_two_dtypes_get_gradients_of_their_own() -> None:
    group = [projection(24, 40, 4, 4)]
    first, second = group[0].adapters
    half = replace(first, a=first.a.detach().to(BF16).requires_grad_(), b=first.b.detach().to(BF16).requires_grad_())
    group = [replace(group[0], adapters=(half, replace(second, index=1)))]
    check_group(torch.randn(4, 3, 24).requires_grad_(), group, Dtypes(F32, F32, F32), adapter_index=[0, 1, 0, 1])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_adapter_that_is_not_finite_spoils_its_own_rows_alone(way: str, value: float) -> None:
    index, each = WAYS[way]
    group, x = siblings(), torch.randn(6, each, 24).requires_grad_()

    def run() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        ys = lora_linear_group(x, group, adapter_index=index)
        return list(ys), list(torch.autograd.grad(sum(y.square().sum() for y in ys), [x, *parameters(group)]))

    ys, (dx, *expected) = run()
    with torch.no_grad():
        for p in group:
            for spoilt in p.adapters:
                if spoilt.index == 2:
                    spoilt.a.fill_(value)
                    spoilt.b.fill_(value)
    spoilt_ys, (spoilt_dx, *found) = run()
    others = [i for i, number in enumerate(index) if number != 2]
    own = [i for i, number in enumerate(index) if number == 2]
    for before, after in zip([*ys[:2], dx], [*spoilt_ys[:2], spoilt_dx], strict=True):
        assert torch.equal(after[others], before[others])
        assert not after[own].isfinite().any()
    numbers = [a.index for p in group for a in p.adapters for _ in ("a", "b")]
    for number, before, after in zip(numbers, expected, found, strict=True):
        assert number == 2 or torch.equal(after, before)
        assert number != 2 or not after.isfinite().any()


def test_an_adapter_that_no_row_has_gets_zeros() -> None:
    group, x = siblings(), torch.randn(6, 3, 24)
    ys = lora_linear_group(x, group, adapter_index=[0, 2, -1, 0, 2, 2])
    unused = [t for p in group for a in p.adapters if a.index == 1 for t in (a.a, a.b)]
    for gradient in torch.autograd.grad([ys[0].sum(), ys[1].sum()], unused):
        assert not gradient.any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_no_matrix_of_the_weight_s_size_is_made(way: str, p: float) -> None:
    """Over dense bases, of which nothing is decoded; three adapters, two siblings."""
    index, each = WAYS[way]
    group = [projection(512, out, 4, 3, 6, dropout=p) for out in (2048, 1024)]
    group = [replace(g, adapters=tuple(replace(a, index=i) for i, a in enumerate(g.adapters))) for g in group]
    x = torch.randn(6, each, 512, requires_grad=True)

    def step() -> None:
        sum(y.sum() for y in lora_linear_group(x, group, adapter_index=index)).backward()

    assert 0 < largest(step) <= 1024 * 512 * 4 // 2


def test_rows_are_put_together_so_that_least_is_copied() -> None:
    def of(index: tuple[int, ...], each: int) -> tuple[int, bool, bool]:
        group = Group([LoraProjection(projection(8, 8).weight, None, (adapter(4, 8, 8),))], None, [None], "auto", index)
        found = row_groups(group, len(index) * each)
        return found.count, found.taken is not None, found.slots is not None

    assert of((3, 3, 0, 0), 1) == (2, False, False)
    assert of((0, 1, 2, 3), 1) == (4, False, False)
    assert of((0, 1, 0, 1), 4) == (4, False, True)
    assert of((0, 1, 0, 1), 3) == (2, True, False)
    assert of((0, 0, 0, 0, 0, 0, 1, 2), 2) == (8, False, True)  # 3 groups of 6 rows each would be 18


def test_a_step_over_a_batch_of_no_rows() -> None:
    group = siblings()
    x = torch.randn(0, 5, 24).requires_grad_()
    check_group(x, group, Dtypes(F32, F32, F32), adapter_index=[])
