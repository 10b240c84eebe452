"""What attention's backward takes on a GPU beside its gradients."""

from __future__ import annotations

import pytest
import torch

from fastpeft.memory.trace.live import LiveBytes
from fastpeft_kernels.attention.gradients import Needs
from fastpeft_kernels.attention.scores import Scores
from fastpeft_kernels.attention.shapes import gradient_shapes
from fastpeft_kernels.common.shapes import imitating


@pytest.mark.parametrize(("heads", "by_query_head"), [(8, 0), (2, 2 * 2)])
def test_sums_of_q_and_gradients_of_shared_keys(heads: int, by_query_head: int) -> None:
    q = torch.empty((1, 8, 64, 32), dtype=torch.bfloat16, device="meta")
    k, v = (torch.empty((1, heads, 64, 32), dtype=torch.bfloat16, device="meta") for _ in range(2))
    live = LiveBytes("cuda")
    with imitating("cuda"), live:
        grads = gradient_shapes(q, k, v, Scores(0.2), Needs(True, True, True, False, False, False))
    gradients = q.nbytes + k.nbytes + v.nbytes
    assert live.live == gradients and grads.q is not None
    assert live.peak == gradients + q.numel() * (4 + by_query_head)
