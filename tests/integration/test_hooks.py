"""Hooks and replaced forwards, wherever they sit: they run as often as in PEFT, and on the same values."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import fastpeft
from tests.integration.blocks import assert_same, blocks, check, gradients, inputs, pair
from tests.integration.reports import notes, siblings

GROUPED = {frozenset("qkv")}
PLACES: dict[str, Callable[[Any], nn.Module]] = {
    "layer": lambda block: block.k,
    "base_layer": lambda block: block.k.base_layer,
    "lora_A": lambda block: block.k.lora_A["default"],
    "lora_B": lambda block: block.v.lora_B["default"],
    "first layer": lambda block: block.q,
    "first base_layer": lambda block: block.q.base_layer,
    "parent": lambda block: block,
}


@pytest.mark.parametrize("kind", ["forward", "pre", "changes output", "changes input", "backward"])
@pytest.mark.parametrize("place", PLACES)
def test_hooks_run_as_in_peft(place: str, kind: str) -> None:
    ours, peft = pair()
    check(ours, peft)
    x, found = inputs().requires_grad_(), []
    for model in (ours, peft):
        calls: list[str] = []
        for block in blocks(model):
            hang(PLACES[place](block), kind, calls)
        found.append((gradients(model, x), calls))
    assert_same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert found[0][1] or kind.startswith("changes")


@pytest.mark.parametrize("place", ["base_layer", "lora_A", "lora_B", "first base_layer"])
def test_hooks_on_what_is_passed_over_are_named(place: str) -> None:
    ours, peft = pair()
    for block in blocks(ours):
        PLACES[place](block).register_forward_hook(lambda *_: None)
    check(ours, peft)
    assert "a hook on a bypassed Linear" in notes(ours)


def test_global_hooks() -> None:
    ours, peft = pair()
    check(ours, peft)
    seen: list[int] = []
    handle = torch_module.register_module_forward_hook(lambda module, args, y: seen.append(1))
    try:
        counts = []
        for model in (ours, peft):
            seen.clear()
            gradients(model, inputs())
            counts.append(len(seen))
        check(ours, peft)
    finally:
        handle.remove()
    assert counts[0] == counts[1] and "a global module hook" in notes(ours)


@pytest.mark.parametrize("place", ["layer", "base_layer", "lora_A"])
def test_a_forward_replaced_on_the_instance(place: str) -> None:
    ours, peft = pair()
    check(ours, peft)
    for model in (ours, peft):
        for block in blocks(model):
            module = PLACES[place](block)
            module.forward = types.MethodType(doubled(type(module).forward), module)
    check(ours, peft)


def test_a_forward_replaced_on_the_instance_before() -> None:
    peft = pair()[1]
    for block in blocks(peft):
        block.k.forward = types.MethodType(doubled(type(block.k).forward), block.k)
    ours = fastpeft.accelerate(copy.deepcopy(peft))
    for block in blocks(ours):  # a copied bound method has the copy as its self
        assert block.k.forward.__self__ is block.k
    check(ours, peft)
    assert "forward was replaced on the instance" in notes(ours)


class TestAccelerateHooks:
    """The library of that name puts a forward on the instances."""

    @staticmethod
    def align(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.Linear) or hasattr(module, "base_layer"):
                add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))

    def test_before(self) -> None:
        peft = pair()[1]
        self.align(peft)
        ours = fastpeft.accelerate(copy.deepcopy(pair()[1]))
        ours.load_state_dict(peft.state_dict())
        fastpeft.restore(ours)
        self.align(ours)
        fastpeft.accelerate(ours)
        check(ours, peft)
        assert siblings(ours) == GROUPED and not notes(ours)
        check(fastpeft.restore(ours), peft)
        assert {type(m) for m in ours.modules()} == {type(m) for m in peft.modules()}

    def test_on_something_else_than_the_layer_s_forward(self) -> None:
        peft = pair()[1]
        for block in blocks(peft):
            block.k.forward = types.MethodType(doubled(type(block.k).forward), block.k)
        self.align(peft)
        ours = fastpeft.accelerate(copy.deepcopy(peft))
        assert {row.path[-1]: row.note for row in fastpeft.report(ours).left} == {
            "k": "forward was replaced on the instance"
        }

    def test_after(self) -> None:
        ours, peft = pair()
        self.align(ours)
        check(ours, peft)
        assert not notes(ours)
        check(fastpeft.restore(ours), peft)

    @pytest.mark.parametrize("order", ["hook accelerate unhook restore", "hook unhook accelerate restore",
                                       "accelerate hook restore unhook", "accelerate hook unhook restore"])  # fmt: skip
    def test_taken_off_again(self, order: str) -> None:
        peft = pair()[1]
        ours = copy.deepcopy(peft)
        for action in order.split():
            if action == "hook":
                self.align(ours)
            elif action == "unhook":
                for module in ours.modules():
                    remove_hook_from_module(module)
            else:
                getattr(fastpeft, action)(ours)
            check(ours, peft)
        assert {type(m) for m in ours.modules()} == {type(m) for m in peft.modules()}

    def test_hooks_that_do_something_run(self) -> None:
        class Double(ModelHook):
            def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
                return output * 2

        ours, peft = pair()
        check(ours, peft)
        for model in (ours, peft):
            for block in blocks(model):
                add_hook_to_module(block.k.base_layer, Double())  # type: ignore[arg-type]
                add_hook_to_module(block.v, Double())
        check(ours, peft)
        assert "a replaced forward on a bypassed Linear" in notes(ours)

    def test_offloaded_weights_run_peft(self) -> None:
        from accelerate import cpu_offload

        ours, peft = pair()
        x = inputs()
        expected = peft(x)
        cpu_offload(ours, execution_device="cpu")
        for _ in range(2):
            torch.testing.assert_close(ours(x), expected)
        assert notes(ours)


def hang(module: nn.Module, kind: str, calls: list[str]) -> None:
    name = type(module).__name__.removeprefix("Fast")
    if kind == "forward":
        module.register_forward_hook(lambda *_: calls.append(name))
    elif kind == "pre":
        module.register_forward_pre_hook(lambda *_: calls.append(name))
    elif kind == "changes output":
        module.register_forward_hook(lambda module, args, y: y * 1.5)
    elif kind == "changes input":
        module.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    else:
        module.register_full_backward_hook(lambda *_: calls.append(name))


def doubled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, *args, **kwargs: forward(self, *args, **kwargs) * 2
