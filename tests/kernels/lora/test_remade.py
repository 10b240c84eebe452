"""Inputs behind an activation: not kept, made again with the same bits; anything else that stands between is kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import ref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastpeft_kernels.lora import LoraProjection, lora_linear_group
from fastpeft_kernels.native.extension import group_extension
from tests.kernels.lora.groups import parameters, projection

gelu_tanh = partial(F.gelu, approximate="tanh")
WAYS = [
    pytest.param(None, id="Python"),
    pytest.param(True, id="C++", marks=pytest.mark.skipif(group_extension(wait=True) is None, reason="no compiler")),
]


@pytest.fixture(params=WAYS, autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is None:
        monkeypatch.setattr("fastpeft_kernels.lora.direct.group_extension", lambda: None)


def pair(dtype: torch.dtype = torch.float32, **fields: Any) -> tuple[LoraProjection, LoraProjection]:
    named = {"dtype": dtype, "lora_dtype": dtype, **fields}
    return projection(16, 40, 4, **named), projection(40, 16, 3, **named)


def forward(x: Tensor, up: LoraProjection, down: LoraProjection, between: Callable[[Tensor], Tensor]) -> Tensor:
    return lora_linear_group(between(lora_linear_group(x, [up])[0]), [down])[0]


def results(x: Tensor, parts: tuple[LoraProjection, ...], between: Callable[[Tensor], Tensor]) -> tuple[Any, list[Any]]:
    """Whether what the second one reads is kept; the output and all gradients."""
    read: list[Any] = []

    def noted(pre: Tensor) -> Tensor:
        h = between(pre)
        read.append(ref(h))
        return h

    torch.manual_seed(5)
    y = forward(x, *parts, noted)
    kept = read[0]() is not None
    generator = torch.Generator().manual_seed(3)
    dy = torch.randn(y.shape, generator=generator).to(y.dtype)
    gradients = torch.autograd.grad(y, [x, *parameters(list(parts))], dy)
    return kept, [y, *gradients]


def apart(between: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same with a node of no effect behind, so that the input is kept."""
    return lambda x: between(x).view_as(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [F.gelu, gelu_tanh, F.silu])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_bits(activation: Callable[[Tensor], Tensor], dtype: torch.dtype, dropout: float) -> None:
    parts = pair(dtype, dropout=dropout)
    x = torch.randn(7, 16).to(dtype).requires_grad_()
    kept, ours = results(x, parts, activation)
    more, theirs = results(x, parts, apart(activation))
    assert (kept, more) == (False, True)
    assert all(map(torch.equal, ours, theirs))


BETWEEN = {
    "twice": lambda x: F.gelu(F.gelu(x)),
    "scaled before": lambda x: F.gelu(x * 2.0),
    "scaled after": lambda x: F.gelu(x) * 2.0,
    "dropped": lambda x: F.dropout(F.gelu(x), 0.3),
    "written into": lambda x: F.gelu(x).mul_(2.0),
    "gated": lambda x: F.gelu(x) * x,
    "relu": F.relu,
    "a part": lambda x: F.gelu(x[:, :]),
    "sigmoid": torch.sigmoid,
}


@pytest.mark.parametrize("between", BETWEEN)
def test_what_else_stands_between(between: str) -> None:
    parts, x = pair(), torch.randn(7, 16, requires_grad=True)
    ours, theirs = (results(x, parts, way(BETWEEN[between]))[1] for way in (lambda b: b, apart))
    assert all(map(torch.equal, ours, theirs))


def test_a_result_that_is_not_the_last() -> None:
    (up, down), other = pair(), projection(16, 40, 4)
    x = torch.randn(7, 16, requires_grad=True)

    def between(pre: Tensor) -> Tensor:
        lora_linear_group(x, [other])
        return F.gelu(pre)

    assert all(map(torch.equal, results(x, (up, down), between)[1], results(x, (up, down), F.gelu)[1]))


def test_one_result_of_several_and_another_thread() -> None:
    (up, down), x = pair(), torch.randn(7, 16, requires_grad=True)
    found: list[Any] = []
    pre = lora_linear_group(x, [up])[0]
    h = F.gelu(pre)
    thread = threading.Thread(target=lambda: found.append(lora_linear_group(h, [down])[0]))
    thread.start()
    thread.join()
    wanted = [x, *parameters([up, down])]
    ours = torch.autograd.grad(found[0].sum(), wanted)
    theirs = torch.autograd.grad(forward(x, up, down, F.gelu).sum(), wanted)
    assert all(map(torch.equal, ours, theirs))


def test_a_write_into_what_is_kept_is_noticed() -> None:
    (up, down), x = pair(), torch.randn(7, 16, requires_grad=True)
    pre = lora_linear_group(x, [up])[0]
    y = lora_linear_group(F.gelu(pre), [down])[0]
    with torch.no_grad():
        pre.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_whole_and_in_part(use_reentrant: bool) -> None:
    (up, down), x = pair(), torch.randn(7, 16, requires_grad=True)
    wanted = [x, *parameters([up, down])]

    def first(x: Tensor) -> Tensor:
        return F.gelu(lora_linear_group(x, [up])[0])

    def last(h: Tensor) -> Tensor:
        return lora_linear_group(h, [down])[0]

    again = partial(checkpoint, use_reentrant=use_reentrant)
    outputs = [again(lambda x: last(first(x)), x), last(again(first, x)), again(last, first(x))]
    theirs = forward(x, up, down, F.gelu)
    theirs.sum().backward()
    expected = [t.grad.clone() for t in wanted]  # type: ignore[union-attr]
    for y in outputs:
        for t in wanted:
            t.grad = None
        y.sum().backward()
        assert torch.equal(y, theirs) and all(torch.equal(t.grad, e) for t, e in zip(wanted, expected, strict=True))


def test_nothing_is_held() -> None:
    (up, _), x = pair(), torch.randn(7, 16, requires_grad=True)
    pre = lora_linear_group(x, [up])[0]
    seen, node = ref(pre), pre.grad_fn
    del pre
    assert node is not None and seen() is None


def test_hooks_take_the_input_itself() -> None:
    """Else what offloads activations would keep the wide one where it is, being another's memory already."""
    parts, x, taken = pair(), torch.randn(7, 16, requires_grad=True), []
    h = []

    def between(pre: Tensor) -> Tensor:
        h.append(F.gelu(pre))
        return h[0]

    with torch.autograd.graph.saved_tensors_hooks(lambda t: taken.append(t.data_ptr()) or t, lambda t: t):
        forward(x, *parts, between)
    assert h[0].data_ptr() in taken


def test_checkpointed_with_a_hook_that_holds_results_in_forward_alone() -> None:
    (up, down), x, held = pair(), torch.randn(7, 16, requires_grad=True), []

    def part(x: Tensor) -> Tensor:
        pre = lora_linear_group(x, [up])[0]
        if not held:
            held.append(pre)
        return lora_linear_group(F.gelu(pre), [down])[0]

    checkpoint(part, x, use_reentrant=False).sum().backward()
