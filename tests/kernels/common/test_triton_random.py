"""Dropout in Triton, interpreted: the bits and the results of `common.random`."""

from __future__ import annotations

import pytest
import torch

from fastpeft_kernels.common.random import draw_seed, dropout, dropout_bits, keep_threshold

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("nan_filled")]

SEEDS = (0, 1, -1, 2**32, 123456789012345678, -(2**63), 2**63 - 1)
# A block that starts at row 0, on both sides of 2**31 and of 2**32, and far beyond.
BLOCKS = ((0, 7, 33, 0), (2**31 - 3, 9, 20, 1), (2**32 - 2, 5, 17, 2), (2**35 + 7, 5, 17, 11))


def triton_random():  # type: ignore[no-untyped-def]
    return pytest.importorskip("fastpeft_kernels.common.triton_random")


@pytest.mark.parametrize(("first", "rows", "columns", "stream"), BLOCKS)
def test_the_same_bits(first: int, rows: int, columns: int, stream: int) -> None:
    kernel = triton_random().dropout_bits_kernel
    for number in (*SEEDS, int(draw_seed(torch.device("cpu")))):
        seed = torch.tensor([number])
        out = torch.empty((rows, columns), dtype=torch.int32)
        grid = (-(-rows // 4) * -(-columns // 16),)
        kernel[grid](seed, out, first, rows, columns, stream, BLOCK_M=4, BLOCK_N=16)
        assert torch.equal(out, dropout_bits(seed, first, rows, columns, stream)), number


@pytest.mark.parametrize("p", (0.0, 0.1, 0.5, 0.999))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_the_same_results(dtype: torch.dtype, p: float) -> None:
    ours = triton_random().dropout_triton
    seed = draw_seed(torch.device("cpu"))
    x = torch.randn(37, 50).to(dtype)
    for view in (x, x.t(), x[::2, 1:40:3], x[:1, :1], x[:0], x[:, :0]):
        got, want = ours(view, seed, p, 2), dropout(view, seed, p, 2)
        assert torch.equal(got, want) and got.stride() == want.stride() and got.dtype == want.dtype


def test_more_columns_than_a_tile() -> None:
    seed, x = draw_seed(torch.device("cpu")), torch.randn(5, 2100)
    assert torch.equal(triton_random().dropout_triton(x, seed, 0.3), dropout(x, seed, 0.3))


def test_nothing_survives_a_drop() -> None:
    seed, x = draw_seed(torch.device("cpu")), torch.full((40, 40), torch.nan)
    kept = dropout_bits(seed, 0, 40, 40) >= keep_threshold(0.5)
    y = triton_random().dropout_triton(x, seed, 0.5)
    assert (y[~kept] == 0.0).all() and y[kept].isnan().all()


def test_errors_name_the_argument() -> None:
    ours, seed = triton_random().dropout_triton, draw_seed(torch.device("cpu"))
    with pytest.raises(TypeError, match=r"x: expected one of .*, got torch.float64"):
        ours(torch.ones(2, 2, dtype=torch.float64), seed, 0.5)
    with pytest.raises(ValueError, match=r"x: expected \(rows, columns\), got shape \(2,\)"):
        ours(torch.ones(2), seed, 0.5)
    with pytest.raises(ValueError, match=r"seed: expected one int64 on cpu, got 1 torch.int32 on cpu"):
        ours(torch.ones(2, 2), seed.int(), 0.5)
    with pytest.raises(ValueError, match=r"p: expected a dropout probability in \[0, 1\), got 1.0"):
        ours(torch.ones(2, 2), seed, 1.0)
