"""Any group of projections against fp64: exactly where nothing is rounded, within the budget elsewhere.

Small whole numbers: every sum of products is exact in fp32, whatever its order, so that one wrong term shows at any
size. Normal numbers: rounding in every dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpeft_kernels.lora import Dtypes, LoraProjection, lora_linear_group
from fastpeft_kernels.lora.reference import lora_group_reference
from tests.budget import assert_within_budget
from tests.kernels.lora.drawn import (
    LAYOUTS,
    LEADING_SIZES,
    MANY_TOKENS,
    RANKS,
    Numbers,
    Projection,
    laid_out,
    normal,
    projections,
    whole,
)
from tests.kernels.lora.groups import parameters, seeds_for, widened

pytestmark = pytest.mark.usefixtures("nan_filled")
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
ALL64, ALL32 = Dtypes(F64, F64, F64), Dtypes(F32, F32, F32)
DTYPES = (
    *(Dtypes(dtype, dtype, dtype) for dtype in (F32, BF16, F16)),
    *(Dtypes(BF16, F32, BF16), Dtypes(F16, F32, F16), Dtypes(BF16, BF16, F32), Dtypes(F32, BF16, F32)),
)
LOW_RANKS = st.integers(1, 8)
"""Two adapters' together at most the inputs. Products of more, added to a frozen product of fewer inputs as they are
made, round at the size of the sum: up to 3 times PyTorch's error, which adds them when they are done."""


@dataclass(frozen=True)
class Group:
    lead: tuple[int, ...]
    features: int
    parts: list[Projection]
    used: list[bool]  # outputs with a gradient
    x_trained: bool
    mixed: bool  # each token has its own adapter, or none
    layouts: tuple[str, str]  # of x and of the outputs' gradients
    seed: int


def groups(
    ranks: st.SearchStrategy[int] = RANKS,
    sizes: tuple[int, int] = (1, 48),
    lead: st.SearchStrategy[tuple[int, ...]] = LEADING_SIZES,
    part: Callable[..., st.SearchStrategy[Projection]] = projections,
) -> st.SearchStrategy[Group]:
    size = st.integers(*sizes)
    return st.builds(
        Group,
        lead=lead,
        features=size,
        parts=st.lists(part(size, ranks), min_size=1, max_size=3),
        used=st.lists(st.booleans(), min_size=3, max_size=3),
        x_trained=st.booleans(),
        mixed=st.sampled_from([False, False, True]) if part is projections else st.just(False),
        layouts=LAYOUTS,
        seed=st.integers(0, 2**31),
    )


def results(
    function: object, x: Tensor, group: list[LoraProjection], dys: list[Tensor | None]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs; gradients of x and of every parameter that wants one, from the outputs that have a gradient."""
    outputs = list(function(x))  # type: ignore[operator]
    wanted = [x] * x.requires_grad + parameters(group)
    given = [(y, dy.to(y.dtype)) for y, dy in zip(outputs, dys, strict=True) if dy is not None and y.requires_grad]
    if not given or not wanted:
        return outputs, [None] * len(wanted)
    ys, gradients = zip(*given, strict=True)
    return outputs, list(torch.autograd.grad(ys, wanted, gradients, allow_unused=True))


Triple = tuple[Tensor | None, Tensor | None, Tensor | None]


def triples(case: Group, numbers: Numbers, dtypes: Dtypes, **options: object) -> list[Triple]:
    """(ours, PyTorch's in the same dtypes, the oracle's) of every result; nothing given was written into."""
    parts = [part.without_lora_bias() for part in case.parts] if case.mixed else case.parts
    index = torch.randint(-1, 2, case.lead[:1]).tolist() if case.mixed and case.lead else None
    wide_x = dtypes.out == F32
    x = laid_out(numbers(*case.lead, case.features).to(F32 if wide_x else dtypes.compute), case.layouts[0])
    x = x.detach().requires_grad_(case.x_trained)
    lora = F32 if dtypes.lora == F32 else dtypes.compute
    group = [part.make(case.features, numbers, dtypes.compute, lora) for part in parts]
    dys = [
        laid_out(numbers(*case.lead, part.out_features).to(dtypes.out), case.layouts[1]) if used else None
        for part, used in zip(case.parts, case.used, strict=False)
    ]
    before = [None if t is None else t.detach().clone() for t in (x, *dys)]
    seeds = seeds_for(group)
    named = {"compute_dtype": dtypes.compute, "lora_dtype": dtypes.lora, "out_dtype": dtypes.out, "seeds": seeds}
    options["adapter_index"] = index
    ours = results(lambda x: lora_linear_group(x, group, **named, **options), x, group, dys)
    assert all(t is None or torch.equal(t, kept) for t, kept in zip((x, *dys), before, strict=True) if kept is not None)
    same = results(lambda x: lora_group_reference(x, group, dtypes, seeds, index), x, group, dys)
    wide, x64 = [widened(p) for p in group], x.detach().double().requires_grad_(case.x_trained)
    exact = results(lambda x: lora_group_reference(x, wide, ALL64, seeds, index), x64, wide, dys)
    return list(zip(ours[0] + ours[1], same[0] + same[1], exact[0] + exact[1], strict=True))


def check_exactly(case: Group, **options: object) -> None:
    torch.manual_seed(case.seed)
    for i, (ours, _, exact) in enumerate(triples(case, whole, ALL32, **options)):
        assert (ours is None) == (exact is None), i
        assert ours is None or exact is None or torch.equal(ours.double(), exact), (i, ours, exact)


def check_within_budget(case: Group, dtypes: Dtypes, repeats: int = 3) -> None:
    """Of independent numbers, not where one row stands for all; the errors of `repeats` draws are measured together."""
    torch.manual_seed(case.seed)
    case = replace(case, layouts=("plain", "plain"))
    repeated = [triples(case, normal, dtypes) for _ in range(repeats)]
    for i, triple in enumerate(zip(*repeated, strict=True)):
        assert len({tensor is None for draw in triple for tensor in draw}) == 1, i
        if triple[0][0] is not None:
            assert_within_budget(*(torch.stack(each) for each in zip(*triple, strict=True)), name=f"result {i}")


@settings(max_examples=60)
@given(case=groups())
def test_whole_numbers_exactly(case: Group) -> None:
    check_exactly(case)


@settings(max_examples=25)
@given(case=groups(LOW_RANKS, (16, 48), MANY_TOKENS), dtypes=st.sampled_from(DTYPES))
def test_within_the_budget(case: Group, dtypes: Dtypes) -> None:
    check_within_budget(case, dtypes)


@settings(max_examples=15)
@given(case=groups(st.integers(1, 12)))
def test_autocast_asks_for_its_dtype_throughout(case: Group) -> None:
    """Whatever dtypes x and adapters have, bit for bit as if it had been asked for by name."""
    found = []
    for named in (False, True):
        torch.manual_seed(case.seed)
        group = [part.make(case.features, normal, F32, F32) for part in case.parts]
        x = normal(*case.lead, case.features).requires_grad_(case.x_trained)
        dys: list[Tensor | None] = [normal(*case.lead, part.out_features) for part in case.parts]
        dtypes = {"compute_dtype": BF16, "lora_dtype": BF16} if named else {}
        with torch.autocast("cpu", BF16, enabled=not named):
            outputs, gradients = results(
                lambda x, group=group, dtypes=dtypes: lora_linear_group(x, group, seeds=seeds_for(group), **dtypes),
                *(x, group, dys),
            )
        found.append([*outputs, *gradients])
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))


@pytest.mark.interpreter
@settings(max_examples=12)
@given(case=groups(st.integers(1, 20), (1, 24)))
def test_triton_on_whole_numbers_exactly(case: Group) -> None:
    pytest.importorskip("triton")
    check_exactly(case, backend="triton")


@pytest.mark.full
@settings(max_examples=3000)
@given(case=groups())
def test_many_on_whole_numbers(case: Group) -> None:
    check_exactly(case)


@pytest.mark.full
@settings(max_examples=100)
@given(case=groups(LOW_RANKS, (16, 48), MANY_TOKENS), dtypes=st.sampled_from(DTYPES))
def test_many_within_the_budget(case: Group, dtypes: Dtypes) -> None:
    check_within_budget(case, dtypes, repeats=20)


@pytest.mark.full
@pytest.mark.interpreter
@settings(max_examples=200)
@given(case=groups(st.integers(1, 40), (1, 40)))
def test_many_by_triton(case: Group) -> None:
    pytest.importorskip("triton")
    check_exactly(case, backend="triton")
