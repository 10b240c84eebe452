"""Public methods of PeftModel and LoraModel, and PEFT's functions, on an accelerated model and on the plain one."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.helpers import check_if_peft_model, disable_input_dtype_casting, rescale_adapter_scale, update_signature
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils.hotswap import hotswap_adapter

from tests.integration.models import batch, make_base, trained, with_lora
from tests.integration.steps import assert_step_close, step, truth
from tests.integration.surface import properties_of
from tests.integration.twins import Call, Twins

ATTENTION = ["q_proj", "v_proj"]


def make(**config: Any) -> PeftModel:
    """Two adapters on some projections of two layers, of which one is active."""
    model = with_lora(make_base(), target_modules=[*ATTENTION, "up_proj"], **config)
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=3, target_modules=ATTENTION))
    return trained(model).train()  # type: ignore[no-any-return]


def files(write: Callable[[Any, str], Any], *read: Callable[[Any, str], Any]) -> Call:
    """All that a call writes into a new folder, byte for byte, and what others make of it."""

    def call(model: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            returned = [done(model, folder) for done in (write, *read)]
            paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            return returned, {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    return call


def save(**arguments: Any) -> Callable[[Any, str], Any]:
    return lambda model, folder: model.save_pretrained(folder, **arguments)


def load(name: str, **arguments: Any) -> Callable[[Any, str], Any]:
    return lambda model, folder: [str(model.load_adapter(folder, name, **arguments)), model.set_adapter(name)]


def then(*calls: Call) -> Call:
    return lambda model: [call(model) for call in calls][-1]


def weighted(combination: str, **arguments: Any) -> Call:
    names = ["default", "other"]
    return then(
        lambda model: model.add_weighted_adapter(names, [0.7, -0.4], "mix", combination_type=combination, **arguments),
        lambda model: model.set_adapter("mix"),
    )


def printed(call: Call) -> Call:
    def with_output(model: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            call(model)
        return output.getvalue()

    return with_output


IDS = torch.arange(3, 15).view(2, 6)


def generated(**arguments: Any) -> Call:
    def call(model: Any) -> Any:
        model.eval()
        try:
            return model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, **arguments)
        finally:
            model.train()

    return call


def disabled(model: Any) -> Any:
    with model.disable_adapter():
        return model(input_ids=IDS).logits


def converted(model: Any) -> Any:
    """With the adapter as it was before training."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/start", selected_adapters=["default"])
        for name, parameter in model.named_parameters():
            if "lora_" in name and "default" in name:
                parameter.data.mul_(1.5)
        model.save_pretrained(
            f"{folder}/end", selected_adapters=["default"], path_initial_model_for_weight_conversion=f"{folder}/start"
        )
        return (Path(folder) / "end/adapter_model.safetensors").read_bytes()


METHODS: dict[str, Call] = {
    "save_pretrained": files(save()),
    "save_pretrained: one, in one pickle": files(save(selected_adapters=["other"], safe_serialization=False)),
    "save_pretrained: with embeddings": files(save(save_embedding_layers=True)),
    "save_pretrained: converted": converted,
    "from_pretrained": files(
        save(), lambda model, folder: PeftModel.from_pretrained(model.unload(), folder, is_trainable=True)
    ),
    "load_adapter": files(save(), load("third", is_trainable=True)),
    "load_adapter: frozen": files(save(), load("third")),
    "load_adapter: little memory": files(save(), load("third", low_cpu_mem_usage=True, is_trainable=True)),
    "load_adapter: over one that is there": files(save(), load("default", is_trainable=True)),
    "load_adapter: nothing there": lambda model: model.load_adapter("/nowhere", "third"),
    "prepare_model_for_gradient_checkpointing": lambda model: model.prepare_model_for_gradient_checkpointing(
        model.get_base_model()
    ),
    "get_prompt_embedding_to_save": lambda model: model.get_prompt_embedding_to_save("default"),
    "get_prompt": lambda model: model.get_prompt(1),
    "get_nb_trainable_parameters": lambda model: model.get_nb_trainable_parameters(),
    "print_trainable_parameters": printed(lambda model: model.print_trainable_parameters()),
    "forward": lambda model: model(input_ids=IDS, return_dict=False)[0].shape,
    "forward: embeddings": lambda model: (
        model(inputs_embeds=torch.ones(2, 5, 64), attention_mask=torch.ones(2, 5), labels=IDS[:, :5]).logits.shape
    ),
    "forward: unknown adapter": then(
        lambda model: model.eval(), lambda model: model(input_ids=IDS, adapter_names=["default", "nobody"])
    ),
    "forward: adapters in training": lambda model: model(input_ids=IDS, adapter_names=["default", "other"]),
    "generate": generated(),
    "generate: adapters by row": generated(adapter_names=["other", "__base__"]),
    "generate: adapters by row, beams": generated(adapter_names=["other", "default"], num_beams=2),
    "prepare_inputs_for_generation": lambda model: model.prepare_inputs_for_generation(
        IDS, cache_position=torch.arange(6), use_cache=True
    ),
    "disable_adapter": disabled,
    "get_base_model": lambda model: model.get_base_model(),
    "add_adapter": lambda model: model.add_adapter("third", LoraConfig(r=2, target_modules=["q_proj", "k_proj"])),
    "add_adapter: little memory": lambda model: model.add_adapter(
        "third", LoraConfig(r=2, target_modules=["q_proj"]), low_cpu_mem_usage=True
    ),
    "add_adapter: name taken": lambda model: model.add_adapter("other", LoraConfig(target_modules=["q_proj"])),
    "add_adapter: other method": lambda model: model.add_adapter("third", peft.IA3Config()),
    "delete_adapter": lambda model: model.delete_adapter("other"),
    "delete_adapter: the active one": lambda model: model.delete_adapter("default"),
    "delete_adapter: unknown": lambda model: model.delete_adapter("nobody"),
    "get_layer_status": lambda model: model.get_layer_status(),
    "get_model_status": lambda model: model.get_model_status(),
    "get_model_status: merged, in part": then(
        lambda model: next(iter(model.get_base_model().model.layers)).mlp.up_proj.merge(),
        lambda model: model.get_model_status(),
    ),
    "set_adapter": lambda model: model.set_adapter("other"),
    "set_adapter: frozen": lambda model: model.set_adapter("other", inference_mode=True),
    "set_adapter: unknown": lambda model: model.set_adapter("nobody"),
    "set_requires_grad": lambda model: model.set_requires_grad(["default", "other"], True),
    "create_or_update_model_card": files(lambda model, folder: model.create_or_update_model_card(folder)),
    "supports_lora_conversion": lambda model: model.supports_lora_conversion(),
}
"""Of PeftModelForCausalLM. After the method's name, what is special."""

TUNER: dict[str, Call] = {
    "add_weighted_adapter: linear": weighted("linear"),
    "add_weighted_adapter: cat": weighted("cat"),
    "add_weighted_adapter: svd": weighted("svd", svd_rank=3),
    "add_weighted_adapter: ties": weighted("ties", density=0.5),
    "add_weighted_adapter: ties_svd": weighted("ties_svd", density=0.5),
    "add_weighted_adapter: dare_linear": weighted("dare_linear", density=0.5),
    "add_weighted_adapter: dare_ties": weighted("dare_ties", density=0.5),
    "add_weighted_adapter: dare_linear_svd": weighted("dare_linear_svd", density=0.5),
    "add_weighted_adapter: dare_ties_svd": weighted("dare_ties_svd", density=0.5),
    "add_weighted_adapter: magnitude_prune": weighted("magnitude_prune", density=0.5),
    "add_weighted_adapter: magnitude_prune_svd": weighted("magnitude_prune_svd", density=0.5),
    "add_weighted_adapter: unknown": weighted("nothing"),
    "subtract_mutated_init": lambda model: model.base_model.subtract_mutated_init(
        {f"base_model.{n}": t for n, t in peft.get_peft_model_state_dict(model.base_model).items()}, "default", {}
    ),
    "forward": lambda model: model.base_model(input_ids=IDS, return_dict=False)[0].shape,
    "disable_adapter_layers": lambda model: model.base_model.disable_adapter_layers(),
    "enable_adapter_layers": then(
        lambda model: model.base_model.disable_adapter_layers(), lambda model: model.base_model.enable_adapter_layers()
    ),
    "delete_adapter": lambda model: model.base_model.delete_adapter("other"),
    "set_requires_grad": lambda model: model.base_model.set_requires_grad("default", False),
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "merge_and_unload: both, safely": lambda model: model.merge_and_unload(
        safe_merge=True, adapter_names=["default", "other"]
    ),
    "unload": lambda model: model.unload(),
    "inject_adapter": lambda model: model.base_model.inject_adapter(model.get_base_model(), "default"),
    "merge_adapter": lambda model: model.merge_adapter(),
    "merge_adapter: another": lambda model: model.merge_adapter(adapter_names=["other"], safe_merge=True),
    "unmerge_adapter": then(lambda model: model.merge_adapter(), lambda model: model.unmerge_adapter()),
    "set_adapter": lambda model: model.base_model.set_adapter(["default", "other"]),
    "set_adapter: frozen": lambda model: model.base_model.set_adapter("other", inference_mode=True),
    "get_model_config": lambda model: model.base_model.get_model_config(model.get_base_model()),
    "supports_lora_conversion": lambda model: model.base_model.supports_lora_conversion("other"),
}
"""Of LoraModel."""


def injected(model: Any) -> Any:
    return peft.inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "o_proj"]), model, "third")


def rescaled(model: Any) -> Any:
    with rescale_adapter_scale(model, 0.5):
        return peft.get_layer_status(model)


def uncast(model: Any) -> Any:
    with disable_input_dtype_casting(model):
        return model(input_ids=IDS).logits


def lora_ga(model: Any) -> Any:
    base = model.unload()
    for parameter in base.parameters():
        parameter.requires_grad_(True)
    config = LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig()
    )
    peft.preprocess_loraga(base, config, lambda: base(input_ids=IDS, labels=IDS).loss.backward())
    return [m._peft_loraga_grad.shape for m in base.modules() if hasattr(m, "_peft_loraga_grad")]


def arrow(model: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("one", "two"):
            model.save_pretrained(f"{folder}/{name}", selected_adapters=["default"])
        config = peft.ArrowConfig(top_k=1)
        paths = [f"{folder}/{name}/" for name in ("one", "two")]
        return peft.create_arrow_model(model.unload(), paths, config)(input_ids=IDS).logits.shape


def state_set(**arguments: Any) -> Call:
    def call(model: Any) -> Any:
        state = {name: value * 0.5 for name, value in peft.get_peft_model_state_dict(model).items()}
        return peft.set_peft_model_state_dict(model, state, **arguments)

    return call


def hotswapped(model: Any, folder: str) -> Any:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(0.5)
    return hotswap_adapter(model, folder, "default")


FUNCTIONS: dict[str, Call] = {
    "get_peft_model_state_dict": lambda model: peft.get_peft_model_state_dict(model),
    "get_peft_model_state_dict: another": lambda model: peft.get_peft_model_state_dict(model, adapter_name="other"),
    "set_peft_model_state_dict": state_set(),
    "set_peft_model_state_dict: little memory": state_set(low_cpu_mem_usage=True),
    "set_peft_model_state_dict: another": state_set(adapter_name="other", ignore_mismatched_sizes=True),
    "get_base_model_state_dict": lambda model: peft.get_base_model_state_dict(model),
    "set_base_model_state_dict": lambda model: peft.set_base_model_state_dict(
        model, {name: value * 0.5 for name, value in peft.get_base_model_state_dict(model).items()}
    ),
    "load_peft_weights": files(save(), lambda model, folder: peft.load_peft_weights(folder)),
    "inject_adapter_in_model": injected,
    "convert_to_lora": lambda model: peft.convert_to_lora(model, rank=2),
    "convert_to_lora: by a threshold": lambda model: peft.convert_to_lora(model, rank=0.9),
    "save_as_lora": files(lambda model, folder: peft.save_as_lora(folder, model, rank=3)),
    "cast_mixed_precision_params": lambda model: peft.cast_mixed_precision_params(model, torch.bfloat16),
    "prepare_model_for_kbit_training": lambda model: peft.prepare_model_for_kbit_training(model),
    "replace_lora_weights_loftq": lambda model: peft.replace_lora_weights_loftq(model),
    "preprocess_loraga": lora_ga,
    "create_arrow_model": arrow,
    "get_layer_status": lambda model: peft.get_layer_status(model),
    "get_model_status": lambda model: peft.get_model_status(model),
    "find_kappa_target_modules": lambda model: peft.find_kappa_target_modules(model),
    "reduce_intruder_dimension": lambda model: reduce_intruder_dimension(model, logging_sink=None),
    "hotswap_adapter": files(save(), hotswapped),
    "check_if_peft_model": files(save(), lambda model, folder: check_if_peft_model(folder)),
    "rescale_adapter_scale": rescaled,
    "disable_input_dtype_casting": uncast,
    "update_signature": lambda model: [update_signature(model), str(inspect.signature(model.forward))][1],
    "cast_adapter_dtype": then(
        lambda model: model.to(torch.bfloat16), lambda model: tuners_utils.cast_adapter_dtype(model, "default", True)
    ),
    "delete_adapter": lambda model: tuners_utils.delete_adapter(model, "other", prefix="lora_", layer_cls=LoraLayer),
    "set_adapter": lambda model: tuners_utils.set_adapter(model, "other", layer_cls=LoraLayer),
    "set_requires_grad": lambda model: tuners_utils.set_requires_grad(model, "other"),
    "inspect_matched_modules": lambda model: tuners_utils.inspect_matched_modules(model.base_model),
    "to": lambda model: model.to(torch.float64),
    "bfloat16": lambda model: model.bfloat16(),
    "half and back": lambda model: model.half().float(),
    "apply": lambda model: [type(model.apply(lambda module: None))],
    "deepcopy": copy.deepcopy,
    "requires_grad_": lambda model: model.requires_grad_(False),
}
"""Of PEFT and, in the end, of torch."""

REFUSED = {
    "load_adapter: nothing there",
    "get_prompt_embedding_to_save",  # of prompt tuning
    "get_prompt",
    "forward: unknown adapter",
    "forward: adapters in training",
    "add_adapter: name taken",
    "add_adapter: other method",
    "delete_adapter: unknown",
    "set_adapter: unknown",
    "add_weighted_adapter: unknown",
    "replace_lora_weights_loftq",  # wants a quantised model and its checkpoint
}
"""Calls that PEFT refuses; all others must come to something."""

OFTEN = (
    "load_adapter",
    "load_adapter: over one that is there",
    "generate: adapters by row, beams",
    "get_layer_status",
    "set_requires_grad",
    "add_weighted_adapter: cat",
    "cast_adapter_dtype",
    "half and back",
)
TABLES = {"PeftModelForCausalLM": METHODS, "LoraModel": TUNER, "functions": FUNCTIONS}


@pytest.fixture(scope="module")
def grown() -> Twins:
    """After a first step, which finds the siblings."""
    torch.manual_seed(0)
    twins = Twins(make())
    step(twins.ours, batch(twins.plain))
    twins.plain.get_base_model().set_attn_implementation("fastpeft")  # type: ignore[operator]
    return twins


@pytest.mark.parametrize(
    ("table", "name"),
    [
        pytest.param(table, name, marks=() if name in OFTEN else pytest.mark.full)
        for table, calls in TABLES.items()
        for name in calls
    ],
)
def test_calls(table: str, name: str, grown: Twins) -> None:
    twins = copy.deepcopy(grown)
    assert twins.call(TABLES[table][name]) == (name not in REFUSED)
    inputs = batch(twins.plain)
    try:
        plain = step(twins.plain, inputs)
    except Exception as error:  # nothing is trained any more, say
        with pytest.raises(type(error), match=re.escape(str(error))):
            step(twins.ours, inputs)
        return
    assert_step_close(step(twins.ours, inputs), plain, truth(twins.plain, inputs))


def test_properties(grown: Twins) -> None:
    for find in (lambda model: model, lambda model: model.base_model):
        names = properties_of(type(find(grown.plain)))
        assert names
        for name in sorted(names):
            grown.call(lambda model, name=name, find=find: getattr(find(model), name))
