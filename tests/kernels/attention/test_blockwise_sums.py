"""Block by block in fp32 where a product adds its terms one after the other, as cuBLAS may."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft_kernels.attention import autograd, blocks
from fastpeft_kernels.attention.masks import Mask

from .drawn import hold, make_case

aten = torch.ops.aten


class OneAfterTheOther(TorchDispatchMode):
    """Products in fp32: a partial sum is rounded at every term."""

    def __init__(self) -> None:
        super().__init__()
        self.terms: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.bmm.default and args[0].dtype == torch.float32:
            return self._product(*args)
        if func in (aten.baddbmm_.default, aten.baddbmm.out) and args[0].dtype == torch.float32:
            total, a, b = args
            product = self._product(a, b) * kwargs.get("alpha", 1)
            return kwargs.get("out", total).copy_(product if kwargs.get("beta") == 0 else total + product)
        return func(*args, **kwargs)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        total = a.new_zeros(a.shape[0], a.shape[1], b.shape[2])
        for i in range(a.shape[2]):
            total.addcmul_(a[:, :, i, None], b[:, i, None])
        self.terms.add(a.shape[2])
        return total


def test_heads_that_share_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """All in one sum their gradients err up to 2.2 times the budget; of seeds 0 to 9 each is over it."""
    monkeypatch.setattr(blocks, "CPU", blocks.GPU_FP32)
    case = make_case(1, 64, 1, 44, 44, mask=Mask(left=11, right=0))
    with OneAfterTheOther() as products:
        hold(case, lambda it: autograd.apply(it.q, it.k, it.v, it.mask, it.scores, "blockwise", False))
    assert {60, 64} <= products.terms  # four heads of 16 queries at once, and five of the last 12
