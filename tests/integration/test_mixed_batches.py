"""Batches in which each row has an adapter of its own: PEFT's numbers forward, and a loop's over rows backward."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import fastpeft
from fastpeft.layers.lora import FastLoraLayer
from tests.integration.blocks import Stack, assert_same, blocks, inputs, pair

NAMES = ["b", "__base__", "default", "b", "c"]


def several(**config: Any) -> tuple[Any, Any]:
    """(accelerated, plain) with adapters of differing ranks and scalings; "c" has no k."""
    _, peft = pair(Stack(), **config)
    peft.add_adapter("b", LoraConfig(target_modules=["q", "k", "v"], r=3, lora_alpha=7, init_lora_weights=False))
    peft.add_adapter("c", LoraConfig(target_modules=["q", "v"], r=6, use_rslora=True, init_lora_weights=False))
    peft.base_model.set_adapter(["default", "b", "c"])
    return fastpeft.accelerate(copy.deepcopy(peft)), peft


def row_by_row(model: Any, x: Tensor, names: list[str]) -> Tensor:
    """Each row by itself, with its adapter alone active, all of them trained."""
    results = []
    for row, name in zip(x, names, strict=True):
        if name != "__base__":
            model.base_model.set_adapter(name)
        with model.disable_adapter() if name == "__base__" else nullcontext():
            results.append(model(row.unsqueeze(0)))
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in parameter_name)
    return torch.cat(results)


def gradients(model: nn.Module, y: Tensor, x: Tensor) -> dict[str, Tensor]:
    y.square().sum().backward()
    assert x.grad is not None
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **found}


def fused_calls(model: nn.Module) -> int:
    layers = [module for module in model.modules() if isinstance(module, FastLoraLayer)]
    assert layers and all(set(layer.fastpeft_calls) == {"fused"} for layer in layers)
    return sum(layer.fastpeft_calls["fused"] for layer in layers)


def test_forward_is_peft_s() -> None:
    ours, peft = several()
    ours.eval()
    peft.eval()
    x = inputs(5, 3)
    for names in (NAMES, ["c"] * 5, NAMES[::-1]):
        expected = peft(x, adapter_names=names)
        torch.testing.assert_close(ours(x, adapter_names=names), expected)
        with torch.no_grad():
            torch.testing.assert_close(ours(x, adapter_names=names), expected)
    fused_calls(ours)


def test_gradients_are_those_of_each_row_alone() -> None:
    ours, peft = several()
    x = inputs(5, 3)
    exact, wide = peft.double(), x.double().requires_grad_()
    expected = gradients(exact, row_by_row(exact, wide, NAMES), wide)
    for _ in range(2):  # the first finds siblings
        ours.zero_grad(set_to_none=True)
        own = x.clone().requires_grad_()
        with fastpeft.mixed_batch(ours, NAMES):
            found = gradients(ours, ours(own), own)
    assert_same(found, expected)
    assert fused_calls(ours) >= 12


def test_a_row_does_not_reach_another_s_adapter() -> None:
    """An adapter that is not finite any more changes nothing for the other rows, nor in the others' gradients."""
    ours, _ = several()
    layer: Any = blocks(ours)[0].q
    names = ["default", "b", "c", "default"]

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        ours.zero_grad(set_to_none=True)
        x = inputs(4, 3).requires_grad_()
        with fastpeft.mixed_batch(ours, names):
            y = ours(x)
        return y.detach(), gradients(ours, y, x)

    run()  # finds siblings
    torch.manual_seed(0)
    y, expected = run()
    with torch.no_grad():
        layer.lora_A["b"].weight.fill_(float("inf"))
        layer.lora_B["b"].weight.fill_(float("nan"))
    torch.manual_seed(0)
    spoilt, found = run()
    others = [0, 2, 3]
    torch.testing.assert_close(spoilt[others], y[others])
    torch.testing.assert_close(found["x"][others], expected["x"][others])
    assert not spoilt[1].isfinite().any()
    for name in expected:
        if ".default." in name or ".c." in name:
            torch.testing.assert_close(found[name], expected[name])


def test_dropout_is_each_row_s_own() -> None:
    ours, _ = several(lora_dropout=0.5)
    x = inputs(2, 200)
    with fastpeft.mixed_batch(ours, ["default", "b"]), torch.no_grad():
        first, second = ours(x), ours(x)
    assert not torch.equal(first[0], second[0])  # "default" drops
    assert torch.equal(first[1], second[1])


def test_checkpointing_within_it() -> None:
    ours, _ = several()
    x, plain = inputs(5, 3).requires_grad_(), None
    with fastpeft.mixed_batch(ours, NAMES):
        ours(x)
        for use in (False, True):
            ours.zero_grad(set_to_none=True)
            x.grad = None
            y = torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False) if use else ours(x)
            found = gradients(ours, y, x)
            found = {name: value.clone() for name, value in found.items()}
            if plain is not None:
                assert_same(found, plain)
            plain = found


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("default", TypeError, "adapter_names: expected the name of an adapter for each row, got 'default'"),
        (["nobody"], ValueError, "adapter_names: expected any of .*'default'.* and '__base__', got .*'nobody'"),
    ],
)
def test_wrong_names(names: Any, error: type[Exception], message: str) -> None:
    ours, _ = several()
    with pytest.raises(error, match=message), fastpeft.mixed_batch(ours, names):
        pass


def test_another_number_of_rows() -> None:
    ours, _ = several()
    with pytest.raises(ValueError, match="adapter_names"), fastpeft.mixed_batch(ours, ["b"]):
        ours(inputs(2, 3))


def test_hotswapped_weights_are_read() -> None:
    """`peft.utils.hotswap` writes into the parameters that are there."""
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    ours, peft = several()
    state = {name: 0.1 * torch.randn_like(value) for name, value in peft.state_dict().items() if ".b.weight" in name}
    x = inputs(2, 3).requires_grad_()
    for model in (ours, peft):
        model.base_model.set_adapter("b")
        before = model(x)
        hotswap_adapter_from_state_dict(model, dict(state), adapter_name="b", config=model.peft_config["b"])
        assert not torch.equal(model(x), before)
    torch.testing.assert_close(ours(x), peft(x))
