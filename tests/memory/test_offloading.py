"""Inputs of layers in host memory: what stays on the device, what comes back, and what happens between."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpeft
from fastpeft import LayerPolicy
from fastpeft.memory import offloading
from fastpeft.memory.layers import model_layers
from fastpeft.memory.offloading import LEAVING, Line, Parked, parking
from tests.integration.models import batch, make, make_base, with_lora
from tests.integration.steps import step
from tests.memory.test_policies import seeded, started

OFFLOAD = LayerPolicy("offload")
CPU = torch.device("cpu")


@pytest.fixture
def parked(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Parked]]:
    """All that were parked since, in order."""
    found: list[weakref.ref[Parked]] = []
    park = Line.park

    def noted(self: Line, *given: Any) -> Parked:
        one = park(self, *given)
        found.append(weakref.ref(one))
        return one

    monkeypatch.setattr(Line, "park", noted)
    return found


def test_few_inputs_are_on_the_device_and_none_after_backward(parked: list[weakref.ref[Parked]]) -> None:
    model = fastpeft.accelerate(with_lora(make_base(num_hidden_layers=5)), memory=OFFLOAD)
    given = batch(model)
    step(model, given)
    parked.clear()
    inputs: list[weakref.ref[Tensor]] = []
    hooks = [m.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0]))) for m in layers(model)]
    loss = model(**given).loss
    for hook in hooks:
        hook.remove()
    held = [one() for one in parked]
    assert [each is not None and each.there is not None for each in held] == [False] * (5 - LEAVING) + [True] * LEAVING
    assert [each() is not None for each in inputs[: 5 - LEAVING]] == [False] * (5 - LEAVING)
    loss.backward()
    assert all(each is not None and each.there is None for each in held)
    del held, loss
    assert all(one() is None for one in parked)


def layers(model: nn.Module) -> list[nn.Module]:
    return list(model_layers(model).values())


def test_each_is_fetched_one_layer_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastpeft.accelerate(with_lora(make_base(num_hidden_layers=5)), memory=OFFLOAD)
    given = batch(model)
    step(model, given)
    loss = model(**given).loss
    order: list[tuple[str, int]] = []
    fetch, back = Parked.fetch, Parked.back
    monkeypatch.setattr(Parked, "back", lambda p: (order.append(("back", p.place[1])), back(p))[1])
    monkeypatch.setattr(Parked, "fetch", lambda p: (p.there is None and order.append(("fetch", p.place[1])), fetch(p)))
    loss.backward()
    assert order == [
        ("back", 4), ("back", 3), ("fetch", 2), ("back", 2), ("fetch", 1), ("back", 1), ("fetch", 0), ("back", 0),
    ]  # fmt: skip


def test_several_forwards_before_backward_and_gradients_that_add_up() -> None:
    found = []
    model, _, _ = started()
    batches = [batch(model) for _ in range(3)]
    for memory in (None, OFFLOAD):
        fastpeft.accelerate(model, memory=memory)
        torch.manual_seed(3)
        first, second = (model(**given).loss for given in batches[:2])
        first.backward(retain_graph=True)
        (second + first).backward()
        model(**batches[2]).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    assert found[0].keys() == found[1].keys() != set()
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_nothing_is_parked_where_no_backward_follows(parked: list[weakref.ref[Parked]]) -> None:
    model, given, _ = started()
    model.eval()
    wanted = model(**given).logits, model.generate(given["input_ids"][:1], max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    fastpeft.accelerate(model, memory=OFFLOAD)
    got = model(**given).logits, model.generate(given["input_ids"][:1], max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    assert all(torch.equal(*pair) for pair in zip(wanted, got, strict=True))
    model.train()
    with torch.no_grad():
        model(**given)
    assert not parked


def test_reentrant_checkpointing_parks_too(parked: list[weakref.ref[Parked]]) -> None:
    model, given, wanted = started()
    model.enable_input_require_grads()  # type: ignore[operator]
    model.gradient_checkpointing_enable({"use_reentrant": True})  # type: ignore[operator]
    fastpeft.accelerate(model, memory=OFFLOAD)
    assert seeded(model, given).equals(wanted) and len(parked) == 2


def test_under_autocast() -> None:
    model, given, _ = started()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = seeded(model, given)
        assert seeded(fastpeft.accelerate(model, memory=OFFLOAD), given).equals(wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_strides_and_bits_come_back(dtype: torch.dtype) -> None:
    line, given = Line(CPU), torch.randn(4, 3, 5).to(dtype).transpose(0, 2)
    given[0, 0, 0] = float("nan")
    one = line.park(given, (0, 0))
    one.let_go()
    back = one.back()
    assert back.dtype == dtype and back.stride() == given.stride() and back.data_ptr() != given.data_ptr()
    torch.testing.assert_close(back, given, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("late", [False, True])
def test_a_write_is_an_error_unless_the_copy_was_made_before(late: bool) -> None:
    leaf = torch.randn(3, requires_grad=True)
    x = leaf * 1
    wanted = 2 * x.detach().clone()
    with parking(x, (0, 0)):
        y = x.square().sum()
    if late:
        line = offloading._LINES[CPU]
        for _ in range(LEAVING):
            line.park(torch.zeros(1), (1, 0))
    with torch.no_grad():
        x.zero_()
    if late:
        y.backward()
        assert leaf.grad is not None and torch.equal(leaf.grad, wanted)
        return
    with pytest.raises(RuntimeError, match="input of an offloaded layer was written in place"):
        y.backward()


def test_pageable_memory_where_none_can_be_pinned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    like = torch.empty_like

    def without_pins(tensor: Tensor, **given: Any) -> Tensor:
        if given.pop("pin_memory", False):
            raise RuntimeError("no memory can be locked")
        return like(tensor, **given)

    monkeypatch.setattr(torch, "empty_like", without_pins)
    line, given = Line(CPU), torch.randn(5)
    line.pins = True
    with caplog.at_level(logging.WARNING, "fastpeft"):
        parked = [line.park(given, (0, place)) for place in range(3)]
    assert [record.message for record in caplog.records] == [
        "offloaded layers go through pageable host memory, which is slower: no memory can be locked"
    ]
    assert all(torch.equal(one.back(), given) for one in parked)


def test_a_layer_whose_input_comes_by_name_is_recomputed() -> None:
    model = fastpeft.accelerate(make(), memory=OFFLOAD)
    (first, *_), found = layers(model), []
    hook = first.register_forward_pre_hook(lambda _, args, kw: found.append((args, kw)), with_kwargs=True)
    given = batch(model)
    step(model, given)
    hook.remove()
    (x,), named = found[-1]
    first(hidden_states=x.detach(), **named)[0].sum().backward()
    notes = [row.note for row in fastpeft.report(model).rows if row.kind == "memory"]
    assert "its first argument is no tensor" in notes[0] and not notes[1]
