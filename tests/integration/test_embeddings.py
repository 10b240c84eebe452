"""LoRA on embeddings: PEFT's numbers in every state of the layer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import fastpeft
from fastpeft.layers.embedding import FastEmbedding

IDS = torch.tensor([[3, 0, 5, 3], [1, 1, 0, 6]])


class Words(nn.Module):
    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.words, self.head = embedding, nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(ids))


EMBEDDINGS: dict[str, Callable[[], nn.Embedding]] = {
    "plain": lambda: nn.Embedding(7, 8),
    "padding": lambda: nn.Embedding(7, 8, padding_idx=0),
    "gemma3": lambda: Gemma3TextScaledWordEmbedding(7, 8, 0, embed_scale=8**0.5),
    "bf16": lambda: nn.Embedding(7, 8, dtype=torch.bfloat16),
}


def pair(embedding: nn.Embedding, **config: Any) -> tuple[Any, Any]:
    fields = {"target_modules": ["words"], "r": 3, "init_lora_weights": False, **config}
    peft = get_peft_model(Words(embedding), LoraConfig(**fields))
    if embedding.weight.dtype == torch.float32:
        peft.double()  # so that orders of summation show nowhere
    return fastpeft.accelerate(copy.deepcopy(peft)), peft


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    y = model(IDS)
    y.square().sum().backward()
    return {"y": y.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def check(ours: nn.Module, peft: nn.Module) -> None:
    expected, found = gradients(peft), gradients(ours)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected)


def layer_of(model: nn.Module) -> FastEmbedding:
    return next(module for module in model.modules() if isinstance(module, FastEmbedding))


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_values_and_gradients(kind: str) -> None:
    ours, peft = pair(EMBEDDINGS[kind]())
    if kind == "bf16":
        for model in (ours, peft):
            model.base_model.model.head.to(torch.bfloat16)
    check(ours, peft)
    assert layer_of(ours).fastpeft_calls == {"fused": 1}


def test_two_adapters_rslora_and_switches() -> None:
    ours, peft = pair(nn.Embedding(7, 8))
    for model in (ours, peft):
        model.add_adapter("b", LoraConfig(target_modules=["words"], r=2, use_rslora=True, init_lora_weights=False))
        model.double()
    ours.load_state_dict(peft.state_dict())
    for active in (["default", "b"], ["b"], ["default"]):
        for model in (ours, peft):
            model.base_model.set_adapter(active)
        check(ours, peft)
    with ours.disable_adapter(), peft.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(ours(IDS), peft(IDS))
    for model in (ours, peft):
        model.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), peft(IDS))
    for model in (ours, peft):
        model.unmerge_adapter()
    check(ours, peft)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}], ids=str)
def test_what_cannot_be_is_peft_s_and_named(options: dict[str, Any]) -> None:
    ours, peft = pair(nn.Embedding(7, 8, **options))
    check(ours, peft)
    (row,) = [row for row in fastpeft.report(ours).rows if row.path.endswith("words")]
    assert "max_norm, scale_grad_by_freq" in row.note


def test_a_trained_scaling_is_peft_s_and_gets_its_gradient() -> None:
    ours, peft = pair(nn.Embedding(7, 8))
    found = []
    for model in (ours, peft):
        scaling = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        model.base_model.model.words.scaling["default"] = scaling
        model(IDS).square().sum().backward()
        found.append(scaling.grad)
    torch.testing.assert_close(*found)
    assert "a scaling that is trained" in next(iter(layer_of(ours).fastpeft_calls))


def test_a_and_b_of_two_dtypes_are_peft_s() -> None:
    """Autocast makes them one."""
    ours, peft = pair(nn.Embedding(7, 8))
    for model in (ours, peft):
        model.float()
        factor = model.base_model.model.words.lora_embedding_B["default"]
        factor.data = factor.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        check(ours, peft)
    assert "lora_A in torch.float32, lora_B in torch.bfloat16" in next(iter(layer_of(ours).fastpeft_calls))


@pytest.mark.parametrize("kind", ["plain", "padding", "gemma3"])
def test_rows_with_adapters_of_their_own(kind: str) -> None:
    ours, peft = pair(EMBEDDINGS[kind]())
    for model in (ours, peft):
        model.add_adapter("b", LoraConfig(target_modules=["words"], r=2, lora_alpha=5, init_lora_weights=False))
        model.double().base_model.set_adapter(["default", "b"])
    ours.load_state_dict(peft.state_dict())
    for names in (["b", "default"], ["default", "__base__"], ["b", "b"], ["__base__", "__base__"]):
        if names != ["__base__"] * 2:
            with fastpeft.mixed_batch(ours, names), fastpeft.mixed_batch(peft, names):
                check(ours, peft)
        found, expected = (model.eval()(IDS, adapter_names=names) for model in (ours, peft))
        torch.testing.assert_close(found, expected)
    assert set(layer_of(ours).fastpeft_calls) == {"fused"}


def test_another_number_of_names_than_rows_is_peft_s_error() -> None:
    ours, _ = pair(nn.Embedding(7, 8))
    with pytest.raises(ValueError, match="adapter_names"):
        ours.eval()(IDS, adapter_names=["default"])


def test_pickled_copied_and_restored() -> None:
    ours, peft = pair(nn.Embedding(7, 8))
    expected = gradients(peft)
    for model in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert isinstance(layer_of(model), FastEmbedding)
        torch.testing.assert_close(gradients(model), expected)
    classes = [type(module) for module in peft.modules()]
    assert [type(module) for module in fastpeft.restore(ours).modules()] == classes
    assert not any(name.startswith("fastpeft") for module in ours.modules() for name in module.__dict__)
    torch.testing.assert_close(gradients(ours), expected)
