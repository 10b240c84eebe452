"""LoRA on an embedding against PyTorch's in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft_kernels.lora import lora_embedding, mixed_lora_embedding
from tests.budget import assert_within_budget

VOCABULARY, FEATURES, RANK = 11, 16, 3


def reference(y: Tensor, ids: Tensor, a: Tensor, b: Tensor, scaling: float | Tensor, padding_idx: int | None) -> Tensor:
    return y + scaling * (F.embedding(ids, a.t(), padding_idx) @ b.t())


def drawn(*shape: int, dtype: torch.dtype = torch.float32, lora: torch.dtype | None = None) -> tuple[Tensor, ...]:
    ids = torch.randint(0, VOCABULARY, shape)
    y = torch.randn(*shape, FEATURES).to(dtype).requires_grad_()
    a, b = torch.randn(RANK, VOCABULARY), torch.randn(FEATURES, RANK)
    return y, ids, a.to(lora or dtype).requires_grad_(), b.to(lora or dtype).requires_grad_()


@pytest.mark.parametrize("shape", [(2, 5), (7,), (), (0, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("scaling", [0.5, torch.tensor(1.5)], ids=["number", "tensor"])
def test_gradcheck(shape: tuple[int, ...], padding_idx: int | None, scaling: float | Tensor) -> None:
    y, ids, a, b = drawn(*shape, dtype=torch.float64)
    if ids.numel():
        ids.view(-1)[0] = 3
    ours = lora_embedding(y, ids, a, b, scaling=scaling, padding_idx=padding_idx)
    exact = reference(y, ids, a, b, scaling, padding_idx)
    torch.testing.assert_close(ours, exact)
    dy = torch.randn_like(ours)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (y, a, b), dy), torch.autograd.grad(exact, (y, a, b), dy), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("shape", [(2, 5), (7,)], ids=str)
def test_the_result_may_be_written_into(shape: tuple[int, ...]) -> None:
    y, ids, a, b = drawn(*shape)
    result = lora_embedding(y, ids, a, b)
    result[0] = 0.0  # as models write pictures in the place of their tokens
    exact = reference(y, ids, a, b, 1.0, None)
    exact[0] = 0.0
    torch.testing.assert_close(result, exact)
    found, wanted = (torch.autograd.grad(z.square().sum(), (y, a, b)) for z in (result, exact))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("index", [(2, 0, 7, 0), (0, 0, 2, 2), (7, 7, 7, 7), ()], ids=str)
def test_rows_with_adapters_of_their_own(index: tuple[int, ...]) -> None:
    y, ids, a, b = drawn(len(index), 5, dtype=torch.float64)
    _, _, other_a, other_b = drawn(1, dtype=torch.float64)
    adapters = {0: (a, b, 0.5), 2: (other_a, other_b, torch.tensor(1.5))}
    ours = mixed_lora_embedding(y, ids, adapters, index, padding_idx=3)
    rows = [
        reference(row, own, *adapters[i], 3) if i in adapters else row
        for row, own, i in zip(y, ids, index, strict=True)
    ]
    exact = torch.stack(rows) if rows else y.clone()
    torch.testing.assert_close(ours, exact)
    inputs, dy = (y, a, b, other_a, other_b), torch.randn_like(exact)
    found, expected = (torch.autograd.grad(z, inputs, dy, allow_unused=True) for z in (ours, exact))
    torch.testing.assert_close(found, expected)


def test_numbers_that_are_not_those_of_the_rows() -> None:
    y, ids, a, b = drawn(2, 5)
    with pytest.raises(
        ValueError, match=r"adapter_index: expected a number for each row of y .*, got 3 for y of shape"
    ):
        mixed_lora_embedding(y, ids, {0: (a, b, 1.0)}, (0, 0, 0))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(
    ("dtype", "lora"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_within_the_budget(dtype: torch.dtype, lora: torch.dtype, autocast: bool) -> None:
    y, ids, a, b = drawn(40, dtype=dtype, lora=lora)
    wide = [t.detach().double().requires_grad_() for t in (y, a, b)]
    exact = reference(wide[0], ids, *wide[1:], 0.7, None)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, same = lora_embedding(y, ids, a, b, scaling=0.7), reference(y, ids, a, b, 0.7, None)
    same = same.to(ours.dtype)  # PyTorch's is narrower where autocast multiplies
    assert ours.dtype == torch.promote_types(dtype, lora)
    dy = torch.randn(exact.shape)
    gradients = [
        torch.autograd.grad(value, given, dy.to(value.dtype))
        for value, given in ((ours, (y, a, b)), (same, (y, a, b)), (exact, wide))
    ]
    assert_within_budget(ours, same, exact, name="output")
    for i, triple in enumerate(zip(*gradients, strict=True)):
        assert_within_budget(*triple, name=f"gradient {i}")


@pytest.mark.parametrize("trained", [(True, False), (False, True), (False, False)], ids=str)
def test_only_what_is_trained(trained: tuple[bool, bool]) -> None:
    y, ids, a, b = drawn(4)
    y.requires_grad_(False)
    a.requires_grad_(trained[0])
    b.requires_grad_(trained[1])
    result = lora_embedding(y, ids, a, b)
    assert result.requires_grad == any(trained)
    if any(trained):
        result.sum().backward()
    assert (a.grad is not None, b.grad is not None) == trained


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_tokens_that_are_none(token: int) -> None:
    y, _, a, b = drawn(1)
    with pytest.raises(IndexError):
        lora_embedding(y, torch.tensor([token]), a, b)


def test_a_frequent_token_in_bf16_gets_all_of_its_gradient() -> None:
    """Sums in bf16 stop growing at 256 times what is added."""
    tokens = 4000
    y, _, a, b = drawn(tokens, dtype=torch.bfloat16)
    lora_embedding(y, torch.zeros(tokens, dtype=torch.int64), a, b).sum().backward()
    assert a.grad is not None
    torch.testing.assert_close(a.grad[:, 0].float(), tokens * b.detach().float().sum(0), rtol=0.02, atol=0.0)


def test_a_scaling_that_is_written_into_before_backward_is_noticed() -> None:
    y, ids, a, b = drawn(4)
    scaling = torch.tensor(2.0)
    result = lora_embedding(y, ids, a, b, scaling=scaling)
    scaling.fill_(3.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"ids": torch.zeros(4)}, TypeError, "ids: expected int64 or int32, got torch.float32"),
        ({"ids": [1]}, TypeError, "ids: expected a Tensor, got list"),
        ({"y": torch.zeros(3, FEATURES)}, ValueError, r"y: expected shape \(4, 'features'\), got \(3, 16\)"),
        ({"a": torch.zeros(RANK, 5).long()}, TypeError, "a: expected a floating tensor, got torch.int64"),
        (
            {"b": torch.zeros(FEATURES, 2)},
            ValueError,
            r"b: expected shape \(16, 'rank'\) and dtype of a, .*, got \(16, 2\)",
        ),
        ({"scaling": torch.ones(2)}, ValueError, r"scaling: expected shape \(\), got \(2,\)"),
        ({"scaling": torch.ones((), requires_grad=True)}, ValueError, "scaling: expected a tensor without gradient"),
        ({"b": torch.zeros(FEATURES, RANK).half()}, ValueError, "b: expected .*torch.float32, got .*torch.float16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = dict(zip(("y", "ids", "a", "b"), drawn(4), strict=True))
    with pytest.raises(error, match=message):
        lora_embedding(**{**arguments, **changed})
