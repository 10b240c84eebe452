"""Decoded weights that wait for a second product."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from fastpeft_kernels.lora.parts import decoded
from fastpeft_kernels.quant import encode_4bit
from fastpeft_kernels.weights import FourBitWeight
from fastpeft_kernels.weights.held import holding

FP32 = torch.float32
ONE = 8 * 64 * 4
"""Bytes of one weight."""


def weights(count: int) -> list[FourBitWeight]:
    return [FourBitWeight(encode_4bit(torch.randn(8, 64), "nf4", 64)) for _ in range(count)]


def in_backward(*calls: Callable[[], None]) -> None:
    """Each is called in a node of its own, in order."""
    x = torch.ones((), requires_grad=True)
    y = x
    for call in reversed(calls):
        y = y * 2
        y.register_hook(lambda _, call=call: call())
    y.backward()


def test_each_is_decoded_once_for_both_and_let_go_by_the_second() -> None:
    read, unread = weights(2)
    seen: list[Tensor | None] = []

    def again() -> None:
        with holding(2 * ONE):
            seen.extend([decoded(read, FP32), decoded(unread, FP32)])
            assert decoded(read, FP32) is seen[0]

    def later() -> None:
        assert decoded(read, FP32) is seen[0] and torch.equal(read.decode(), decoded(read, FP32))
        assert decoded(read, FP32) is not seen[0] and decoded(unread, torch.bfloat16).dtype == torch.bfloat16

    in_backward(again, later)
    last = weakref.ref(seen.pop())
    assert last() is None, "what backward did not read outlives it"
    assert torch.equal(decoded(unread, FP32), unread.decode())


def test_what_does_not_fit_is_decoded_again() -> None:
    first, second = weights(2)

    def again() -> None:
        with holding(ONE):
            one, other = decoded(first, FP32), decoded(second, FP32)
            assert decoded(first, FP32) is one and torch.equal(other, second.decode())

    in_backward(again, lambda: None)


def test_another_layer_s_are_let_go() -> None:
    (weight,) = weights(1)
    seen: list[weakref.ref[Tensor]] = []

    def again() -> None:
        with holding(ONE):
            seen.append(weakref.ref(decoded(weight, FP32)))

    def other() -> None:
        with holding(ONE):
            assert seen[0]() is None

    in_backward(again, other)


def test_a_weight_that_was_written_is_decoded_again() -> None:
    (weight,) = weights(1)

    def again() -> None:
        with holding(ONE):
            decoded(weight, FP32)

    def later() -> None:
        weight.packed.tensors[0].zero_()
        assert torch.equal(decoded(weight, FP32), weight.decode())

    in_backward(again, later)
