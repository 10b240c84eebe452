"""The attention kernels in Triton's interpreter: outputs and every gradient within the error budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastpeft_kernels.attention.gradients import Gradients, Needs
from fastpeft_kernels.attention.masks import Mask
from fastpeft_kernels.attention.problems import MASKS, SCORES, Problem, Shape, problem
from fastpeft_kernels.attention.scores import Scores
from fastpeft_kernels.attention.tiles import TINY, Tile, Tiles
from tests.budget import assert_within_budget

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("nan_filled")]
pytest.importorskip("triton")

CPU, F32, F16 = torch.device("cpu"), torch.float32, torch.float16  # the interpreter computes bfloat16 wrongly
SHAPE = Shape(1, 2, 1, 19, 34, 12, 20)  # no tile divides these


@pytest.fixture(autouse=True)
def _drawn() -> None:
    torch.manual_seed(0)


def check(it: Problem, tiles: Tiles = TINY) -> None:
    from fastpeft_kernels.attention.backward import attention_backward_triton
    from fastpeft_kernels.attention.forward import attention_triton

    out, lse = attention_triton(it.q, it.k, it.v, it.mask, it.scores, tiles)
    assert out.transpose(1, 2).is_contiguous()
    same, exact = it.plain(), it.to(torch.float64).plain()
    assert_within_budget(out, same[0], exact[0], "out")
    assert_within_budget(lse, same[1], exact[1], "lse")
    if it.q.dtype == F32:  # refused on GPUs: gradients may err three times as PyTorch's do
        return
    gradients = attention_backward_triton(
        it.dout, it.q, it.k, it.v, out, lse, it.mask, it.scores, it.needs, tiles=tiles
    )
    for name in Gradients._fields:
        ours, theirs, oracle = (getattr(g, name) for g in (gradients, same[2], exact[2]))
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert_within_budget(ours, theirs, oracle, f"d{name}")


def test_causal_with_more_keys_than_queries_and_shared_heads() -> None:
    for dtype in (F32, F16):
        check(problem(SHAPE._replace(heads=4, kv_heads=2), dtype, CPU, ("causal",)))


def test_intervals_that_change_in_place() -> None:
    """What is remembered of them goes with the next write."""
    it = problem(SHAPE._replace(queries=34), F16, CPU, ("documents",))
    check(it)
    it.mask.start.zero_()  # type: ignore[union-attr]
    check(it)


def test_fewer_keys_than_queries_leave_rows_that_see_nothing() -> None:
    check(problem(SHAPE._replace(queries=34, keys=19), F16, CPU, ("causal",)))


def test_wide_tiles_through_descriptors_have_blocks_that_all_rows_see() -> None:
    described = (Tile(32, 16, 4, 1, True), Tile(16, 32, 4, 1, True), Tile(32, 16, 4, 1, True))
    tiles = Tiles(*described, Tile(32, 32, 4, 1))
    check(problem(Shape(1, 1, 1, 50, 70, 16, 16), F16, CPU, ("window",), ("bias of queries",)), tiles)


def test_all_that_happens_to_scores_at_once() -> None:
    check(problem(SHAPE, F16, CPU, ("both sides", "any intervals"), tuple(SCORES)))


def test_rows_of_whole_loads_of_bias_and_mask() -> None:
    it = problem(SHAPE._replace(keys=40), F16, CPU, ("dense",), ("bias",))
    assert it.scores.bias is not None and it.scores.bias.is_contiguous()
    check(it)
    wider = torch.randn(2, 19, 48).to(F16)[..., 8:]  # each row begins aligned, further apart than the keys are many
    check(replace(it, scores=replace(it.scores, bias=wider)))


def test_all_masks_at_once_and_a_batch_entry_without_keys() -> None:
    check(problem(SHAPE._replace(batch=2), F16, CPU, tuple(MASKS)[5:]))


@pytest.mark.full
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scores", SCORES)
def test_each_mask_with_each_of_the_scores(mask: str, scores: str) -> None:
    for dtype in (F32, F16):
        check(problem(SHAPE._replace(batch=2), dtype, CPU, (mask,), (scores,)))


@pytest.mark.full
@pytest.mark.parametrize("features", [(1, 1), (16, 48), (24, 80), (96, 96), (128, 20)], ids=str)
def test_sizes_of_heads(features: tuple[int, int]) -> None:
    check(problem(SHAPE._replace(features=features[0], v_features=features[1]), F16, CPU, ("causal",)))


def test_one_query_one_key_one_feature_and_a_negative_scale() -> None:
    check(problem(Shape(1, 1, 1, 1, 1, 1, 1), F16, CPU, (), ("sinks",), scale=-0.7))


def test_any_layout() -> None:
    it = problem(Shape(2, 2, 2, 9, 10, 8, 8), F16, CPU, ("causal",))
    q, k, v, dout = (torch.stack([t, t], dim=-1)[..., 0] for t in (it.q, it.k, it.v, it.dout))
    check(replace(it, q=q, k=k[:, :1].expand_as(k), v=v, dout=dout[..., :1].expand_as(dout)))


def test_nothing_to_compute() -> None:
    from fastpeft_kernels.attention.backward import attention_backward_triton
    from fastpeft_kernels.attention.forward import attention_triton

    for sizes in ({"batch": 0}, {"queries": 0}, {"keys": 0}):
        it = problem(SHAPE._replace(**sizes), F32, CPU, ("causal",), ("sinks",))
        out, lse = attention_triton(it.q, it.k, it.v, it.mask, it.scores)
        gradients = attention_backward_triton(it.dout, it.q, it.k, it.v, out, lse, it.mask, it.scores, it.needs)
        wanted = it.plain()
        torch.testing.assert_close((out, lse, *gradients), (wanted[0], wanted[1], *wanted[2]))


def test_only_what_is_needed() -> None:
    from fastpeft_kernels.attention.backward import attention_backward_triton
    from fastpeft_kernels.attention.forward import attention_triton

    it = problem(Shape(1, 1, 1, 5, 5, 4, 4), F32, CPU, ("causal",), ("sinks", "bias"))
    out, lse = attention_triton(it.q, it.k, it.v, it.mask, it.scores)
    tensors = it.dout, it.q, it.k, it.v, out, lse
    whole = attention_backward_triton(*tensors, it.mask, it.scores, it.needs)
    for name in ("q", "k", "v", "bias", "sinks"):
        only = Needs(**{other: other == name for other in Needs._fields})
        gradients = attention_backward_triton(*tensors, it.mask, it.scores, only)
        assert torch.equal(getattr(gradients, name), getattr(whole, name))
        assert all(g is None for other, g in gradients._asdict().items() if other != name)


def test_refuses_what_it_would_compute_wrongly() -> None:
    from fastpeft_kernels.attention.refusal import triton_refusal

    def refusal(dtype: torch.dtype, features: int = 4, other: torch.dtype | None = None) -> str | None:
        q, k = torch.zeros(1, 1, 2, features, dtype=dtype), torch.zeros(1, 1, 2, features, dtype=other or dtype)
        return triton_refusal(q, k, k, Mask(), Scores(1.0))

    assert refusal(F16) is None
    for dtype, reason in {
        torch.bfloat16: "fp32 or fp16 in Triton's interpreter",
        torch.float64: "fp16, bf16 or fp32",
    }.items():
        assert reason in (refusal(dtype) or "")
    assert "of one dtype, got torch.float32, torch.float16" in (refusal(F32, other=F16) or "")
    assert "heads of 1 to 256 features, got 257" in (refusal(F32, 257) or "")
