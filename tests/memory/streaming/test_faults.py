"""What breaks off a step, or comes between two, leaves streamed and offloading layers as they should be."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import LayerPolicy, MemoryPolicy
from fastpeft.layers.kept import KEEPERS
from fastpeft.memory.layers import model_layers
from fastpeft.memory.offloading import Line
from fastpeft.memory.streaming.ring import Ring
from fastpeft_kernels.native.extension import group_extension
from tests.integration.models import batch
from tests.integration.steps import Step
from tests.memory.streaming.test_streaming import _small, ring_of, started, streamed  # noqa: F401
from tests.memory.test_policies import full, seeded

Started = tuple[nn.Module, dict[str, Any], Step]


class Fault(Exception):
    """Ours."""


def fails_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int, error: type[BaseException]) -> None:
    """The call number `at` of a method raises, before it does anything."""
    original, calls = getattr(owner, name), iter(range(10**6))

    def called(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, called)


def in_forward(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    layer = list(model_layers(model).values())[1]
    fails_once(monkeypatch, type(layer.mlp), "forward", 1, KeyboardInterrupt)


def in_backward(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    class Failing(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, dy: Any) -> Any:
            Failing.calls += 1
            if Failing.calls == 2:
                raise Fault
            return dy

    norm = list(model_layers(model).values())[1].post_attention_layernorm
    original = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: Failing.apply(original(x)))


def in_a_copy(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    fails_once(monkeypatch, Line, "copies", 3, KeyboardInterrupt)


def in_giving_up(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    from fastpeft.memory.streaming.stowing import Bundle

    fails_once(monkeypatch, Bundle, "empty", 2, KeyboardInterrupt)


def in_taking(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    fails_once(monkeypatch, Ring, "_note", 4, KeyboardInterrupt)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch, nn.Module], None]] = {
    found.__name__: found for found in (in_forward, in_backward, in_a_copy, in_giving_up, in_taking)
}


@pytest.fixture(scope="module")
def begun() -> Started:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fastpeft.memory.streaming.stowing.SMALLEST", 16)
        torch.manual_seed(0)
        return started()


def policy(how: Any, ring: int) -> MemoryPolicy:
    return MemoryPolicy(LayerPolicy(how, streamed=True), ring=ring)


@pytest.mark.parametrize("fault", ["in_backward", "in_giving_up", *full("in_forward", "in_a_copy", "in_taking")])
@pytest.mark.parametrize(("how", "ring"), [("offload", 2), *(pytest.param(how, ring, marks=pytest.mark.full)
    for how in ("keep", "recompute", "selective") for ring in (1, 2))])  # fmt: skip
def test_the_step_after_one_that_broke_off(
    fault: str, how: str, ring: int, begun: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given, wanted = begun
    fastpeft.accelerate(model, memory=policy(how, ring))
    values = {name: value.clone() for name, value in model.state_dict().items()}
    with monkeypatch.context() as patched:
        FAULTS[fault](patched, model)
        with pytest.raises((Fault, KeyboardInterrupt)):
            for _ in range(2):
                seeded(model, given)
    assert all(torch.equal(p, values[n]) for n, p in model.named_parameters() if not p.requires_grad)
    for _ in range(2):
        assert seeded(model, given).equals(wanted)
    places = ring_of(model)
    assert len(places.filled) <= ring and len(set(map(id, places.filled))) == len(places.filled)
    places.empty()
    assert not any(s.there.untyped_storage().nbytes() for bundle in places.bundles for s in bundle.stowed)


@pytest.mark.parametrize("how", ["offload", *full("keep", "recompute")])
def test_evaluation_and_generation_between_steps(how: str, begun: Started) -> None:
    model, given, wanted = begun
    fastpeft.accelerate(model)
    ids = {"input_ids": given["input_ids"][:1], "max_new_tokens": 3, "do_sample": False}

    def between() -> tuple[torch.Tensor, torch.Tensor]:
        model.eval()
        with torch.no_grad():
            loss = model(**given).loss
        tokens = model.generate(**ids)  # type: ignore[operator]
        model.train()
        return loss, tokens

    loss, tokens = between()
    fastpeft.accelerate(model, memory=policy(how, 2))
    for _ in range(2):
        assert seeded(model, given).equals(wanted)
        found = between()
        assert torch.equal(found[0], loss) and torch.equal(found[1], tokens)


def test_two_models_at_a_time(begun: Started) -> None:
    """Their forwards and backwards interleaved."""
    first, given, _ = begun
    fastpeft.accelerate(first)
    second = copy.deepcopy(first)
    other = batch(second)

    def both() -> list[Step]:
        torch.manual_seed(4)
        losses = []
        for model, rows in ((first, given), (second, other)):
            model.zero_grad()
            losses.append(model(**rows).loss)
        for loss in losses:
            loss.backward()
        return [
            Step(loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            for model, loss in zip((first, second), losses, strict=True)
        ]

    both()
    wanted = both()
    for model in (first, second):
        fastpeft.accelerate(model, memory=policy("recompute", 1))
    assert ring_of(first) is not ring_of(second)
    for _ in range(2):
        assert all(map(Step.equals, both(), wanted))


def test_a_model_that_goes_takes_its_weights_along() -> None:
    """The C++ of its groups holds them too, and is unknown to the search for garbage."""
    group_extension(wait=True)
    model, given, _ = started(lora={"lora_dropout": 0.0})
    streamed(model, "keep")
    seeded(model, given)
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    assert not any(weight() is not None for weight in weights)


def test_a_weight_that_outlives_its_layer_has_its_values() -> None:
    model, _, _ = started()
    weight = streamed(model, "keep").bundles[0].stowed[0].tensor
    wanted = weight.clone()
    del model
    gc.collect()
    assert torch.equal(weight, wanted) and torch.equal(copy.deepcopy(weight), wanted)
    assert weight.data_ptr() and torch.equal(weight.detach(), wanted)
    assert torch.equal(copy.deepcopy(weight), wanted)


def test_a_model_that_goes_waits_for_its_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU they may be under way on a stream of their own, from and into memory that goes with the model."""
    model, given, _ = started()
    streamed(model, "offload")
    ring = ring_of(model)
    waited: list[Line] = []
    line = Line(torch.device("cpu"))
    line.side = object()  # type: ignore[assignment]
    monkeypatch.setattr(line, "copies", lambda pairs: [into.copy_(source) for into, source in pairs] and None)
    monkeypatch.setattr(line, "current", lambda: None)
    monkeypatch.setattr(line, "finish", lambda: waited.append(line))
    ring._lines = {torch.device("cpu"): line}
    model(**given).loss.backward()
    hosts = [weakref.ref(stowed.host) for bundle in ring.bundles for stowed in bundle.stowed]
    count, keepers = len(ring.bundles), len(KEEPERS)
    assert not waited and keepers > 0
    del model, ring
    gc.collect()
    assert len(waited) == count and not any(host() is not None for host in hosts) and len(KEEPERS) < keepers
