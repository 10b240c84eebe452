"""What dynamic rules stand on: weighted losses without logits, layers that are frozen, ranks that go."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Adafactor, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import fastpeft
from fastpeft.bench.kept import bytes_kept
from fastpeft.layers import head_call
from fastpeft.strategies.dynamic.actions import Run
from fastpeft.strategies.dynamic.actions.reweight import Reweight, ReweightOptions
from fastpeft.strategies.dynamic.costs import state_bytes
from fastpeft.strategies.dynamic.losses import Tokens, token_losses
from fastpeft.strategies.dynamic.rank import adapters_of, cut_to, first_alone, put_back
from fastpeft.strategies.dynamic.signals import of_layers
from fastpeft.strategies.dynamic.trained import Trained, named
from fastpeft.strategies.dynamic.trainer import Steered


def model_of(kind: str = "causal-lm") -> Any:
    torch.manual_seed(0)
    if kind == "causal-lm":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
        base: Any = LlamaForCausalLM(LlamaConfig(vocab_size=90, **sizes))
    else:
        given = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
        base = T5ForConditionalGeneration(T5Config(vocab_size=90, **given, decoder_start_token_id=0, dropout_rate=0.0))
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", exclude_modules=["lm_head"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def batch_of() -> dict[str, Any]:
    ids = torch.randint(1, 90, (3, 7))
    labels = torch.where(torch.rand(3, 7) < 0.3, -100, ids)
    labels[:, 1] = ids[:, 1]
    return {"input_ids": ids, "labels": labels}


def gradients(model: Any) -> dict[str, Any]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def dft(tokens: Tokens) -> Any:
    assert tokens.divergence is not None
    return (tokens.nll * (-tokens.nll.detach()).exp() + 0.3 * tokens.divergence).sum()


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm"])
def test_dft_and_its_anchor_without_logits_are_those_of_logits(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_call, "FEW_ON_CPU", 0)
    batch, plain, fast = batch_of(), model_of(task), fastpeft.accelerate(model_of(task))
    wanted = token_losses(plain, batch, task, anchored=True)
    dft(wanted).backward()
    found = token_losses(fast, batch, task, anchored=True)
    dft(found).backward()
    outcomes = next(part.fastpeft_loss for part in fast.modules() if "fastpeft_loss" in part.__dict__).outcomes
    assert set(outcomes) == {"fused"}, outcomes
    assert torch.allclose(found.nll, wanted.nll, atol=1e-5) and torch.allclose(
        found.divergence, wanted.divergence, atol=1e-5
    )
    ours, theirs = gradients(fast), gradients(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5, rtol=1e-4) for name in theirs)
    with torch.no_grad():
        own = plain(**batch).loss
    assert torch.allclose(wanted.nll.sum() / wanted.counted.sum(), own, atol=1e-5)


def test_dft_with_an_anchor_is_its_definition_in_double_precision() -> None:
    """p(label) times the cross-entropy, p without a gradient, plus 0.3 times KL(starting model || model), by token."""
    model, exact, batch = model_of(), model_of().double(), batch_of()
    trainer: Any = type("Trainer", (Steered,), {"current_gradient_accumulation_steps": 1})()
    rule = Reweight(ReweightOptions(anchor=0.3), 0, 0)
    rule.resume(Run(trainer, Trained(model), step=1))
    trainer.task, trainer.weighing = "causal-lm", [rule]
    found = trainer.compute_loss(model, batch)
    found.backward()

    def by_definition(of: Any) -> tuple[Any, Any, Any]:
        labels = batch["labels"][:, 1:]
        counted = labels != -100
        own = of(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)[counted]
        with torch.no_grad(), of.disable_adapter():
            start = of(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)[counted]
        nll = -own.gather(-1, labels[counted][:, None])[:, 0]
        divergence = (start.exp() * (start - own)).sum(-1)
        losses = nll * (-nll).exp().detach() + 0.3 * divergence
        losses.mean().backward()
        return losses.detach(), divergence, (own.exp() * (own - start)).sum(-1)

    plain = model_of()
    wanted, divergence, other_way = by_definition(exact)
    eps = torch.finfo(torch.float32).eps
    allowed = (2 * abs(by_definition(plain)[0] - wanted).max() + eps * wanted.max()).item()
    assert abs(found - wanted.mean()).item() <= allowed, "the mean of tokens is no worse than the worst of them"
    assert (divergence > 0).all() and abs(divergence - other_way).max() > 100 * allowed, "the other direction is seen"
    pairs = [(gradients(model)[name], gradients(plain)[name], wanted) for name, wanted in gradients(exact).items()]
    ours, theirs = (max(abs(pair[side] - pair[2]).max().item() for pair in pairs) for side in (0, 1))
    largest = max(abs(wanted).max().item() for _, _, wanted in pairs)
    assert ours <= 2 * theirs + eps * largest


def test_the_anchor_leaves_frozen_what_is_frozen() -> None:
    model = model_of()
    Trained(model).only([3], torch.optim.SGD(model.parameters()))
    token_losses(model, batch_of(), "causal-lm", anchored=True).nll.sum().backward()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert any("lora_A" in name and ".layers.0." in name for name in frozen)
    token_losses(model, batch_of(), "causal-lm", anchored=True).nll.sum().backward()
    assert all(".layers.3." in name for name in gradients(model))


def test_rows_of_packed_texts() -> None:
    tokens = token_losses(
        model_of(),
        {
            "input_ids": torch.tensor([[5, 6, 7, 8, 9]]),
            "position_ids": torch.tensor([[0, 1, 2, 0, 1]]),
            "labels": torch.tensor([[-100, 6, 7, -100, 9]]),
        },
        "causal-lm",
    )
    assert tokens.rows.tolist() == [0, 0, 0, 1, 1] and tokens.counted.tolist() == [True, True, False, True, False]
    nll = tokens.nll.detach()
    assert torch.allclose(tokens.row_losses(), torch.stack([nll[:2].mean(), nll[3]]))


@pytest.mark.parametrize("accelerated", [True, False])
def test_frozen_layers_have_no_gradient_no_state_and_keep_nothing_below(accelerated: bool) -> None:
    model, batch = model_of(), batch_of()
    if accelerated:
        fastpeft.accelerate(model)
    trained = Trained(model)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])

    def forward() -> Any:
        return model(**batch, use_cache=False).loss

    def step() -> None:
        forward().backward()
        optimizer.step()
        model.zero_grad()

    step()
    whole, kept, values = state_bytes(optimizer), bytes_kept(model, forward), trained.values
    trained.only([3], optimizer)
    step()
    assert state_bytes(optimizer) == pytest.approx(whole / 4, rel=0.01) and trained.values == values // 4
    assert bytes_kept(model, forward) < 0.45 * kept
    forward().backward()
    assert all(".layers.3." in name for name in gradients(model))
    model.zero_grad()
    trained.only([0], optimizer)
    assert state_bytes(optimizer) == 0
    step()
    assert state_bytes(optimizer) == pytest.approx(whole / 4, rel=0.01), "what thaws begins anew"


def test_ranks_that_go_take_their_state_along() -> None:
    model, batch = model_of(), batch_of()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    model(**batch).loss.backward()
    optimizer.step()
    model.zero_grad()
    adapter = next(iter(adapters_of(model).values()))
    a, b = adapter.a.detach().clone(), adapter.b.detach().clone()
    moment = optimizer.state[adapter.b]["exp_avg"].clone()
    scaling = adapter.layer.scaling["default"]
    adapter.keep([0, 2], optimizer)
    assert torch.equal(adapter.a, a[[0, 2]]) and torch.equal(adapter.b, b[:, [0, 2]])
    assert torch.equal(optimizer.state[adapter.b]["exp_avg"], moment[:, [0, 2]])
    assert adapter.layer.scaling["default"] == scaling == adapter.alpha / 2
    assert model.peft_config["default"].rank_pattern == {adapter.path: 2}
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    assert adapter.b.shape == (b.shape[0], 2)


@pytest.mark.parametrize("accelerated", [True, False])
def test_the_first_ranks_alone_are_an_adapter_of_that_rank(accelerated: bool) -> None:
    model, smaller, batch = model_of(), model_of(), batch_of()
    cut_to(smaller, 2)
    if accelerated:
        fastpeft.accelerate(model)
        fastpeft.accelerate(smaller)
    adapters = adapters_of(model)
    values = {path: (each.a.detach().clone(), each.b.detach().clone()) for path, each in adapters.items()}
    left_out = first_alone(adapters.values(), 2)
    found, wanted = model(**batch).loss, smaller(**batch).loss
    found.backward()
    wanted.backward()
    put_back(left_out)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    for path, other in adapters_of(smaller).items():
        mine, (a, b) = adapters[path], values[path]
        assert torch.equal(mine.a, a) and torch.equal(mine.b, b)
        assert other.a.shape[0] == 2 and torch.equal(other.a, a[:2])
        assert torch.allclose(mine.a.grad[:2], other.a.grad, atol=1e-6)
        assert torch.allclose(mine.b.grad[:, :2], other.b.grad, atol=1e-6)
        assert not mine.a.grad[2:].any() and not mine.b.grad[:, 2:].any()
        assert mine.b.grad[:, :2].any()
    with pytest.raises(ValueError, match="rank: expected at least 1, got 0"):
        cut_to(model, 0)


@pytest.mark.parametrize("bits", [32, 8])
def test_state_that_is_not_value_by_value_begins_anew(bits: int) -> None:
    model, batch = model_of(), batch_of()
    trained = [each for each in model.parameters() if each.requires_grad]
    if bits == 8:
        bnb = pytest.importorskip("bitsandbytes")
        optimizer = bnb.optim.AdamW8bit(trained, lr=1e-2, min_8bit_size=1)
    else:
        optimizer = Adafactor(trained, lr=1e-2, scale_parameter=False, relative_step=False)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        model.zero_grad()
        for adapter in adapters_of(model).values():
            adapter.keep(range(adapter.rank - 1), optimizer)
            assert adapter.a not in optimizer.state and adapter.b not in optimizer.state


def test_gradients_that_overflowed_have_no_signal() -> None:
    layers = {number: [nn.Parameter(torch.ones(2))] for number in (1, 2, 3)}
    for number, value in zip(layers, (3.0, math.inf, math.nan), strict=True):
        layers[number][0].grad = torch.tensor([value, 4.0])
    assert of_layers(layers, "gradient_norm") == {1: 5.0} and of_layers(layers, "importance") == {1: 7.0}
    assert of_layers({}, "importance") == {}


def test_a_value_that_is_no_number_is_null_in_the_log() -> None:
    run = Run(None, Trained(model_of()))
    Reweight(ReweightOptions(), 0, 0).decide(run, "loss", math.nan, "nothing", "it is no number")
    assert run.decisions[0].value is None


def test_layers_in_words() -> None:
    assert named([5, 0, 1, 2]) == "0-2, 5" and named([]) == "none"
