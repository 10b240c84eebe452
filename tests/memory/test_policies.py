"""Loss and gradients under every memory policy are those of keeping all, bit for bit; less is kept."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import nn

import fastpeft
from fastpeft import LayerPolicy, MemoryPolicy
from fastpeft.memory.activations import CHECKPOINTED
from fastpeft.memory.exhaustion.ladder import next_policy
from fastpeft.memory.layers import model_layers
from fastpeft.memory.policy import ACTIVATIONS
from tests.integration import mixtures
from tests.integration.models import batch, checkpointed, make, make_base
from tests.integration.steps import Step, step

OTHERS = tuple(how for how in ACTIVATIONS if how != "keep")


def seeded(model: nn.Module, given: dict[str, Any]) -> Step:
    """A step whose dropout is the same each time."""
    torch.manual_seed(5)
    return step(model, given)


def started(name: str = "llama", **config: Any) -> tuple[nn.Module, dict[str, Any], Step]:
    """An accelerated model that knows its siblings, a batch, and the step that keeps all."""
    model = fastpeft.accelerate(make(name, **{"lora_dropout": 0.3, **config}))
    given = batch(model)
    step(model, given)
    return model, given, seeded(model, given)


def full(*cases: Any) -> list[Any]:
    """For `pytest.mark.parametrize`; a tuple is the values of several arguments."""
    return [pytest.param(*(each if isinstance(each, tuple) else (each,)), marks=pytest.mark.full) for each in cases]


@pytest.mark.parametrize("name", ["llama", "t5", *full("qwen3", "gemma2", "gpt2", "bert", "bart")])
def test_the_same_bits_under_each_policy(name: str) -> None:
    model, given, wanted = started(name)
    layers = len(model_layers(model))
    for policy in (
        *map(LayerPolicy, OTHERS),
        MemoryPolicy(tuple(LayerPolicy(ACTIVATIONS[i % 4]) for i in range(layers))),
    ):
        fastpeft.accelerate(model, memory=policy)
        assert seeded(model, given).equals(wanted), policy
    assert seeded(fastpeft.accelerate(model), given).equals(wanted)


@pytest.mark.full
def test_a_mixture_of_experts() -> None:
    model = fastpeft.accelerate(mixtures.make("mixtral").train())
    given = batch(model)
    step(model, given)
    wanted = seeded(model, given)
    for how in OTHERS:
        assert seeded(fastpeft.accelerate(model, memory=LayerPolicy(how)), given).equals(wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_that_a_trainer_switches_on_changes_nothing(use_reentrant: bool) -> None:
    """The policy holds, and what was switched on comes back with `restore`."""
    model, given, wanted = started()
    fastpeft.accelerate(model, memory=MemoryPolicy((LayerPolicy("keep"), LayerPolicy("recompute"))))
    checkpointed(model, use_reentrant)  # type: ignore[arg-type]
    first, second = model_layers(model).values()
    assert (first.gradient_checkpointing, second.gradient_checkpointing) == (False, True)
    assert seeded(model, given).equals(wanted)
    fastpeft.restore(model)
    assert all(layer.gradient_checkpointing and "fastpeft_memory" not in layer.__dict__ for layer in (first, second))


@pytest.mark.parametrize("how", ["recompute", "offload"])
def test_a_model_in_training_mode_generates_with_its_cache(how: Any) -> None:
    """As trainers of TRL generate, which switch checkpointing off on the model meanwhile."""
    model = fastpeft.accelerate(make("llama"), memory=LayerPolicy(how)).train()
    ids = batch(model)["input_ids"]
    told = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    alone = model.generate(input_ids=ids, use_cache=False, **told)
    assert torch.equal(model.generate(input_ids=ids, **told), alone)


def test_layers_keep_the_name_of_their_class_and_leave_no_trace() -> None:
    model, _, _ = started()
    before = [type(layer) for layer in model_layers(model).values()]
    fastpeft.accelerate(model, memory=LayerPolicy("offload"))
    for layer, stock in zip(model_layers(model).values(), before, strict=True):
        assert type(layer) is not stock and type(layer).__name__ == stock.__name__
    fastpeft.accelerate(model)
    assert [type(layer) for layer in model_layers(model).values()] == before
    assert not any(name.startswith("fastpeft_memory") for m in model.modules() for name in m.__dict__)


def test_copies_have_the_policy_too() -> None:
    model, given, wanted = started()
    fastpeft.accelerate(model, memory=LayerPolicy("offload"))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {row.op for row in fastpeft.report(other).rows if row.kind == "memory"} == {"offload"}
        assert seeded(other, given).equals(wanted)


def test_the_report() -> None:
    model, given, _ = started("bert")
    assert not [row for row in fastpeft.report(model).rows if row.kind == "memory"]
    fastpeft.accelerate(model, memory=MemoryPolicy((LayerPolicy("selective"), LayerPolicy("offload"))))
    step(model, given)
    rows = [row for row in fastpeft.report(model).rows if row.kind == "memory"]
    assert [row.op for row in rows] == ["selective", "offload"]
    assert [row.note for row in rows] == ["no MLP that is one op: nothing is computed again", ""]
    assert "2 of 2 layers with a memory policy" in str(fastpeft.report(model))


@pytest.mark.parametrize(
    ("memory", "error", "words"),
    [
        ((), TypeError, "memory: expected a Plan, a MemoryPolicy, a LayerPolicy or None, got tuple$"),
        ("24GiB", TypeError, r"got str; what fits depends on the batch: memory=fastpeft.plan\(model, gpu_mem"),
        (MemoryPolicy((LayerPolicy(),) * 3), ValueError, "layers: expected 2 policies, one for each layer, got 3"),
    ],
)
def test_what_is_no_policy_for_the_model(memory: Any, error: type[Exception], words: str) -> None:
    model = make()
    with pytest.raises(error, match=words):
        fastpeft.accelerate(model, memory=memory)
    assert not fastpeft.report(model).accelerated


def test_a_model_without_layers() -> None:
    with pytest.raises(ValueError, match=r"memory: expected a model with layers of .*, got Linear, which has none"):
        fastpeft.accelerate(nn.Linear(2, 2), memory=LayerPolicy())


@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig, PromptEncoderConfig])
def test_virtual_tokens(kind: Any) -> None:
    """Those of prefix tuning reach layers by a cache, which none gets that is computed again; PEFT refuses it too."""
    options = {"encoder_hidden_size": 8} if kind is PromptEncoderConfig else {}
    model = get_peft_model(make_base(), kind(task_type="CAUSAL_LM", num_virtual_tokens=3, **options)).train()
    given = batch(model)
    kept = seeded(fastpeft.accelerate(model), given)
    assert any(name.startswith("prompt_encoder") for name in kept.gradients)
    for how in OTHERS:
        if kind is PrefixTuningConfig and how in CHECKPOINTED:
            with pytest.raises(ValueError, match='activations "keep" or "selective" with PREFIX_TUNING, whose'):
                fastpeft.accelerate(model, memory=LayerPolicy(how))
        else:
            fastpeft.accelerate(model, memory=LayerPolicy(how))
            assert seeded(model, given).equals(kept), how
    if kind is PrefixTuningConfig:
        assert next_policy(model) is None


def test_prefixes_under_transformers_own_checkpointing() -> None:
    """Plain transformers ends in an error too, that of adding a mask of too many keys."""
    model = get_peft_model(make_base(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).train()
    fastpeft.accelerate(checkpointed(model, False))
    with pytest.raises(ValueError, match="expected a mask of 10 keys, got one of 13; activation checkpointing takes"):
        model(**batch(model))
