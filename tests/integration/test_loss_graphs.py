"""Losses of one's own over a model's logits: their gradients go where the graph of the logits goes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft.layers.head_call import HeadCall
from fastpeft.layers.lazy_logits import LazyLogits
from tests.integration.models import VOCABULARY, batch, make
from tests.integration.steps import step

Outputs = tuple[Tensor, dict[str, Tensor]]


class Tenth(torch.autograd.Function):
    """Its input, and a tenth of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / 10


def entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def detached(outputs: Any, labels: Tensor) -> Tensor:
    leaf = outputs.logits.detach().requires_grad_()
    entropy(leaf, labels).backward()
    return leaf.grad


def scaled(outputs: Any, labels: Tensor) -> Tensor:
    loss = entropy(Tenth.apply(outputs.logits), labels)
    loss.backward()
    return loss.detach()


def retained(outputs: Any, labels: Tensor) -> Tensor:
    logits = outputs.logits
    logits.retain_grad()
    entropy(logits, labels).backward()
    return logits.grad


def checkpointed(outputs: Any, labels: Tensor) -> Tensor:
    """The logits' graph is needed twice."""
    loss = checkpoint(entropy, outputs.logits, labels, use_reentrant=True) + outputs.loss
    loss.backward()
    return loss.detach()


def biased(outputs: Any, labels: Tensor) -> Tensor:
    bias = torch.ones(VOCABULARY, requires_grad=True)
    loss = entropy(outputs.logits + bias, labels)
    loss.backward()
    return bias.grad


def written(outputs: Any, labels: Tensor) -> Tensor:
    """What was added is another by the time of the loss, and of the values."""
    constant = torch.arange(VOCABULARY) / 50
    logits = outputs.logits + constant
    constant[3] = 100.0
    loss = entropy(logits, labels)
    loss.backward()
    return torch.cat([loss.detach()[None], logits.log_softmax(-1).detach().flatten()])


def gradients(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_the_same(plain: Outputs, ours: Outputs) -> None:
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-4, atol=1e-6)
    assert ours[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use", [detached, scaled, retained, checkpointed, biased, written])
def test_gradients_of_further_losses(use: Callable[[Any, Tensor], Tensor]) -> None:
    model = make()
    inputs, found = batch(model), []
    for _ in range(2):
        model.zero_grad()
        found.append((use(model(**inputs), inputs["labels"]), gradients(model)))
        fastpeft.accelerate(model)
        model(**inputs)
    assert_the_same(found[0], found[1])


def test_a_row_of_another_call_s_logits_as_bias() -> None:
    model = make()
    inputs, found = batch(model), []
    for _ in range(2):
        model.zero_grad()
        row = model(**inputs).logits[0, 0]
        loss = entropy(model(**inputs).logits + row, inputs["labels"])
        loss.backward()
        found.append((loss.detach(), gradients(model)))
        fastpeft.accelerate(model)
        model(**inputs)
    assert_the_same(found[0], found[1])


def test_a_backward_hook_around_the_head() -> None:
    """On PEFT's module around a head that is saved as a whole."""
    model = make(modules_to_save=["lm_head"])
    inputs, found, seen = batch(model), [], list[Tensor]()

    def halve(_: Any, dx: tuple[Tensor, ...], dlogits: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(dlogits[0].clone())
        return (dx[0] / 2,)

    model.get_base_model().lm_head.register_full_backward_hook(halve)
    for _ in range(2):
        model.zero_grad()
        model(**inputs).loss.backward()
        found.append((seen.pop(), gradients(model)))
        fastpeft.accelerate(model)
        model(**inputs)
    assert_the_same(found[0], found[1])


def test_a_loss_after_the_optimizer_s_step_is_an_error() -> None:
    model = make(modules_to_save=["lm_head"])
    inputs = batch(model)
    fastpeft.accelerate(model)
    outputs = model(**inputs)
    entropy(outputs.logits, inputs["labels"])
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="read before the head or its input changes"):
        entropy(outputs.logits, inputs["labels"])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_nothing_of_a_call_outlives_its_step(name: str) -> None:
    """Gemma 2's tanh saves its result, and is not run backward where the loss is computed from hidden states."""
    model = fastpeft.accelerate(make(name))
    given = batch(model)
    step(model, given)
    before = {id(each) for each in gc.get_objects() if type(each) in (HeadCall, LazyLogits)}
    step(model, given)
    model(**given)  # nor without a backward pass
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) in (HeadCall, LazyLogits) and id(each) not in before]
