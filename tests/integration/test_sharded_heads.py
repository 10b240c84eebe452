"""A head in an FSDP2 group of its own, as accelerate makes one: the loss needs no logits there either."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastpeft
from fastpeft.layers.head_call import LossCalls
from tests.integration.test_several_processes import ACCUMULATED, STEPS, losses, prepared, sharded
from tests.processes import together

pytestmark = pytest.mark.full


def model_of(head: str) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=head == "tied", use_cache=False,
    )  # fmt: skip
    targets = ["q_proj", "v_proj", *(["lm_head"] if head == "adapted" else [])]
    saved = ["lm_head"] if head == "trained" else None
    adapted = get_peft_model(
        LlamaForCausalLM(config),
        LoraConfig(r=4, target_modules=targets, modules_to_save=saved, init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    return adapted.train()


def alone(**settings: Any) -> Callable[[nn.Module, int], nn.Module]:
    def shard(model: nn.Module, rank: int) -> nn.Module:
        from torch.distributed import device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = device_mesh.init_device_mesh("cpu", (2,))
        fully_shard(model.get_output_embeddings(), mesh=mesh, **settings)
        return sharded(model)

    return shard


def outcomes(model: nn.Module) -> dict[str, int]:
    calls = {id(c): c for m in model.modules() if isinstance(c := m.__dict__.get("fastpeft_loss"), LossCalls)}
    return {outcome: number for each in calls.values() for outcome, number in each.outcomes.items()}


@pytest.mark.parametrize("head", ["frozen", "trained", "adapted", "tied"])
def test_the_loss_of_one_process_without_logits(head: str, tmp_path: Path) -> None:
    def work(rank: int) -> tuple[list[float], dict[str, int]]:
        model = prepared(fastpeft.accelerate(model_of(head)), rank)
        return losses(model, rank, 2), outcomes(model)

    wanted = losses(model_of(head), 0, 1)
    for found, said in together(2, work, tmp_path):
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=0)
        assert list(said) == ["fused"] and said["fused"] >= STEPS * ACCUMULATED


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "sharded again"])
def test_weights_that_are_gone_after_forward_make_logits(kept: bool, tmp_path: Path) -> None:
    def work(rank: int) -> tuple[list[float], dict[str, int]]:
        model = alone(reshard_after_forward=not kept)(fastpeft.accelerate(model_of("adapted")), rank)
        return losses(model, rank, 2), outcomes(model)

    wanted = losses(model_of("adapted"), 0, 1)
    for found, said in together(2, work, tmp_path):
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=0)
        assert ("fused" in said) == kept and len(said) == 1
        assert kept or "shards again after this module's forward" in next(iter(said))


def test_logits_that_are_read_get_their_gradient_too(tmp_path: Path) -> None:
    """FSDP2's hook then waits on the logits themselves."""

    def work(rank: int) -> tuple[list[float], dict[str, int]]:
        model = prepared(fastpeft.accelerate(model_of("adapted")), rank)
        return losses(model, rank, 2, _Doubled(model)), outcomes(model)

    plain = model_of("adapted")
    wanted = losses(plain, 0, 1, _Doubled(plain))
    for found, said in together(2, work, tmp_path):
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=0)
        assert all(outcome.startswith("logits asked for") for outcome, number in said.items() if number)


class _Doubled:
    """A loss that also reads the logits."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, **batch: Any) -> Any:
        out = self.model(**batch)
        return SimpleNamespace(loss=out.loss + out.logits.float().square().sum() / 1e4)
