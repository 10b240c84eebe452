"""Public ops: a frozen embedding, or a frozen head, some of whose rows are trained."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..common.device import autocast_dtype
from ..common.tables import table_on, written_on
from ..common.tracing import as_op
from .autograd import TokenEmbedding, TokenLinear
from .validation import check_ids, check_matrix, check_padding_idx, check_x


def token_embedding(
    ids: Tensor, weight: Tensor, rows: Tensor, tokens: tuple[int, ...], *, padding_idx: int | None = None
) -> Tensor:
    """The embedding of ids, where `rows` stand in the place of the rows `tokens` of a frozen matrix.

    Equivalent PyTorch: `F.embedding(ids, weight.index_copy(0, index, rows.to(weight.dtype)), padding_idx)`, with
    `index = torch.tensor(tokens)`, which copies the matrix in forward, makes its gradient, and copies that. Here no
    more is made than the result, two numbers for each id, and one for each word. The gradient of `rows` is summed in
    fp32 at least.

    Args:
        ids: (...), int64 or int32, below vocabulary.
        weight: (vocabulary, features), floating, not trained, on ids' device.
        rows: (len(tokens), features), floating.
        tokens: which rows of weight they replace; distinct.
        padding_idx: a row that gets no gradient, if it is one of them; a negative one counts from the last.

    Returns:
        A new tensor (..., features), dtype of weight. Gradients reach `rows`.

    Raises:
        TypeError: an argument that is no tensor, or of another kind of dtype.
        ValueError: sizes that do not fit, tokens that are none or come twice, a weight that is trained, a padding_idx
            that is no row.
        IndexError: on a CPU, an id that is no row of weight.
    """
    check_ids(ids)
    check_matrix(weight, rows, tokens, ids.device, "ids")
    padding_idx = check_padding_idx(padding_idx, weight.shape[0])
    return TokenEmbedding.apply(ids, weight, rows, index_of(tokens, ids.device), padding_idx)  # type: ignore[no-any-return, no-untyped-call]


def token_linear(x: Tensor, weight: Tensor, rows: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """x times a frozen matrix transposed, where `rows` stand in the place of the matrix's rows `tokens`.

    Equivalent PyTorch: `F.linear(x, weight.index_copy(0, index, rows.to(weight.dtype)))`, with
    `index = torch.tensor(tokens)`, which copies the matrix, makes its gradient (a product as large as the others), and
    copies that. Here the product is that with the frozen matrix, whose columns `tokens` are then overwritten; their
    gradient alone is read for that of `rows`. That of x takes a copy of the matrix while it is computed, where autocast
    casts two.

    Args:
        x: (..., features), floating.
        weight: (vocabulary, features), floating, not trained, in the dtype of x where autocast is off.
        rows: (len(tokens), features), floating.
        tokens: which rows of weight they replace; distinct.

    Returns:
        A new tensor (..., vocabulary), dtype of x, or autocast's. Gradients reach x and `rows`.

    Raises:
        TypeError: an argument that is no tensor, or of another kind of dtype.
        ValueError: sizes or dtypes that do not fit, tokens that are none or come twice, a weight that is trained.
    """
    check_x(x, weight)
    check_matrix(weight, rows, tokens, x.device, "x")
    dtype = autocast_dtype(x.device)
    if dtype is None and weight.dtype != x.dtype:
        raise ValueError(f"weight: expected dtype of x, {x.dtype}, got {weight.dtype}")
    return TokenLinear.apply(x, weight, rows, index_of(tokens, x.device), dtype or x.dtype)  # type: ignore[no-any-return, no-untyped-call]


def index_of(tokens: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 (len(tokens),) on the device, without waiting for it."""
    if as_op():
        return torch.tensor(tokens, device=device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return written_on(device, tokens)  # of the graph's own memory, and filled when it runs
    return _kept_index(tokens, device)


@lru_cache(maxsize=64)
def _kept_index(tokens: tuple[int, ...], device: torch.device) -> Tensor:
    return table_on(device, tokens)
