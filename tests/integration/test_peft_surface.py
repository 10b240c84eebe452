"""Every public method of PEFT's LoRA layers and models has a call in the tables, or a reason why not."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, LoraModel

from tests.integration import test_peft_layers, test_peft_models
from tests.integration.models import batch, make, make_base, trained, with_lora
from tests.integration.steps import assert_step_close, step, truth
from tests.integration.surface import methods_of, subclasses
from tests.integration.twins import Twins

PINNED = "0.21.2"

ELSEWHERE = {
    "forward": "after every call of the tables, and by rows",
    "unload_and_optionally_merge_module": "test_peft_layers.test_unloaded",
    "push_to_hub": "uploads what save_pretrained writes",
    "named_modules": "of MultiheadAttention: in every comparison of states",
    "state_dict": "of MultiheadAttention: in every comparison of states",
}
MIXED = {
    "add_adapter",
    "create_or_update_model_card",
    "delete_adapter",
    "disable_adapter",
    "forward",
    "from_pretrained",
    "generate",
    "get_layer_status",
    "get_model_status",
    "get_nb_trainable_parameters",
    "load_adapter",
    "merge_and_unload",
    "print_trainable_parameters",
    "save_pretrained",
    "set_adapter",
    "set_modules_to_save",
    "unload",
}
"""PeftMixedModel's; `test_a_mixed_model` calls them; loading and saving PEFT has none of."""

HELPERS = {
    "get_peft_model": "everywhere",
    "get_eva_state_dict": "test_eva",
    "initialize_lora_eva_weights": "test_eva",
    "get_peft_config": "makes a configuration",
    "bloom_model_postprocess_past_key_value": "of prefix tuning",
    "compose_cartridge_adapters": "of cartridges",
    "initialize_kv_prefix_from_past_key_values": "of cartridges",
    "initialize_kv_prefix_from_text": "of cartridges",
    "prompt_embeddings_from_past_key_values": "of cartridges",
    "shift_tokens_right": "of token ids",
}


def called(table: dict[str, Any]) -> set[str]:
    return {name.partition(":")[0] for name in table}


@pytest.mark.skipif(peft.__version__ != PINNED, reason=f"the tables are of peft {PINNED}")
class TestTables:
    def test_layers(self) -> None:
        kinds = [kind for kind in (LoraLayer, *subclasses(LoraLayer)) if kind.__module__.startswith("peft.tuners.lora")]
        assert len(kinds) > 10
        known = called(test_peft_layers.CALLS) | ELSEWHERE.keys()
        assert {f"{kind.__name__}.{name}" for kind in kinds for name in methods_of(kind) - known} == set()

    def test_models(self) -> None:
        kinds = [PeftModel, *subclasses(PeftModel)]
        known = called(test_peft_models.METHODS) | ELSEWHERE.keys()
        assert {f"{kind.__name__}.{name}" for kind in kinds for name in methods_of(kind) - known} == set()
        assert methods_of(LoraModel) - called(test_peft_models.TUNER) == {"tuner_layer_cls"}
        assert methods_of(peft.PeftMixedModel) - {"push_to_hub"} == MIXED

    def test_functions(self) -> None:
        functions = {name for name in peft.__all__ if name[0].islower()}
        assert functions - called(test_peft_models.FUNCTIONS) == HELPERS.keys()

    def test_no_call_is_of_something_that_is_no_more(self) -> None:
        layers = {name for kind in (LoraLayer, *subclasses(LoraLayer)) for name in methods_of(kind)}
        models = {name for kind in (PeftModel, *subclasses(PeftModel)) for name in methods_of(kind)}
        assert called(test_peft_layers.CALLS) <= layers
        assert called(test_peft_models.METHODS) <= models
        assert called(test_peft_models.TUNER) <= methods_of(LoraModel)


def pair(plain: PeftModel) -> tuple[Any, PeftModel]:
    twins = Twins(plain)
    return twins.ours, twins.plain


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.full)])
def test_alora(checkpointing: bool) -> None:
    """PEFT hands such adapters the place of their invocation tokens by hooks; they run its own forward."""
    ours, plain = pair(make(target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[5, 6]))
    inputs = batch(plain)
    inputs["input_ids"][:2, 3:5] = torch.tensor([5, 6])  # the last row has none
    for model in (ours, plain):
        if checkpointing:
            model.gradient_checkpointing_enable()
    for _ in range(2):
        assert_step_close(step(ours, inputs), step(plain, inputs), truth(plain, inputs))
    if checkpointing:
        return  # PEFT refuses a second call without backward
    for model in (ours, plain):
        torch.manual_seed(0)
        model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
        model.eval()
    rows = {"adapter_names": ["default", "other", "default"]}
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs, **rows).logits, plain(**inputs, **rows).logits)
        ids = {"input_ids": inputs["input_ids"][:2], "max_new_tokens": 3, "do_sample": False}
        assert torch.equal(ours.generate(**ids), plain.generate(**ids))
        ids["adapter_names"] = ["other", "default"]
        assert torch.equal(ours.generate(**ids), plain.generate(**ids))


def test_arrow() -> None:
    """A router over adapters that were there before it."""
    ours, plain = pair(make(target_modules=["q_proj", "v_proj"]))
    for model in (ours, plain):
        torch.manual_seed(0)
        for name in ("task_0", "task_1"):
            model.add_adapter(name, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        config = peft.ArrowConfig(top_k=1, router_temperature=1.0, rng_seed=0)
        config.task_adapter_names, config.gks_adapter_names = ["task_0", "task_1"], []
        model.add_adapter("arrow_router", LoraConfig(r=4, target_modules=["q_proj", "v_proj"], arrow_config=config))
        model.set_adapter("arrow_router")
        model.eval()
    inputs = batch(plain)
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, plain(**inputs).logits)


@pytest.mark.full
def test_eva() -> None:
    """Its weights come of what each layer is given, seen by hooks."""
    ours, plain = pair(with_lora(make_base(), target_modules=["q_proj", "down_proj"], init_lora_weights="eva"))
    ids = torch.arange(3, 15).view(2, 6)
    rows = [{"input_ids": ids + i, "attention_mask": torch.ones_like(ids)} for i in range(6)]
    for model in (ours, plain):
        torch.manual_seed(0)
        peft.initialize_lora_eva_weights(model, rows, show_progress_bar=False)
        trained(model).train()
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        if "lora_A" in name:  # singular vectors, whose sign a last bit may turn
            torch.testing.assert_close(ours.state_dict()[name].abs(), value.abs(), rtol=1e-3, atol=1e-4)
    ours.load_state_dict(plain.state_dict())
    inputs = batch(plain)
    assert_step_close(step(ours, inputs), step(plain, inputs), truth(plain, inputs))


@pytest.mark.full
def test_a_mixed_model() -> None:
    """Of several methods; LoRA's layers become ours, LoHa's too."""
    plain = get_peft_model(make_base(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]), mixed=True)
    plain.add_adapter("loha", peft.LoHaConfig(r=2, target_modules=["v_proj", "q_proj"], init_weights=False))
    twins = Twins(trained(plain).train())
    inputs = batch(plain.base_model.model)
    active = lambda model: model.set_adapter(["default", "loha"])  # noqa: E731
    for call in (
        active,
        lambda model: model.get_nb_trainable_parameters(),
        lambda model: model.generate(input_ids=inputs["input_ids"][:2], max_new_tokens=2, do_sample=False),
        lambda model: model.set_adapter("loha"),
        lambda model: model.set_adapter("default", inference_mode=True),
        active,
        lambda model: model.add_adapter("third", LoraConfig(r=2, target_modules=["q_proj", "k_proj"])),
        lambda model: model.set_adapter("third"),
        lambda model: model.delete_adapter("third"),
        active,
    ):
        assert twins.call(call)
        if any(parameter.requires_grad for parameter in twins.plain.parameters()):
            assert_step_close(step(twins.ours, inputs), step(twins.plain, inputs), truth(twins.plain, inputs))
    with twins.ours.disable_adapter(), twins.plain.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(twins.ours(**inputs).logits, twins.plain(**inputs).logits)
    for call in (
        lambda model: model.get_layer_status(),
        lambda model: model.get_model_status(),
        lambda model: model.save_pretrained("nowhere"),
        lambda model: model.create_or_update_model_card("nowhere"),
        lambda model: model.load_adapter("nowhere", "again"),
    ):
        assert not twins.call(call)
    assert twins.call(lambda model: model.merge_and_unload())


TASKS = ("FEATURE_EXTRACTION", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM")


@pytest.mark.full
@pytest.mark.parametrize("task", TASKS)
def test_the_class_of_every_task(task: str) -> None:
    """`forward`, `add_adapter`, `generate` and `prepare_inputs_for_generation` of PeftModelFor..."""
    name = "t5" if task == "SEQ_2_SEQ_LM" else "bert"
    targets = ["q", "v"] if name == "t5" else ["query", "value"]
    twins = Twins(with_lora(make_base(name), task, target_modules=targets).train())
    inputs = batch(twins.plain)
    assert twins.call(lambda model: model.add_adapter("other", LoraConfig(r=2, task_type=task, target_modules=targets)))
    assert twins.call(lambda model: model.set_adapter("other"))
    assert_step_close(step(twins.ours, inputs), step(twins.plain, inputs), truth(twins.plain, inputs))
    if name == "t5":
        ids = inputs["input_ids"][:2]
        for model in (twins.ours, twins.plain):
            model.eval()
        rows = {"adapter_names": ["default", "other"], "num_beams": 2}
        for more in ({}, rows):
            assert twins.call(lambda model, more=more: model.generate(input_ids=ids, max_new_tokens=3, **more))
