"""A weight of which some rows are replaced."""

import json

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.loss import Head, linear_cross_entropy
from fastpeft_kernels.loss.label_rows import label_rows
from fastpeft_kernels.weights import DenseWeight, ReplacedRows, unflatten_weight

PLACES = [0, 4, 7]


def made(dtype: torch.dtype = torch.float32) -> tuple[ReplacedRows, Tensor]:
    """Over a base that has no numbers there, and its values."""
    values, rows = torch.randn(9, 8), torch.randn(3, 8)
    index = torch.tensor(PLACES)
    base = values.index_fill(0, index, float("nan")).to(dtype)
    expected = values.index_copy(0, index, rows).to(dtype)
    return ReplacedRows(DenseWeight(base), rows.to(dtype), index, PLACES), expected


@pytest.mark.parametrize("rows", [None, (0, 1), (1, 4), (4, 9), (5, 5), (8, 9)], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.float64], ids=str)
def test_decode(rows: tuple[int, int] | None, dtype: torch.dtype | None) -> None:
    weight, expected = made()
    expected = expected[slice(*(rows or (0, 9)))].to(dtype or torch.float32)
    torch.testing.assert_close(weight.decode(rows=rows, dtype=dtype), expected, rtol=0.0, atol=0.0)
    out = torch.full_like(expected, float("nan"))
    assert weight.decode(out=out, rows=rows) is out
    torch.testing.assert_close(out, expected, rtol=0.0, atol=0.0)
    assert weight.base.decode()[PLACES].isnan().all()


def test_rows_of_labels() -> None:
    weight, expected = made(torch.bfloat16)
    labels = torch.arange(9).flip(0)
    for room in (None, torch.empty((2, 8), dtype=torch.bfloat16)):
        found = torch.cat([rows.clone() for _, rows in label_rows(weight, labels, torch.float32, room)])
        torch.testing.assert_close(found, expected[labels], rtol=0.0, atol=0.0)


def test_products_and_a_loss() -> None:
    weight, expected = made(torch.float64)
    x, labels = torch.randn(5, 8, dtype=torch.float64, requires_grad=True), torch.tensor([0, 4, 8, -100, 1])
    torch.testing.assert_close(weight.linear(x.detach()), x.detach() @ expected.t())
    losses = [linear_cross_entropy(x, Head(each), labels).loss for each in (weight, DenseWeight(expected))]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*[torch.autograd.grad(loss, x) for loss in losses])


def test_flatten_passes_through_json() -> None:
    weight, expected = made()
    tensors, meta = weight.flatten()
    again = unflatten_weight(weight.kind, tensors, json.loads(json.dumps(meta)))
    torch.testing.assert_close(again.decode(), expected)
    assert again.stamp() == weight.stamp()


@pytest.mark.parametrize(
    ("rows", "count", "places", "message"),
    [
        (2, 3, PLACES, r"rows: expected shape \(3, 8\), got \(2, 8\)"),
        (3, 2, PLACES, r"index: expected shape \(3,\), got \(2,\)"),
        (3, 3, [0, 7, 4], r"places: expected ascending integers in \[0, 9\), got \(0, 7, 4\)"),
        (3, 3, [0, 4, 9], r"places: expected ascending integers in \[0, 9\), got \(0, 4, 9\)"),
    ],
)
def test_bad_arguments(rows: int, count: int, places: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReplacedRows(DenseWeight(torch.zeros(9, 8)), torch.zeros(rows, 8), torch.arange(count), places)
