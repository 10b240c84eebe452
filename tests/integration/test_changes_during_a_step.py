"""Between siblings, and between forward and backward: later siblings see a change, a pending backward raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integration.blocks import assert_same, blocks, check, gradients, inputs, many, pair

pytestmark = pytest.mark.usefixtures("nan_filled")


class TestTheInputChangesBetweenSiblings:
    def test_without_gradients(self) -> None:
        ours, peft = pair()
        check(ours, peft)
        for block in (*blocks(ours), *blocks(peft)):
            block.between = lambda x: x.mul_(0.5)
        x = many()
        with torch.no_grad():
            torch.testing.assert_close(ours(x), peft(x))

    def test_where_autograd_does_not_need_it(self) -> None:
        ours, peft = pair()
        check(ours, peft)
        for model in (ours, peft):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("lora_B" in name)
            for block in blocks(model):
                block.between = lambda x: x.mul_(0.5)
        check(ours, peft)

    def test_where_autograd_needs_it(self) -> None:
        for model in pair():
            blocks(model)[0].between = lambda x: x.mul_(0.5)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                model(inputs()).sum().backward()


class TestStateChangesBetweenSiblings:
    @pytest.mark.parametrize("change", ["disable", "no_grad", "autocast"])
    def test_later_siblings_see_it(self, change: str) -> None:
        ours, peft = pair()
        check(ours, peft)
        managers: list[Any] = []

        def enter(model: Any) -> Callable[[Tensor], None]:
            def between(_: Tensor) -> None:
                made = {
                    "disable": model.disable_adapter,
                    "no_grad": torch.no_grad,
                    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
                }[change]()
                made.__enter__()
                managers.append(made)

            return between

        x, found = inputs(), []
        for model in (ours, peft):
            blocks(model)[0].between = enter(model)
            found.append(model(x))
            managers.pop().__exit__(None, None, None)
        assert found[0].dtype == found[1].dtype
        assert (found[0] - found[1]).norm() < (1e-2 if change == "autocast" else 1e-5) * found[1].norm()


class TestChangesBeforeBackward:
    @pytest.mark.parametrize(
        "change",
        [
            lambda model: model.merge_adapter(),
            lambda model: model.to(torch.bfloat16),
            lambda model: blocks(model)[1].k.base_layer.weight.mul_(1.0),
        ],
        ids=["merge", "dtype", "in place"],
    )
    def test_of_the_base_are_an_error(self, change: Callable[[Any], Any]) -> None:
        ours, _ = pair()
        ours(inputs())
        y = ours(inputs().requires_grad_())
        with torch.no_grad():
            change(ours)
        with pytest.raises(RuntimeError, match="changed or moved between forward and backward"):
            y.sum().backward()

    def test_of_the_adapters_are_an_error_or_do_not_matter(self) -> None:
        ours, peft = pair()
        x = inputs().requires_grad_()
        expected = gradients(peft, x)
        y = ours(x)
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                if "lora_" in name:
                    parameter.mul_(2.0)
        try:
            y.square().sum().backward()
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
            assert_same({"y": y.detach(), "x": x.grad, **found}, expected)

    def test_of_a_scaling_tensor_are_an_error_or_do_not_matter(self) -> None:
        """After `prepare_model_for_compiled_hotswap`, scaling is a tensor that PEFT writes into."""
        ours, peft = pair()
        for model in (ours, peft):
            for block in blocks(model):
                for layer in (block.q, block.k, block.v):
                    layer.scaling["default"] = torch.tensor(1.5)  # type: ignore[union-attr, operator, index]
        x = inputs().requires_grad_()
        expected = gradients(peft, x)
        y = ours(x)
        for block in blocks(ours):
            block.k.scaling["default"].mul_(2.0)  # type: ignore[union-attr, operator, index]
        try:
            y.square().sum().backward()
        except RuntimeError as error:
            assert "scaling" in str(error) or "modified by an inplace operation" in str(error)
        else:
            found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
            assert_same({"y": y.detach(), "x": x.grad, **found}, expected)


def test_double_backward_is_an_error_and_never_a_wrong_number() -> None:
    ours, _ = pair()
    x = inputs().requires_grad_()
    (dx,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()
