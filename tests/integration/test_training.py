"""Training: step by step what plain PEFT does, with the optimizers and trainers that people use."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpeft
from tests.integration.models import batch, make, with_lora
from tests.integration.quantised import make_quantised
from tests.integration.reports import siblings

full = pytest.mark.full


def fused_adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)  # writes without counting it as a write


def adamw_8bit(parameters: Any) -> torch.optim.Optimizer:
    import bitsandbytes as bnb

    return bnb.optim.AdamW8bit(parameters, lr=1e-2, min_8bit_size=1)


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("make_optimizer", [fused_adamw, adamw_8bit])
def test_steps_are_those_of_peft(make_optimizer: Callable[[Any], torch.optim.Optimizer], nf4: bool) -> None:
    peft = make_quantised() if nf4 else make()
    ours = fastpeft.accelerate(copy.deepcopy(peft))
    batches = [batch(peft) for _ in range(5)]
    start = trained_values(peft)
    losses = [train(model, make_optimizer, batches) for model in (peft, ours)]
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-4, atol=0)
    moved = [flat(trained_values(model)) - flat(start) for model in (peft, ours)]
    assert moved[0].norm() > 0.1, "nothing was trained"
    # 8-bit states and Adam's division by the root of tiny numbers enlarge single roundings.
    assert (moved[1] - moved[0]).norm() < 0.02 * moved[0].norm()


def test_an_adapter_overwritten_through_data_is_used_at_once() -> None:
    peft = make()
    ours, inputs = fastpeft.accelerate(copy.deepcopy(peft)), batch(peft)
    first = ours(**inputs).logits
    for model in (ours, peft):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(parameter.data.flip(0))
    second = ours(**inputs).logits
    torch.testing.assert_close(second, peft(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first, second, rtol=1e-2)


class TestDropout:
    def test_the_loss_falls(self) -> None:
        model = fastpeft.accelerate(make(lora_dropout=0.2))
        inputs = batch(model)
        losses = train(model, fused_adamw, [inputs] * 15)
        assert losses[-3:].mean() < 0.8 * losses[0]

    def test_the_mean_of_many_is_the_output_without(self) -> None:
        """For one layer, which is linear in what is dropped."""
        base = nn.ModuleDict({"q": nn.Linear(16, 24)})
        layer = fastpeft.accelerate(with_lora(base, None, target_modules=["q"], lora_dropout=0.4)).train()
        q, x = layer.base_model.model["q"], torch.randn(6, 16)
        with torch.no_grad():
            many = torch.stack([q(x) for _ in range(600)])
            exact = q.eval()(x)
        error = (many.mean(0) - exact).abs() / (many.std(0) / 600**0.5).clamp_min(1e-6)
        assert error.max() < 6 and error.mean() < 1.2  # in standard errors
        assert many.std(0).min() > 0

    def test_grouping_does_not_change_the_random_numbers(self) -> None:
        grouped = fastpeft.accelerate(make(lora_dropout=0.3, target_modules=["q_proj", "k_proj", "v_proj"]))
        alone = copy.deepcopy(grouped)
        for module in alone.modules():
            watch = getattr(module, "fastpeft_watch", None)
            if watch is not None:
                watch.forget([module])
        inputs, results, states = batch(grouped), [], []
        for model in (grouped, alone):
            torch.manual_seed(11)
            results.append(model(**inputs).logits)
            states.append(torch.get_rng_state())
        assert siblings(grouped) and not siblings(alone)
        torch.testing.assert_close(*results)
        assert torch.equal(*states)

    def test_each_step_drops_others(self) -> None:
        model, inputs = fastpeft.accelerate(make(lora_dropout=0.3)), None
        inputs = batch(model)
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


def train(
    model: nn.Module, make_optimizer: Callable[[Any], torch.optim.Optimizer], batches: list[dict[str, Tensor]]
) -> Tensor:
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    losses = []
    for inputs in batches:
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values.values()])
