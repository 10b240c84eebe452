"""Embeddings and heads with trained rows, against PyTorch's in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpeft_kernels.common.tables import written_on
from fastpeft_kernels.tokens import api, autograd, token_embedding, token_linear
from fastpeft_kernels.tokens.reference import token_embedding_reference, token_linear_reference
from tests.budget import assert_within_budget
from tests.kernels.allocations import as_large_as, largest
from tests.kernels.compiling import check_one_graph, check_selective_checkpointing

VOCABULARY, FEATURES = 11, 64
TOKENS = (9, 0, 4)
SHAPES = [(2, 5), (7,), (), (0, 4), (1, 1)]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, rows: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """ids, x, weight, rows."""
    weight, trained = torch.randn(VOCABULARY, FEATURES), torch.randn(len(TOKENS), FEATURES)
    ids, x = torch.randint(0, VOCABULARY, shape), torch.randn(*shape, FEATURES)
    return ids, x.to(dtype).requires_grad_(), weight.to(dtype), trained.to(rows or dtype).requires_grad_()


def assert_same(ours: Tensor, exact: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(ours, exact)
    dy = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad(y, inputs, dy) for y in (ours, exact)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("integers", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 4, 5, 4 - VOCABULARY])
def test_an_embedding(shape: tuple[int, ...], integers: torch.dtype, padding_idx: int | None) -> None:
    ids, _, weight, rows = drawn(*shape, dtype=torch.float64)
    if ids.numel():
        ids.view(-1)[0] = 4
    ids = ids.to(integers)
    ours = token_embedding(ids, weight, rows, TOKENS, padding_idx=padding_idx)
    assert_same(ours, token_embedding_reference(ids, weight, rows, TOKENS, padding_idx), (rows,))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [TOKENS, tuple(range(VOCABULARY))], ids=["some", "all"])
def test_a_head(shape: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    _, x, weight, _ = drawn(*shape, dtype=torch.float64)
    rows = torch.randn(len(tokens), FEATURES, dtype=torch.float64, requires_grad=True)
    ours = token_linear(x, weight, rows, tokens)
    assert_same(ours, token_linear_reference(x, weight, rows, tokens), (x, rows))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(
    ("dtype", "trained"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_within_the_budget(dtype: torch.dtype, trained: torch.dtype, autocast: bool) -> None:
    ids, x, weight, rows = drawn(50, dtype=dtype, rows=trained)
    wide_x, wide_rows = (t.detach().double().requires_grad_() for t in (x, rows))
    wide = weight.double()
    exact = (
        token_embedding_reference(ids, wide, wide_rows, TOKENS),
        token_linear_reference(wide_x, wide, wide_rows, TOKENS),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = token_embedding(ids, weight, rows, TOKENS), token_linear(x, weight, rows, TOKENS)
        same = token_embedding_reference(ids, weight, rows, TOKENS), token_linear_reference(x, weight, rows, TOKENS)
    for kind, inputs, wides, *triple in zip(
        ("embedding", "head"), ((rows,), (x, rows)), ((wide_rows,), (wide_x, wide_rows)), ours, same, exact, strict=True
    ):
        assert triple[0].dtype == triple[1].dtype
        dy = torch.randn(triple[0].shape).to(triple[0].dtype)
        gradients = [
            torch.autograd.grad(y, of, dy.to(y.dtype)) for y, of in zip(triple, (inputs, inputs, wides), strict=True)
        ]
        assert_within_budget(*triple, name=kind)
        for each in zip(*gradients, strict=True):
            assert_within_budget(*each, name=f"gradient of {kind}")


@pytest.mark.parametrize("piece", [autograd._PIECE, FEATURES * 700])
def test_a_frequent_token_in_bf16_gets_all_of_its_gradient(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in bf16 stop growing at 256 times what is added."""
    monkeypatch.setattr(autograd, "_PIECE", piece)
    ids, _, weight, rows = drawn(4000, dtype=torch.bfloat16)
    token_embedding(torch.full_like(ids, 4), weight, rows, TOKENS).sum().backward()
    assert rows.grad is not None
    assert rows.grad[2].eq(4000).all() and not rows.grad[:2].any()


def test_an_embedding_makes_no_second_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autograd, "_PIECE", FEATURES * 30)
    ids, _, weight, rows = drawn(4, 100)
    assert as_large_as(4 * ids.numel() * FEATURES, lambda: token_embedding(ids, weight, rows, TOKENS)) == 1
    exact = token_embedding_reference(ids, weight, rows, TOKENS)
    torch.testing.assert_close(token_embedding(ids, weight, rows, TOKENS), exact, rtol=0.0, atol=0.0)


def test_an_index_that_a_cuda_graph_fills_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made, written = [], []
    monkeypatch.setattr(api, "table_on", lambda device, tokens: made.append(tokens) or torch.tensor(tokens))
    monkeypatch.setattr(api, "written_on", lambda device, tokens: written.append(tokens) or torch.tensor(tokens))
    states = iter((True, False, False))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: next(states))
    for _ in range(3):
        api.index_of((3, 1, 2, 7, 5), torch.device("cuda"))
    api._kept_index.cache_clear()  # of what is on no GPU
    assert len(made) == len(written) == 1


def test_an_index_that_a_cuda_graph_fills_takes_no_memory_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def pin_memory(tensor: Tensor) -> None:
        raise RuntimeError("while a graph is captured not every torch can")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(api, "as_op", lambda: False)  # as it is with real tensors
    with FakeTensorMode():
        index = api.index_of((3, 1, 2), torch.device("cuda", 0))
    assert (index.device.type, index.dtype, tuple(index.shape)) == ("cuda", torch.int64, (3,))
    for numbers in ((), (3, 1, 2), (7, 8, 9, 4, 5, 20), (6, 6, 7)):
        assert written_on(torch.device("cpu"), numbers).tolist() == list(numbers)


@pytest.mark.parametrize("shape", [(2, 5), (7,)], ids=str)
def test_results_may_be_written_into(shape: tuple[int, ...]) -> None:
    ids, x, weight, rows = drawn(*shape, dtype=torch.float64)
    pairs = (
        (token_embedding(ids, weight, rows, TOKENS), token_embedding_reference(ids, weight, rows, TOKENS), (rows,)),
        (token_linear(x, weight, rows, TOKENS), token_linear_reference(x, weight, rows, TOKENS), (x, rows)),
    )
    for ours, exact, inputs in pairs:
        ours[0] = exact[0] = 0.0
        assert_same(ours, exact, inputs)


@pytest.mark.parametrize("replaced", [float("nan"), float("inf"), 1e4])
def test_what_is_replaced_is_never_read(replaced: float) -> None:
    """Not even to subtract it again: 1e4 would take all digits of a difference in bf16 along."""
    ids, x, weight, rows = drawn(50, dtype=torch.bfloat16)
    found = []
    for value in (replaced, 0.0):
        weight[list(TOKENS)] = value
        y, z = token_embedding(ids, weight, rows, TOKENS), token_linear(x, weight, rows, TOKENS)
        found.append([y, z, *torch.autograd.grad(y.sum() + z.sum(), (x, rows))])
    torch.testing.assert_close(*found, rtol=0.0, atol=0.0)


def test_incoming_gradients_are_left_as_they_are() -> None:
    ids, x, weight, rows = drawn(2, 5)
    for y in (token_embedding(ids, weight, rows, TOKENS), token_linear(x, weight, rows, TOKENS)):
        dy = torch.randn_like(y)
        before = dy.clone()
        y.backward(dy)
        torch.testing.assert_close(dy, before, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("trained", [(True, False), (False, True), (False, False)], ids=str)
def test_only_what_is_trained(trained: tuple[bool, bool]) -> None:
    ids, x, weight, rows = drawn(4)
    x.requires_grad_(trained[0])
    rows.requires_grad_(trained[1])
    assert token_embedding(ids, weight, rows, TOKENS).requires_grad == trained[1]
    y = token_linear(x, weight, rows, TOKENS)
    assert y.requires_grad == any(trained)
    if any(trained):
        y.sum().backward()
    assert (x.grad is not None, rows.grad is not None) == trained


def test_the_matrix_is_copied_for_the_gradient_of_x_alone() -> None:
    vocabulary, tokens = 4000, 20
    weight, rows = torch.randn(vocabulary, FEATURES), torch.randn(2, FEATURES, requires_grad=True)
    ids, x = torch.randint(0, vocabulary, (tokens,)), torch.randn(tokens, FEATURES, requires_grad=True)
    results = {
        "embedding": lambda: token_embedding(ids, weight, rows, (5, 3999)).sum(),
        "head": lambda: token_linear(x, weight, rows, (5, 3999)).sum(),
    }
    for result in results.values():
        assert largest(result) <= 4 * vocabulary * tokens
    assert largest(lambda: results["embedding"]().backward()) <= 8 * vocabulary
    assert largest(lambda: results["head"]().backward()) <= 4 * vocabulary * FEATURES
    x.requires_grad_(False)
    assert largest(lambda: results["head"]().backward()) <= 4 * vocabulary * tokens


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compiled_to_one_graph(backend: str) -> None:
    ids, x, weight, rows = drawn(3, 5)

    def both(x: Tensor) -> tuple[Tensor, ...]:
        return x + token_embedding(ids, weight, rows, TOKENS), token_linear(x, weight, rows, TOKENS)

    check_one_graph(both, x, [rows], backend, roundings=64 if backend == "inductor" else 0)


@pytest.mark.parametrize("saved", ["mm.default", "everything"])
def test_selective_checkpointing(saved: str) -> None:
    ids, x, weight, rows = drawn(3, 5)
    check_selective_checkpointing(
        lambda x: token_linear(x + token_embedding(ids, weight, rows, TOKENS), weight, rows, TOKENS), x, [rows], saved
    )


def test_no_number_is_read_from_the_device() -> None:
    ids, x, weight, rows = (t.detach().to("meta").requires_grad_(t.requires_grad) for t in drawn(3, 5))
    (token_linear(x, weight, rows, TOKENS).sum() + token_embedding(ids, weight, rows, TOKENS).sum()).backward()
    assert x.grad is not None and rows.grad is not None


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_ids_that_are_none(token: int) -> None:
    _, _, weight, rows = drawn(1)
    with pytest.raises(IndexError):
        token_embedding(torch.tensor([token]), weight, rows, TOKENS)


MATRIX: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"weight": torch.zeros(FEATURES)}, ValueError, r"weight: expected shape \(vocabulary, features\), got \(64,\)"),
    ({"weight": torch.zeros(11, FEATURES).long()}, TypeError, "weight: expected a floating tensor, got torch.int64"),
    ({"weight": torch.zeros(11, FEATURES).requires_grad_()}, ValueError, "weight: expected a tensor without gradient"),
    ({"rows": torch.zeros(2, FEATURES)}, ValueError, r"rows: expected shape \(3, 64\), got \(2, 64\)"),
    ({"rows": torch.zeros(3, FEATURES, device="meta")}, ValueError, "rows: expected a tensor on cpu like .*, got meta"),
    ({"tokens": [9, 0, 4]}, TypeError, "tokens: expected a tuple, got list"),
    (
        {"tokens": (9, 0, 9)},
        ValueError,
        r"tokens: expected one or more distinct integers in \[0, 11\), got \(9, 0, 9\)",
    ),
    ({"tokens": (9.0, 0, 4)}, ValueError, r"tokens: .* distinct integers in \[0, 11\), got \(9.0, 0, 4\)"),
    ({"tokens": (9, 0, 11)}, ValueError, r"tokens: .* distinct integers in \[0, 11\), got \(9, 0, 11\)"),
    ({"tokens": (), "rows": torch.zeros(0, FEATURES)}, ValueError, "tokens: expected one or more distinct integers"),
]
IDS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"ids": torch.zeros(4)}, TypeError, "ids: expected int64 or int32, got torch.float32"),
    ({"padding_idx": 11}, ValueError, r"padding_idx: expected an integer in \[-11, 11\), got 11"),
    ({"padding_idx": -12}, ValueError, r"padding_idx: expected an integer in \[-11, 11\), got -12"),
    ({"padding_idx": 1.0}, TypeError, "padding_idx: expected a int, got float"),
    ({"ids": [1]}, TypeError, "ids: expected a Tensor, got list"),
]
X: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.zeros(4, 3)}, ValueError, r"x: expected shape \(..., 64\), got \(4, 3\)"),
    (
        {"x": torch.zeros(4, FEATURES).half()},
        ValueError,
        "weight: expected dtype of x, torch.float16, got torch.float32",
    ),
    ({"x": torch.zeros(4, FEATURES).long()}, TypeError, "x: expected a floating tensor, got torch.int64"),
]


def named(value: Any) -> str:
    return next(iter(value)) if isinstance(value, dict) else ""


@pytest.mark.parametrize(("changed", "error", "message"), [*MATRIX, *IDS], ids=named)
def test_bad_input_of_an_embedding(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    ids, _, weight, rows = drawn(4)
    token_embedding(ids, weight, rows, TOKENS)  # equal arguments that were right are remembered
    with pytest.raises(error, match=message):
        token_embedding(**{"ids": ids, "weight": weight, "rows": rows, "tokens": TOKENS, **changed})


@pytest.mark.parametrize(("changed", "error", "message"), [*MATRIX[1:], *X], ids=named)
def test_bad_input_of_a_head(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    _, x, weight, rows = drawn(4)
    with pytest.raises(error, match=message):
        token_linear(**{"x": x, "weight": weight, "rows": rows, "tokens": TOKENS, **changed})
