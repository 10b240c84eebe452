import pytest
import torch

from tests.budget import assert_within_budget


def product(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.randn(33, 17, dtype=torch.float64).to(dtype), torch.randn(17, 9, dtype=torch.float64).to(dtype)
    return a @ b, a.double() @ b.double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_pytorch_itself_uses_half_of_the_budget_at_most(dtype: torch.dtype) -> None:
    y_torch, y64 = product(dtype)
    assert assert_within_budget(y_torch, y_torch, y64) <= 0.5


def test_rounding_of_the_oracle_is_within_budget() -> None:
    _, y64 = product(torch.float32)
    assert_within_budget(y64.float(), y64.float(), y64)


def test_one_element_off_fails_and_is_named() -> None:
    y_torch, y64 = product(torch.float32)
    ours = y_torch.clone()
    ours[4, 2] += 1.0
    with pytest.raises(AssertionError, match=r"dx: max error 1\.0.*over its budget.*worst at \(4, 2\)"):
        assert_within_budget(ours, y_torch, y64, "dx")


def test_many_small_errors_fail_by_the_frobenius_norm() -> None:
    y64 = torch.zeros(1000, dtype=torch.float64)
    y64[0] = 1.0
    eps = torch.finfo(torch.float32).eps
    ours = (y64 + 0.9 * eps).float()
    with pytest.raises(AssertionError, match="Frobenius error"):
        assert_within_budget(ours, y64.float(), y64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_fails(bad: float) -> None:
    y_torch, y64 = product(torch.float32)
    ours = y_torch.clone()
    ours[0, 1] = bad
    with pytest.raises(AssertionError, match=r"1 of 297 elements are not finite.*\(0, 1\)"):
        assert_within_budget(ours, y_torch, y64)


def test_overflow_of_the_dtype_and_masked_values_are_right() -> None:
    y64 = torch.tensor([1e6, -float("inf"), 2.0], dtype=torch.float64)
    assert assert_within_budget(y64.half(), y64.half(), y64) == 0.0
    with pytest.raises(AssertionError, match="not finite"):
        assert_within_budget(torch.tensor([1e4, -float("inf"), 2.0]).half(), y64.half(), y64)


def test_empty_and_scalar() -> None:
    assert assert_within_budget(torch.empty(0, 3), torch.empty(0, 3), torch.empty(0, 3, dtype=torch.float64)) == 0.0
    one = torch.tensor(1.5)
    assert_within_budget(one, one, one.double())
    with pytest.raises(AssertionError, match=r"worst at \(\)"):
        assert_within_budget(one + 1, one, one.double())


def test_dtype_and_shape_must_agree() -> None:
    x = torch.zeros(2)
    with pytest.raises(AssertionError, match=r"expected the dtype of plain PyTorch, torch.float16, got torch.float32"):
        assert_within_budget(x, x.half(), x.double())
    with pytest.raises(AssertionError, match=r"oracle in torch.float64, got torch.float32"):
        assert_within_budget(x, x, x)
    with pytest.raises(AssertionError, match=r"one shape .* got \(2,\), \(2,\), \(2, 1\)"):
        assert_within_budget(x, x, x.double()[:, None])
