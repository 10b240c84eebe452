"""Cross-entropy without logits: the definition's numbers, whatever head, options and sizes."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft_kernels.loss import blocks

from .heads import HEADS, Case, hold, make_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "z": {"z_loss": 1e-2},
    "capped": {"softcap": 2.0, "scale": 1.5},
    "weighted": {"class_weight": True, "token_weight": True},
    "everything": {
        "label_smoothing": 0.2,
        "z_loss": 1e-3,
        "softcap": 3.0,
        "scale": 0.7,
        "class_weight": True,
        "token_weight": True,
    },
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_ON_CPU", (4, 7))


pytestmark = pytest.mark.usefixtures("small_blocks", "nan_filled")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    head, options = HEADS[draw(st.sampled_from(sorted(HEADS)))], OPTIONS[draw(st.sampled_from(sorted(OPTIONS)))]
    lead = draw(st.sampled_from([(1,), (2, 3), (11,), (4, 1, 2), (9,)]))
    sizes: dict[str, int] = {}
    if head.get("storage") != "four_bit":
        sizes = {"features": draw(st.integers(1, 20)), "words": draw(st.sampled_from([1, 2, 7, 14, 23, 90]))}
    ignored = draw(st.sampled_from([0.0, 0.3, 0.8]))
    dtype = draw(st.sampled_from(DTYPES[:3]))
    return make_case(*lead, dtype=dtype, ignored=ignored, **sizes, **head, **options)


@settings(max_examples=50)
@given(case=cases())
def test_drawn(case: Case) -> None:
    hold(case)


def _exact(head: str, options: str) -> None:
    """In fp64 nothing but the last digits may differ."""
    case = make_case(11, dtype=torch.float64, **HEADS[head], **OPTIONS[options])
    out, want = case.call(reduction="none", **case.everything), case.definition()
    torch.testing.assert_close(tuple(out), tuple(want), rtol=1e-10, atol=1e-12)
    given, given_log = torch.randn(2, 11)
    ours, theirs = case.gradients(out, given, given_log), case.gradients(want, given, given_log)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_with_everything(head: str) -> None:
    _exact(head, "everything")


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option(options: str) -> None:
    _exact("low_rank", options)


@pytest.mark.full
@pytest.mark.parametrize("head, options, dtype", list(product(HEADS, OPTIONS, DTYPES)))
def test_every_combination(head: str, options: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_ON_CPU", (24, 50))
    if dtype == torch.float64:  # the oracle's own
        _exact(head, options)
        return
    for lead in ((240,), (24, 11)):  # of fewer numbers PyTorch's largest error is a matter of luck
        hold(make_case(*lead, dtype=dtype, words=160, **HEADS[head], **OPTIONS[options]))


@pytest.mark.parametrize("trained", (False, True))
def test_gradcheck(trained: bool) -> None:
    case = make_case(5, features=3, words=9, dtype=torch.float64, rank=2, bias=True, frozen=not trained, z_loss=0.1)
    names = [name for name, x in case.tensors.items() if x.requires_grad]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        other = Case({**case.tensors, **dict(zip(names, tensors, strict=True))}, case.labels, case.stored)
        return other.call(reduction="none", **case.options).loss

    assert torch.autograd.gradcheck(function, [case.tensors[name] for name in names])
