"""C++ and PyTorch on CPU: within the budget, for every kind and layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastpeft_kernels.activation import KINDS, gated_activation, gated_activation_backward
from fastpeft_kernels.native import native_library

from .conftest import Case, comparable, make_case, special_case

pytestmark = pytest.mark.usefixtures("nan_filled")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# More than one block and piece of the C++; odd; less than a vector; one; none.
SHAPES = ((3, 4099), (37, 301), (5, 3), (1, 1), (0, 8), (8, 0))

every_backend = pytest.mark.parametrize("backend", ("native", "torch"), indirect=True)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def check(case: Case, backend: str) -> None:
    case.hold(h=gated_activation(case.gate, case.up, case.kind, backend=backend))
    for with_h in (True, False):
        h, dgate, dup = case.results()
        again = h if with_h else None
        gated_activation_backward(
            case.dh, case.gate, case.up, case.kind, dgate=dgate, dup=dup, h=again, backend=backend
        )
        case.hold(dgate=dgate, dup=dup, h=again)
        if h._base is not None:
            assert h._base[:, case.up.shape[1] :].isnan().all(), "wrote beside h"


@every_backend
@every_kind
@every_dtype
@pytest.mark.parametrize("gated", (True, False), ids=("gated", "ungated"))
def test_within_budget(backend: str, kind: str, dtype: torch.dtype, gated: bool) -> None:
    for rows, columns in SHAPES:
        check(make_case(kind, rows, columns, dtype, gated), backend)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_fp64_takes_pytorch(dtype: torch.dtype) -> None:
    check(make_case("gelu", 4, 33, dtype), "torch" if dtype == torch.float64 else "auto")


@given(
    st.sampled_from(KINDS), st.sampled_from(DTYPES), st.booleans(), st.integers(1, 9), st.integers(1, 700),
    st.integers(-12, 12), st.sampled_from((0.01, 1.0, 4.0)),
)  # fmt: skip
def test_any_shape_and_region(
    kind: str, dtype: torch.dtype, gated: bool, rows: int, columns: int, centre: int, spread: float
) -> None:
    """Values from a narrow region too: the tail of an activation is held to its own size, not to that of its bulk."""
    if native_library() is None:
        pytest.skip("no C++ compiler here")
    case = make_case(kind, rows, columns, dtype, gated, spread)
    x = case.up if case.gate is None else case.gate
    # Left of -5 PyTorch's gelu, 1 + erf or 1 + tanh, is nothing but rounding, in fp64 not much later.
    x.add_(centre).clamp_(min=-5.0 if kind.startswith("gelu") else None, max=12.0)
    check(case, "native")


@every_backend
@every_kind
@every_dtype
def test_in_place(backend: str, kind: str, dtype: torch.dtype) -> None:
    def assert_same(ours: Tensor, want: Tensor) -> None:
        # PyTorch computes contiguous and strided tensors a little differently
        tolerance = {"rtol": 0.0, "atol": 0.0} if backend == "native" else {}
        torch.testing.assert_close(ours, want, **tolerance)

    for rows, columns in SHAPES:
        case = make_case(kind, rows, columns, dtype)
        want_h, want_dgate, want_dup = case.results()
        arguments = {"kind": kind, "backend": backend}
        gated_activation_backward(case.dh, case.gate, case.up, dgate=want_dgate, dup=want_dup, h=want_h, **arguments)
        assert_same(gated_activation(case.gate, case.up, **arguments), want_h)
        other = Case(kind, case.dh.clone(), case.gate.clone(), case.up.clone())
        assert gated_activation(other.gate, other.up, out=other.gate, **arguments) is other.gate
        assert_same(other.gate, want_h)
        gated_activation_backward(case.dh, case.gate, case.up, dgate=case.gate, dup=case.up, h=case.dh, **arguments)
        for ours, want in ((case.dh, want_h), (case.gate, want_dgate), (case.up, want_dup)):
            assert_same(ours, want)


@every_backend
@every_kind
@every_dtype
def test_special_values_as_in_pytorch(backend: str, kind: str, dtype: torch.dtype) -> None:
    case = special_case(kind, dtype)
    ours = {"h": torch.empty_like(case.dh), "dgate": torch.empty_like(case.dh), "dup": torch.empty_like(case.dh)}
    gated_activation_backward(case.dh, case.gate, case.up, kind, **ours, backend=backend)
    wide, eps = case.plain(torch.float32), 4 * torch.finfo(dtype).eps
    kept = comparable(case, kind)
    for name, value in ours.items():  # PyTorch in fp32, rounded once: products that overflow in between are its own
        torch.testing.assert_close(value[kept], wide[name].to(dtype)[kept], rtol=eps, atol=eps, equal_nan=True)


@every_backend
@every_kind
def test_large_values_give_no_nan(backend: str, kind: str) -> None:
    x = torch.tensor([[1e4, -1e4, 1e19, -1e19, 1e30, -1e30, 3e38, -3e38]])
    one = torch.ones_like(x)
    dgate, dup, h = (torch.empty_like(x) for _ in range(3))
    gated_activation_backward(one, x, one, kind, dgate=dgate, dup=dup, h=h, backend=backend)
    if backend == "native" or kind != "gelu_tanh":  # PyTorch's own derivative overflows there
        assert not torch.cat([dgate, dup, h]).isnan().any()


@every_dtype
def test_every_16_bit_number_rounds_as_pytorch(dtype: torch.dtype) -> None:
    """relu without a gate is the identity from zero on: what goes in comes out, and products round once."""
    if native_library() is None:
        pytest.skip("no C++ compiler here")
    if dtype == torch.float32:
        pytest.skip("not 16 bits")
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, -1)
    assert torch.equal(gated_activation(None, x, "relu", backend="native").nan_to_num(-1), x.relu().nan_to_num(-1))
    y = torch.randn(x.shape).exp().to(dtype)
    ours, want = gated_activation(x, y, "relu", backend="native"), (x.float().relu() * y.float()).to(dtype)
    assert torch.equal(ours.isnan(), want.isnan())
    assert torch.equal(ours.nan_to_num(-1), want.nan_to_num(-1))


@every_backend
def test_threads_change_nothing(backend: str) -> None:
    case = make_case("gelu", 40, 5000, torch.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gated_activation(case.gate, case.up, "gelu", backend=backend))
    finally:
        torch.set_num_threads(before)
    case.hold(h=found[0])
    if backend == "native":
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@every_backend
def test_autograd_sees_the_writes(backend: str) -> None:
    x = torch.randn(4, 4)
    h, dgate, dup = torch.empty(4, 4), torch.empty(4, 4), torch.empty(4, 4)
    for tensors in ((h,), (dgate, dup, h)):
        before = [t._version for t in tensors]
        if len(tensors) == 1:
            gated_activation(x, x, "silu", out=h, backend=backend)
        else:
            gated_activation_backward(x, x.clone(), x.clone(), "silu", dgate=dgate, dup=dup, h=h, backend=backend)
        assert all(t._version > version for t, version in zip(tensors, before, strict=True))


@every_backend
def test_a_result_of_parameters_has_no_gradient(backend: str) -> None:
    x = torch.randn(4, 4, requires_grad=True)
    assert not gated_activation(x, x, "silu", backend=backend).requires_grad


def test_takes_columns_and_rows_of_one(backend: str = "auto") -> None:
    for shape in ((1, 7), (7, 1)):
        x = torch.randn(shape[1], shape[0]).t()
        torch.testing.assert_close(gated_activation(x, x, "relu", backend=backend), x.relu() * x)
