"""Any MLP against fp64: in fp64 itself, where a wrong term shows and rounding does not; within the budget elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpeft_kernels.activation import KINDS
from fastpeft_kernels.lora import Dtypes
from fastpeft_kernels.mlp import Mlp, lora_mlp
from fastpeft_kernels.mlp.reference import lora_mlp_reference
from tests.budget import assert_within_budget
from tests.kernels.lora.drawn import (
    LAYOUTS,
    LEADING_SIZES,
    MANY_TOKENS,
    Numbers,
    Projection,
    laid_out,
    normal,
    projections,
)
from tests.kernels.lora.groups import parameters
from tests.kernels.mlp.mlps import seeds_of, wide

pytestmark = pytest.mark.usefixtures("nan_filled")
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
ALL64 = Dtypes(F64, F64, F64)
DTYPES = (*(Dtypes(dtype, dtype, dtype) for dtype in (F32, BF16, F16)), Dtypes(BF16, F32, BF16), Dtypes(F16, F32, F16))


@dataclass(frozen=True)
class Drawn:
    lead: tuple[int, ...]
    sizes: tuple[int, int, int]  # inputs, features, outputs
    inner: list[Projection]
    joined: bool  # one projection gives gate and up
    down: Projection
    activation: str
    x_trained: bool
    layouts: tuple[str, str]
    keep: str
    dropout: float
    seed: int


def mlps(least: int = 1, lead: st.SearchStrategy[tuple[int, ...]] = LEADING_SIZES) -> st.SearchStrategy[Drawn]:
    """MLPs of sizes from `least` on. Of each projection they are the MLP's, whatever was drawn for it."""
    part = projections(st.just(0), st.integers(1, 12))
    return st.builds(
        Drawn,
        lead=lead,
        sizes=st.tuples(st.integers(least, 33), st.integers(least, 40), st.integers(least, 33)),
        inner=st.lists(part, min_size=1, max_size=2),
        joined=st.booleans(),
        down=part,
        activation=st.sampled_from(KINDS),
        x_trained=st.booleans(),
        layouts=LAYOUTS,
        keep=st.sampled_from(["preactivations", "input"]),
        dropout=st.sampled_from([0.0, 0.3]),
        seed=st.integers(0, 2**31),
    )


def make(case: Drawn, numbers: Numbers, dtypes: Dtypes) -> Mlp:
    inputs, features, outputs = case.sizes
    lora = F32 if dtypes.lora == F32 else dtypes.compute

    def part(drawn: Projection, size: int, features: int):
        sized = Projection(size, drawn.storage, drawn.bias, drawn.adapters)
        return sized.make(features, numbers, dtypes.compute, lora)

    width = 2 * features if case.joined and len(case.inner) == 1 else features
    return Mlp(
        tuple(part(drawn, width, inputs) for drawn in case.inner),
        part(case.down, outputs, features),
        case.activation,
        dropout=case.dropout,
    )


def results(function: Callable[[Tensor], Tensor], x: Tensor, m: Mlp, dy: Tensor) -> list[Tensor | None]:
    """The output; gradients of x and of every parameter that wants one."""
    y = function(x)
    wanted = [x] * x.requires_grad + parameters(list(m.projections))
    return [y, *torch.autograd.grad(y, wanted, dy.to(y.dtype))] if wanted else [y]


def triples(case: Drawn, numbers: Numbers, dtypes: Dtypes) -> list[tuple[Tensor | None, ...]]:
    """(ours, PyTorch's in the same dtypes, the oracle's) of every result; nothing given was written into."""
    m = make(case, numbers, dtypes)
    x = laid_out(numbers(*case.lead, case.sizes[0]).to(dtypes.compute), case.layouts[0])
    x = x.detach().requires_grad_(case.x_trained)
    dy = laid_out(numbers(*case.lead, case.sizes[2]).to(dtypes.out), case.layouts[1])
    before, seeds = (x.detach().clone(), dy.clone()), seeds_of(m)
    named = {"compute_dtype": dtypes.compute, "lora_dtype": dtypes.lora, "out_dtype": dtypes.out, "seeds": seeds}
    ours = results(lambda x: lora_mlp(x, m, keep=case.keep, **named), x, m, dy)
    assert torch.equal(before[0], x) and torch.equal(before[1], dy)
    same = results(lambda x: lora_mlp_reference(x, m, dtypes, seeds), x, m, dy)
    m64, x64 = wide(m), x.detach().double().requires_grad_(case.x_trained)
    exact = results(lambda x: lora_mlp_reference(x, m64, ALL64, seeds), x64, m64, dy)
    return list(zip(ours, same, exact, strict=True))


def check_in_fp64(case: Drawn) -> None:
    torch.manual_seed(case.seed)
    for ours, _, exact in triples(case, normal, ALL64):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


def check_within_budget(case: Drawn, dtypes: Dtypes, repeats: int = 3) -> None:
    """Of independent numbers, not where one row stands for all; the errors of `repeats` draws are measured together."""
    torch.manual_seed(case.seed)
    case = replace(case, layouts=("plain", "plain"))
    repeated = [triples(case, normal, dtypes) for _ in range(repeats)]
    for i, triple in enumerate(zip(*repeated, strict=True)):
        assert_within_budget(*(torch.stack(each) for each in zip(*triple, strict=True)), name=f"result {i}")


@settings(max_examples=30)
@given(case=mlps())
def test_in_fp64(case: Drawn) -> None:
    check_in_fp64(case)


@settings(max_examples=20)
@given(case=mlps(12, MANY_TOKENS), dtypes=st.sampled_from(DTYPES))
def test_within_the_budget(case: Drawn, dtypes: Dtypes) -> None:
    check_within_budget(case, dtypes)


@pytest.mark.full
@settings(max_examples=1500)
@given(case=mlps())
def test_many_in_fp64(case: Drawn) -> None:
    check_in_fp64(case)


@pytest.mark.full
@settings(max_examples=100)
@given(case=mlps(12, MANY_TOKENS), dtypes=st.sampled_from(DTYPES))
def test_many_within_the_budget(case: Drawn, dtypes: Dtypes) -> None:
    check_within_budget(case, dtypes, repeats=20)
