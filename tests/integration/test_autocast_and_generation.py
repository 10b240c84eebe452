"""Whole models under autocast, and generating text before, between and after training."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastpeft
from tests.integration.blocks import Block, inputs, pair
from tests.integration.models import batch, checkpointed, make, with_lora
from tests.integration.reports import notes, siblings
from tests.integration.steps import assert_accelerated_close, assert_close, assert_step_close, step, truth

full = pytest.mark.full


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", pytest.param("bert", marks=full), pytest.param("t5", marks=full)])
def test_under_autocast(name: str, base: torch.dtype) -> None:
    model = make(name, base)
    batched = batch(model)
    exact = truth(model, batched)
    with torch.autocast("cpu", torch.bfloat16):
        assert_accelerated_close(model, batched, exact)
    assert not notes(model)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_under_autocast(use_reentrant: bool) -> None:
    model = checkpointed(make("llama"), use_reentrant)
    batched = batch(model)
    exact = truth(model, batched)
    with torch.autocast("cpu", torch.bfloat16):
        assert_accelerated_close(model, batched, exact)


def test_forward_inside_autocast_and_backward_outside() -> None:
    model = make("llama")
    batched = batch(model)
    exact = truth(model, batched)
    fastpeft.accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        inside = step(model, batched)
        loss = model(**batched).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert inside.gradients.keys() == gradients.keys() == exact.gradients.keys()
    assert all(torch.equal(gradients[name], value) for name, value in inside.gradients.items())


def test_autocast_switched_on_and_off_between_steps() -> None:
    model = make("llama")
    batched = batch(model)
    exact, peft = truth(model, batched), step(model, batched)
    ours = fastpeft.accelerate(copy.deepcopy(model))
    for _ in range(2):
        assert_step_close(step(ours, batched), peft, exact)
        with torch.autocast("cpu", torch.bfloat16):
            assert_step_close(step(ours, batched), step(model, batched), exact)


def test_trained_heads_get_their_gradient_in_the_first_step_too() -> None:
    """Autocast keeps casts of trained weights; the watching forward's, made under no_grad, must not be among them."""
    model = with_lora(make("llama").unload(), modules_to_save=["lm_head"]).train()
    batched = batch(model)
    exact = truth(model, batched)
    with torch.autocast("cpu", torch.bfloat16):
        peft = step(model, batched)
        fastpeft.accelerate(model)
        ours = step(model, batched)
    assert any("lm_head" in name for name in peft.gradients)
    assert_step_close(ours, peft, exact)


def test_watching_leaves_the_random_numbers_alone() -> None:
    class Noisy(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.rand(()) + random.random() + np.random.rand())

    results, x = [], inputs()
    ours, peft = pair(Noisy())
    for model in (ours, peft):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        results.append(model(x))
    torch.testing.assert_close(*results)
    assert siblings(ours)


def test_watching_leaves_running_statistics_alone() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.block = nn.BatchNorm1d(16), Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.norm(x))

    ours, peft = pair(Normed())
    x = torch.randn(6, 16)
    torch.testing.assert_close(ours(x), peft(x))
    assert siblings(ours)
    norms = [next(m for m in model.modules() if isinstance(m, nn.BatchNorm1d)) for model in (ours, peft)]
    assert all(torch.equal(a, b) for a, b in zip(norms[0].buffers(), norms[1].buffers(), strict=True))


class TestGenerating:
    @pytest.mark.parametrize(
        "name", ["llama", "t5", pytest.param("bart", marks=full), pytest.param("gemma2", marks=full)]
    )
    @pytest.mark.parametrize("beams", [1, pytest.param(3, marks=full)])
    def test_as_the_first_call_and_training_afterwards(self, name: str, beams: int) -> None:
        peft = make(name)
        ours = fastpeft.accelerate(copy.deepcopy(peft))
        batched = batch(peft)
        for _ in range(2):
            texts = [generate(model, batched, num_beams=beams) for model in (ours, peft)]
            assert torch.equal(*texts)
            assert_step_close(step(ours, batched), step(peft, batched), truth(peft, batched))
        assert siblings(ours)

    @pytest.mark.parametrize("cache", [False, True])
    def test_with_and_without_cache_after_training(self, cache: bool) -> None:
        peft = make("llama")
        ours, batched = fastpeft.accelerate(copy.deepcopy(peft)), batch(peft)
        step(ours, batched)
        assert torch.equal(*(generate(model, batched, use_cache=cache) for model in (ours, peft)))

    def test_a_cache_that_is_passed_in_the_first_call_is_filled_once(self) -> None:
        from transformers import DynamicCache

        peft = make("llama").eval()
        ours, ids = fastpeft.accelerate(copy.deepcopy(peft)), batch(peft)["input_ids"]
        caches = [DynamicCache(), DynamicCache()]
        with torch.no_grad():
            for model, cache in zip((ours, peft), caches, strict=True):
                model(input_ids=ids, past_key_values=cache)
        assert caches[0].get_seq_length() == caches[1].get_seq_length() == ids.shape[1]

    def test_training_with_a_cache_passed(self) -> None:
        """Prefix tuning by hand: not watched, since the cache would be filled twice; the right numbers all the same."""
        from transformers import DynamicCache

        peft = make("llama")
        ours, batched = fastpeft.accelerate(copy.deepcopy(peft)), batch(peft)
        del batched["attention_mask"]
        results = [step(model, {**batched, "past_key_values": DynamicCache()}) for model in (ours, peft)]
        torch.testing.assert_close(results[0].gradients, results[1].gradients, rtol=1e-4, atol=1e-5)
        assert not siblings(ours) and not notes(ours)

    def test_the_encoder_alone_and_then_everything(self) -> None:
        peft = make("t5")
        ours, batched = fastpeft.accelerate(copy.deepcopy(peft)), batch(peft)
        ids = {name: batched[name] for name in ("input_ids", "attention_mask")}
        states = [model.get_base_model().get_encoder()(**ids).last_hidden_state for model in (ours, peft)]
        wide = copy.deepcopy(peft).double().get_base_model().get_encoder()(**ids).last_hidden_state
        assert_close(states[0], states[1], wide)
        assert_step_close(step(ours, batched), step(peft, batched), truth(peft, batched))
        assert siblings(ours) == {frozenset("qkv"), frozenset("kv"), frozenset({"wi_0", "wi_1"})}


def generate(model: Any, batched: dict[str, Tensor], **options: Any) -> Tensor:
    ids = {name: batched[name] for name in ("input_ids", "attention_mask")}
    model.eval()
    text = model.generate(**ids, max_new_tokens=6, do_sample=False, **options)
    model.train()
    return text
