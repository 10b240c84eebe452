"""Attention by others and in other ways: what each gives and refuses, and what of that may be chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.attention import Mask, attention, choosing
from fastpeft_kernels.attention.candidates import flex, flex_blocks, registry
from fastpeft_kernels.attention.candidates.compact import put_together
from fastpeft_kernels.attention.candidates.request import NotServedError, Request
from fastpeft_kernels.attention.keys import MASKED, OP, masked_key_of
from fastpeft_kernels.attention.masks import dense_mask
from fastpeft_kernels.attention.reference import attention_reference
from fastpeft_kernels.attention.scores import Scores
from fastpeft_kernels.attention.tunables import TUNABLES
from fastpeft_kernels.tuning.choosing import forced, meeting
from tests.budget import assert_within_budget

from .drawn import assert_same, every_mask, make_case

CPU = torch.device("cpu")
LARGE = {"queries": 150, "keys": 290}  # more than one block of FlexAttention's, not a multiple


def _flex(case: Any) -> tuple[Tensor, None]:
    return attention(case.q, case.k, case.v, **case.arguments(), backend="flex"), None


@pytest.fixture
def flex_in_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without tracing: plain PyTorch over the scores of all."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.mark.usefixtures("flex_in_eager")
@pytest.mark.parametrize("extras", [[], ["softcap"]], ids=str)
def test_flex(extras: list[str]) -> None:
    masks = every_mask(2, 4, **LARGE)
    for name in ("causal", "ranges", "padding_left") if extras else ("all", "band", "holes"):
        mask = masks[name]
        case = make_case(**LARGE, mask=mask, extras=extras)
        with torch.no_grad():
            out, _ = _flex(case)
        assert out.transpose(1, 2).is_contiguous()
        arguments = mask, case.scores
        same, _ = attention_reference(case.q, case.k, case.v, *arguments)
        exact, _ = attention_reference(case.q.double(), case.k.double(), case.v.double(), *arguments)
        assert_within_budget(out, same.detach(), exact.detach(), name)


@pytest.mark.parametrize("queries", [37, 40])
def test_blocks_say_what_the_mask_says(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_blocks, "BLOCK", 8)
    keys = 45
    for name, mask in every_mask(2, 4, queries, keys).items():
        if mask.dense is not None:
            continue
        seen = dense_mask(mask, queries, keys, CPU)
        seen = (
            torch.ones(2, queries, keys, dtype=torch.bool) if seen is None else seen.expand(2, 1, queries, keys)[:, 0]
        )
        lower, upper = flex_blocks.row_bounds(mask, queries, keys, CPU)
        some, whole = flex_blocks.seen_blocks(lower, upper, mask.keys, keys)
        rows, columns = -(-queries // 8), -(-keys // 8)
        padded = torch.nn.functional.pad(seen, (0, columns * 8 - keys, 0, rows * 8 - queries))
        blocks = padded.view(2, rows, 8, columns, 8).transpose(2, 3).flatten(-2)
        assert not (blocks.any(-1) & ~some).any(), f"{name}: a block that is seen is left out"
        assert torch.equal(whole.expand(2, -1, -1), blocks.all(-1)), f"{name}: blocks without a mask"
        if mask.start is None and mask.keys is None:
            assert torch.equal(some.expand(2, -1, -1), blocks.any(-1)), f"{name}: a block that nobody sees"
        made = flex_blocks.blocks_of(mask, torch.empty(2, 4, queries, 1), torch.empty(2, 2, keys, 1))
        if made is None:
            assert seen.all()
            continue
        at = torch.arange(2)[:, None, None], None, torch.arange(queries)[:, None], torch.arange(keys)
        assert torch.equal(made.mask_mod(*at).expand(2, queries, keys), seen), name
        partial, full = made.to_dense()[:, 0].bool(), whole.expand(2, -1, -1)
        assert torch.equal(partial, some.expand(2, -1, -1) | full), name


@pytest.mark.parametrize("name", ["padding", "padding_left", "holes", "everything"])
def test_keys_put_together(name: str) -> None:
    mask = replace(every_mask(2, 4, 19, 23)[name], dense=None)
    case = make_case(mask=mask, extras=["softcap", "sinks"], dtype=torch.float64)

    def ours(case: Any) -> tuple[Tensor, None]:
        out = attention(case.q, case.k, case.v, **case.arguments(), backend="compact")
        assert out.transpose(1, 2).is_contiguous()
        return out, None

    assert_same(case, ours)
    order, intervals = put_together(mask, 19, 23)
    seen, moved = dense_mask(mask, 19, 23, CPU), dense_mask(intervals, 19, 23, CPU)
    assert seen is not None and moved is not None and intervals.keys is None
    batch = max(len(order), len(moved))
    seen, moved, order = seen.expand(batch, 1, 19, 23), moved.expand(batch, 1, 19, 23), order.expand(batch, -1)
    assert torch.equal(seen.take_along_dim(order[:, None, None], -1), moved)


def test_what_keys_put_together_cannot_do() -> None:
    masks = every_mask(2, 4, 19, 23)
    refused: list[tuple[dict[str, Any], str]] = [
        ({}, "a mask with keys"),
        ({"mask": masks["everything"]}, "a mask that is not dense"),
        *(({"mask": masks["holes"], "extras": [name]}, "no biases") for name in ("relative", "bias", "dropout")),
    ]
    for sizes, reason in refused:
        case = make_case(**sizes)
        with pytest.raises(ValueError, match=f"'compact' was asked for, which cannot serve: expected {reason}"):
            attention(case.q, case.k, case.v, **case.arguments(), backend="compact")


@pytest.mark.full
@pytest.mark.parametrize("extras", [[], ["softcap"]], ids=str)
def test_flex_compiled(extras: list[str]) -> None:
    case = make_case(**LARGE, mask=Mask(left=30, right=0), extras=extras)
    q, k, v = case.q.detach(), case.k.detach(), case.v.detach()
    capped, blocks = flex._cap(1.5) if extras else None, flex_blocks.blocks_of(case.mask, q, k)
    found = torch.compile(flex._flex, fullgraph=True)(q, k, v, capped, blocks, None, True)
    want, _ = attention_reference(q, k, v, case.mask, case.scores)
    torch.testing.assert_close(found, want)


def test_what_flex_cannot_do() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({}, "no gradients on a CPU"),
        ({"dtype": torch.float64}, "16 bits or fp32"),
        ({"features": 8}, "heads of 16 features or more"),
        ({"mask": every_mask(2, 4, 19, 23)["dense"]}, "a mask that is not dense"),
        *(({"extras": [name]}, f"no {name}") for name in ("relative", "bias", "sinks", "dropout")),
    ]
    for sizes, reason in refused:
        case = make_case(**sizes)
        with pytest.raises(ValueError, match=f"backend: 'flex' was asked for, which cannot serve: expected {reason}"):
            _flex(case)
    case = make_case()
    with torch.no_grad(), pytest.raises(ValueError, match="does not promise the same bits"):
        attention(case.q, case.k, case.v, backend="flex", deterministic=True)


def test_one_kernel_of_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its flash kernel, which a CPU has too."""
    case = make_case(queries=40, keys=40, mask=Mask(right=0))
    kernel = registry.CANDIDATES["flash"]
    monkeypatch.setattr(kernel, "absence", lambda device: None)
    with pytest.raises(
        ValueError, match="cannot serve: expected sizes, dtypes and a device that PyTorch's FLASH_ATTENT"
    ):
        attention(case.q, case.k, case.v, mask=case.mask, backend="flash")
    asked: list[Any] = []
    monkeypatch.setattr("torch.backends.cuda.can_use_flash_attention", lambda params: asked.append(params) or True)
    found = attention(case.q, case.k, case.v, mask=case.mask, backend="flash")
    assert torch.equal(found, attention(case.q, case.k, case.v, mask=case.mask, backend="sdpa"))
    assert asked[0].is_causal and asked[0].enable_gqa and asked[0].attn_mask is None
    with pytest.raises(ValueError, match="expected no softcap"):
        attention(case.q, case.k, case.v, softcap=2.0, backend="flash")


def test_what_pytorchs_own_cannot_do_is_a_choice_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that our kernels serve."""
    monkeypatch.setattr(choosing, "own_backend", lambda *_: "triton")
    monkeypatch.setattr(choosing, "triton_refusal", lambda *_: None)
    case = make_case(queries=40, keys=40, mask=Mask(left=5, right=0), extras=["softcap"])

    def chosen(mask: Mask = case.mask, with_lse: bool = False, **changes: Any) -> str:
        scores = replace(case.scores, **changes)
        arguments = case.q.detach(), case.k.detach(), case.v.detach(), mask, scores, with_lse, False
        return choosing._on_a_gpu(*arguments, count=1 << 30)

    assert chosen() == "auto"
    with forced({MASKED: "flex"}):
        assert chosen() == "flex"
        assert chosen(with_lse=True) == chosen(dropout=0.1) == chosen(sinks=torch.randn(4)) == "auto"
        assert chosen(Mask(left=-1)) == "auto"
    with forced({MASKED: "triton"}):
        assert chosen() == "triton"
    few = case.q.detach(), case.k.detach(), case.v.detach(), Mask(left=5, right=0), Scores(0.25), False, False
    with forced({MASKED: "flex"}), meeting() as met:
        assert choosing._on_a_gpu(*few, count=1 << 10) == "flex", "the tuner is to see it"
    assert [op for op, _ in met] == [MASKED]
    assert choosing._on_a_gpu(*few, count=1 << 10) == "dense"


def test_a_candidate_that_fails_to_compile_is_refused_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(queries=200, keys=200, mask=Mask(right=0))

    def fail(*_: Any) -> Tensor:
        raise torch._dynamo.exc.FailOnRecompileLimitHit("recompile_limit reached")

    monkeypatch.setattr(flex, "_flex", fail)
    with torch.no_grad(), forced({OP: "flex"}):
        found = attention(case.q, case.k, case.v, mask=case.mask)
        assert torch.equal(found, attention(case.q, case.k, case.v, mask=case.mask, backend="sdpa"))
        with pytest.raises(
            ValueError, match="FlexAttention was not compiled: FailOnRecompileLimitHit: recompile_limit"
        ):
            attention(case.q, case.k, case.v, mask=case.mask, backend="flex")
        with pytest.raises(NotServedError, match="recompile_limit reached"):
            attention(case.q, case.k, case.v, backend="flex")


def test_masked_cases_are_problems() -> None:
    tunable = TUNABLES[1]
    for mask, extras in (
        (Mask(left=5, right=0), ["softcap"]),
        (Mask(right=0, keys=torch.rand(2, 40) > 0.5), ["sinks"]),
        (every_mask(2, 4, 40, 40)["ranges"], []),
    ):
        case = make_case(queries=40, keys=40, features=16, v_features=24, mask=mask, extras=extras)
        key = masked_key_of(case.q, case.k, case.v, mask, case.scores, True)
        assert key is not None
        problem = tunable.problem(key.at(64, CPU).smaller(), CPU)
        for found, exact in zip(problem.run("blockwise"), problem.exact(), strict=True):
            torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-4)
        request = Request(*problem.inputs, problem.mask, problem.scores)
        again = masked_key_of(*request[:5], True)
        assert again == key.at(64, CPU)._replace(batch=1), "the problem is of its own case"
    assert str(key) == "2x4(2)x64x64x16, intervals, gradients, float32"
