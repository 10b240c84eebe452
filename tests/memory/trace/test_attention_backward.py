"""What attention takes beside its result and its gradients."""

from __future__ import annotations

import pytest
import torch

from fastpeft.memory.trace.live import LiveBytes
from fastpeft_kernels.attention import attention
from fastpeft_kernels.attention.gradients import Needs
from fastpeft_kernels.attention.library import sdpa_refusal
from fastpeft_kernels.attention.masks import Mask
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


@pytest.mark.parametrize(("device", "at_the_time"), [("cpu", 0), ("cuda", 1)])
def test_a_mask_of_tokens_becomes_numbers_that_backward_reads(device: str, at_the_time: int) -> None:
    """As PyTorch's own does it; on a GPU a copy without empty rows lies beside it at the time."""
    given = {"dtype": torch.bfloat16, "device": "meta"}
    q, k, v = (torch.empty((2, 4, 96, 32), **given, requires_grad=True) for _ in range(3))
    seen = torch.empty((2, 1, 96, 96), dtype=torch.bool, device="meta")
    live = LiveBytes(device)
    live.add([q, k, v, seen])
    before = live.live
    live.restart()
    with imitating(device), live:
        out = attention(q, k, v, mask=Mask(dense=seen))
    lse = 2 * 4 * 96 * 4
    assert live.live - before == out.nbytes + lse + 2 * seen.nbytes
    assert live.peak - live.live == at_the_time * seen.nbytes
    with imitating(device), live:
        out.backward(torch.empty_like(out))
    del out
    assert live.live - before == q.nbytes + k.nbytes + v.nbytes


def test_what_is_added_to_scores_goes_the_way_of_the_device_that_is_imitated() -> None:
    """Pixtral's pictures do not see each other by numbers that are added: PyTorch's own takes them on a CPU."""
    q, k, v = (torch.empty((1, 4, 48, 32), device="meta") for _ in range(3))
    scores = Scores(0.2, bias=torch.empty((1, 1, 48, 48), device="meta"))
    with imitating("cpu"):
        assert sdpa_refusal(q, k, v, Mask(), scores) is None
    with imitating("cuda"):
        assert "expected a bias in q's" in str(sdpa_refusal(q, k, v, Mask(), scores))
