"""A forward that fails half-way, and what may stay behind after any: nothing."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from tests.integration.blocks import blocks, check, inputs, many, pair
from tests.integration.reports import siblings

GROUPED = {frozenset("qkv")}


class TestErrorsHalfWay:
    def test_the_next_step_is_right_and_nothing_stays(self) -> None:
        ours, peft = pair()
        check(ours, peft)
        x = inputs()
        for block in blocks(ours):
            block.between = fail
        before = tensors_alive()
        with pytest.raises(ZeroDivisionError):
            ours(x)
        assert count_new(before) == 0
        for block in blocks(ours):
            del block.between
            block.between = lambda x: None
        check(ours, peft)

    def test_an_error_in_the_first_forward_does_not_cost_the_siblings(self) -> None:
        ours, peft = pair()
        blocks(ours)[1].between = fail
        ours.register_forward_pre_hook(
            lambda model, args: model.register_forward_hook(lambda *_: None, always_call=True) and None
        )
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                ours(inputs())
        blocks(ours)[1].between = lambda x: None
        check(ours, peft)
        assert siblings(ours) == GROUPED

    def test_a_model_that_cannot_run_without_gradients(self) -> None:
        """Such as one that differentiates inside its forward: no siblings, the right numbers."""
        ours, peft = pair()
        for model in (ours, peft):
            blocks(model)[1].between = needs_gradients
        check(ours, peft, inputs().requires_grad_())
        assert not siblings(ours)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in ours.modules())


class TestNothingIsHeld:
    def test_after_a_forward(self) -> None:
        ours, _ = pair()
        x = many()
        with torch.no_grad():
            ours(x)
            before = tensors_alive()
            ours(x)
        assert count_new(before) == 0

    def test_for_projections_that_are_not_called_this_time(self) -> None:
        ours, peft = pair()
        check(ours, peft)
        for block in (*blocks(ours), *blocks(peft)):
            block.skip = True
        x = many()
        with torch.no_grad():
            before = tensors_alive()
            y = ours(x)
            assert count_new(before) == 1
        torch.testing.assert_close(y, peft(x))


def fail(_: Tensor) -> None:
    raise ZeroDivisionError


def needs_gradients(x: Tensor) -> None:
    torch.autograd.grad((x * x).sum(), x)


def tensors_alive() -> list[Tensor]:
    """Held by the list, so that what other tests left behind neither goes away nor gives its address to another."""
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]


def count_new(before: list[Tensor]) -> int:
    known = set(map(id, before))
    return sum(id(tensor) not in known for tensor in tensors_alive())
