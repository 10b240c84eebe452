"""Checks that need a CUDA GPU: what of this family is made of the library's products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.gpu_verdicts import Verdicts
from .embedding import lora_embedding, mixed_lora_embedding
from .gpu_direct import direct_checks
from .gpu_support import BF16, DEVICE, F16, F32, F64, dtype_name, moved, rand, reference_device, same_dtypes

VOCABULARY, FEATURES, RANK = 1000, 384, 16


def checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named checks. Each returns figures, or raises AssertionError."""
    yield from direct_checks()
    for dtype in (BF16, F16, F32):
        yield f"embedding {dtype_name(dtype)}", partial(_check_embedding, dtype)


def _check_embedding(dtype: torch.dtype) -> dict[str, Any]:
    verdicts = Verdicts()
    cases: list[Any] = [(*case, lora_embedding, _plain) for case in product(((4, 250), (1, 1), (0, 3)), (None, 7))]
    for shape, padding, run, plain in (*cases, ((5, 250), 7, _mixed, _plain_mixed)):
        ids = torch.randint(0, VOCABULARY, shape, device=DEVICE)
        inputs = (rand(*shape, FEATURES, dtype=dtype), rand(RANK, VOCABULARY), rand(FEATURES, RANK))
        dy = rand(*shape, FEATURES, dtype=dtype)
        ours = _derive(run, inputs, ids, padding, dy)
        device = reference_device(same_dtypes(dtype))
        same, exact = (
            _derive(plain, [moved(t, d, wide) for t in inputs], ids.to(d), padding, moved(dy, d, wide))
            for d, wide in ((device, None), (DEVICE, F64))
        )
        for name, mine, one, other in zip(("y", "dy", "da", "db"), ours, same, exact, strict=True):
            verdicts.within(mine, one.to(DEVICE), other, f"{name} of {shape}, {padding=}")
    return {"share_of_budget": verdicts.settle()}


def _plain(y: Tensor, ids: Tensor, a: Tensor, b: Tensor, *, scaling: float, padding_idx: int | None) -> Tensor:
    return y + scaling * (F.embedding(ids, a.t(), padding_idx) @ b.t())


def _mixed(y: Tensor, ids: Tensor, a: Tensor, b: Tensor, *, scaling: float, padding_idx: int | None) -> Tensor:
    """Every other row has the adapter."""
    index = tuple([i % 2 for i in range(y.shape[0])])
    return mixed_lora_embedding(y, ids, {0: (a, b, scaling)}, index, padding_idx=padding_idx)


def _plain_mixed(y: Tensor, ids: Tensor, a: Tensor, b: Tensor, **options: Any) -> Tensor:
    has = (torch.arange(y.shape[0], device=y.device) % 2 == 0)[:, None, None]
    return torch.where(has, _plain(y, ids, a, b, **options), y)


def _derive(run: Callable[..., Tensor], inputs: Any, ids: Tensor, padding_idx: int | None, dy: Tensor) -> list[Tensor]:
    y, a, b = (t.detach().requires_grad_() for t in inputs)
    out = run(y, ids, a, b, scaling=0.5, padding_idx=padding_idx)
    return [out.detach(), *torch.autograd.grad(out, (y, a, b), dy.to(out.dtype))]
