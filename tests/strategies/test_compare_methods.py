"""What each method of a comparison trains."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from fastpeft.config import LoraSection
from fastpeft.strategies.compare.methods import METHODS, Setting

LAYERS = 2
LINEAR = 6 * LAYERS + 1
"""Query, key, value, output and two of the feed-forward; the pooler."""
NORMS = 2 * LAYERS + 1

# Pattern of the names that are trained beside the classifier, and how many there are.
EXPECTED = {
    "head": (r"$^", 0),
    "bitfit": (r"\.bias$", LINEAR + NORMS),
    "layernorm": (r"LayerNorm\.ln_tuning_layers\.\w+\.(weight|bias)$", 2 * NORMS),
    "lora": (r"lora_[AB]\.\w+\.weight$", 2 * LINEAR),
    "qlora": (r"lora_[AB]\.\w+\.weight$", 2 * LINEAR),
    "rslora": (r"lora_[AB]\.\w+\.weight$", 2 * LINEAR),
    "loraplus": (r"lora_[AB]\.\w+\.weight$", 2 * LINEAR),
    "dora": (r"lora_([AB]|magnitude_vector)\.\w+\.weight$", 3 * LINEAR),
    "pissa": (r"lora_[AB]\.\w+\.weight$", 2 * LINEAR),
    "adalora": (r"lora_[ABE]\.\w+$", 3 * LINEAR),
    "vera": (r"vera_lambda_[bd]\.\w+$", 2 * LINEAR),
    "ia3": (r"ia3_l\.\w+$", 4 * LAYERS),
    "prompt": (r"^prompt_encoder\.\w+\.embedding\.weight$", 1),
    "p-tuning": (r"^prompt_encoder\.", 7),
    "prefix": (r"^prompt_encoder\.", 5),
    "p-tuning-v2": (r"^prompt_encoder\.\w+\.embedding\.weight$", 1),
}


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes))


def setting(*whole: str, steps: int = 10) -> Setting:
    return Setting(LoraSection(r=4, alpha=8.0, modules_to_save=list(whole)), "sequence-classification", steps, 0)


def trained(name: str, *whole: str) -> set[str]:
    model = METHODS[name].attach(bert(), setting(*whole))
    return {path for path, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_it_trains_what_it_should_and_the_classifier(name: str) -> None:
    names = trained(name)
    head = {path for path in names if re.search(r"(^|\.)classifier(\.modules_to_save\.\w+)?\.(weight|bias)$", path)}
    pattern, count = EXPECTED[name]
    others = {path for path in names - head if not (name == "bitfit" and "classifier" in path)}
    assert len(head) == 2
    assert [path for path in sorted(others) if not re.search(pattern, path)] == []
    assert len(others) == count


def test_full_fine_tuning_trains_everything() -> None:
    assert trained("full") == {path for path, _ in bert().named_parameters()}


@pytest.mark.parametrize("name", ["head", "bitfit", "lora", "ia3", "layernorm"])
def test_what_the_checkpoint_has_no_values_for_is_trained_whole(name: str) -> None:
    assert any("pooler.dense" in path and path.endswith("weight") for path in trained(name, "bert.pooler.dense"))


def test_a_method_that_cannot_train_a_module_whole_says_so() -> None:
    reason = METHODS["prompt"].why_not(setting("bert.pooler.dense", "classifier"))
    assert reason is not None and reason.endswith("no values for bert.pooler.dense")
    assert METHODS["prompt"].why_not(setting("classifier")) is None
    assert METHODS["lora"].why_not(setting("bert.pooler.dense")) is None


def test_rates_are_even_on_a_log_scale() -> None:
    assert METHODS["full"].rates(3) == [4e-5, 2e-4, 1e-3]
    assert METHODS["full"].rates(1) == [2e-4]


def test_loraplus_has_the_larger_rate_for_b() -> None:
    model = METHODS["loraplus"].attach(bert(), setting())
    make = METHODS["loraplus"].optimizer
    assert make is not None
    groups = make(model, torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for path, parameter in model.named_parameters():
        if "lora_" in path:
            assert rates[id(parameter)] == pytest.approx(16e-3 if "lora_B" in path else 1e-3), path
            assert decays[id(parameter)] == 0.1


def test_adalora_ends_with_the_rank_of_the_others() -> None:
    model = METHODS["adalora"].attach(bert(), setting(steps=10))
    make = METHODS["adalora"].callback
    assert make is not None
    callback = make(model)
    ids = torch.arange(8)[None]
    for step in range(10):
        model(input_ids=ids, labels=torch.tensor([1])).loss.backward()
        callback.on_optimizer_step(None, type("State", (), {"global_step": step}), None)  # type: ignore[arg-type]
    pattern = model.peft_config["default"].rank_pattern
    assert sum(sum(kept) for kept in pattern.values()) == 4 * LINEAR
