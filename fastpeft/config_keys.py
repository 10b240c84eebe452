"""All keys of the configuration in one list, and what else people call them."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, NamedTuple, get_type_hints

from fastpeft.hints import nearest

OTHER_NAMES = {
    "model": "model.name",
    "data": "data.path",
    "lr": "training.learning_rate",
    "epochs": "training.num_train_epochs",
    "batch_size": "training.per_device_train_batch_size",
    "model_name_or_path": "model.name",
    "dataset_name": "data.path",
    "max_seq_length": "data.max_length",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
}
"""Short names, and those of TRL's command line. A key's last part alone will do too where no other key has the same."""
ELSEWHERE = {
    "datasets": "data.path",
    "dataset": "data.path",
    "dataset_dir": "data.path",
    "dataset_config": "data.name",
    "dataset_train_split": "data.split",
    "test_datasets": "data.eval_path",
    "eval_dataset": "data.eval_path",
    "dataset_test_split": "data.eval_split",
    "val_set_size": "data.eval_fraction",
    "val_size": "data.eval_fraction",
    "dataset_text_field": "data.columns",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "sample_packing": "data.packing",
    "neat_packing": "data.packing",
    "template": "data.chat_template",
    "chat_template_jinja": "data.chat_template",
    "chat_template_path": "data.chat_template",
    "special_tokens": "data.eos_token",
    "train_on_inputs": "data.assistant_only",
    "train_on_prompt": "data.assistant_only",
    "assistant_only_loss": "data.assistant_only",
    "max_samples": "data.limit",
    "base_model": "model.name",
    "revision_of_model": "model.revision",
    "model_revision": "model.revision",
    "load_in_8bit": "model.quantization",
    "quantization_type": "model.quantization",
    "bnb_4bit_quant_type": "model.quantization",
    "double_quantization": "model.double_quant",
    "use_bnb_nested_quant": "model.double_quant",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "flash_attention": "model.attention",
    "flash_attn": "model.attention",
    "adapter": "method",
    "finetuning_type": "method",
    "load_in_4bit": "method",
    "quantization_bit": "method",
    "quantization_method": "method",
    "lora_rank": "lora.r",
    "lora_target": "lora.target_modules",
    "lora_target_linear": "lora.target_modules",
    "lora_modules_to_save": "lora.modules_to_save",
    "additional_target": "lora.modules_to_save",
    "peft_use_dora": "lora.use_dora",
    "peft_use_rslora": "lora.use_rslora",
    "peft_init_lora_weights": "lora.init_lora_weights",
    "pissa_init": "lora.init_lora_weights",
    "pissa_iter": "lora.init_lora_weights",
    "lora_rank_pattern": "lora.extra.rank_pattern",
    "lora_alpha_pattern": "lora.extra.alpha_pattern",
    "peft_layers_to_transform": "lora.extra.layers_to_transform",
    "lora_qkv_kernel": "acceleration.enabled",
    "lora_o_kernel": "acceleration.enabled",
    "lora_mlp_kernel": "acceleration.enabled",
    "disable_gradient_checkpointing": "memory.gradient_checkpointing",
    "activation_offloading": "memory.activations",
    "use_unsloth_gc": "memory.activations",
    "layer_offloading": "memory.streamed",
    "offload_params": "memory.streamed",
    "gpu_memory_limit": "memory.budget_gib",
    "micro_batch_size": "training.per_device_train_batch_size",
    "eval_batch_size": "training.per_device_eval_batch_size",
    "num_epochs": "training.num_train_epochs",
    "optimizer": "training.optim",
    "lr_scheduler": "training.lr_scheduler_type",
    "warmup_ratio": "training.warmup_steps",
    "evals_per_epoch": "training.eval_steps",
    "eval_strategy": "training.eval_steps",
    "saves_per_epoch": "training.save_steps",
    "wandb_project": "training.report_to",
    "wandb_name": "training.extra.run_name",
    "run_name": "training.extra.run_name",
    "tf32": "training.extra.tf32",
    "optim_args": "training.extra.optim_args",
    "neftune_noise_alpha": "training.extra.neftune_noise_alpha",
    "group_by_length": "training.extra.train_sampling_strategy",
    "resume_from_checkpoint": "--resume",
    "auto_resume_from_checkpoints": "--resume",
    "overwrite_output_dir": "--overwrite",
}
"""Names of Axolotl, LLaMA-Factory and TRL, and where to look here instead: values and defaults may differ.

docs/how-to/from-axolotl-llama-factory.md says how.
"""
_OFFLOAD = "memory.activations: offload"
OTHER_VALUES = {
    ("memory.gradient_checkpointing", "offload"): _OFFLOAD,
    ("memory.gradient_checkpointing", "offload_disk"): _OFFLOAD,
    ("memory.gradient_checkpointing", "unsloth"): _OFFLOAD,
    ("memory.activations", "offload_disk"): _OFFLOAD,
    ("memory.activations", "unsloth"): _OFFLOAD,
    ("memory.activations", "full"): "memory.activations: recompute",
    ("memory.activations", "checkpoint"): "memory.activations: recompute",
    ("memory.activations", "none"): "memory.activations: keep",
}
"""Values that other tools have, and what to write here instead."""


class Key(NamedTuple):
    """One key: its type, its default, and what it is for."""

    kind: Any
    default: Any
    help: str


@cache
def keys() -> dict[str, Key]:
    """Every key, such as "lora.r", in the order of the sections."""
    from fastpeft.config import FastpeftConfig

    found: dict[str, Key] = {}

    def walk(section: Any, prefix: str) -> None:
        hints = get_type_hints(section)
        for field in fields(section):
            kind = hints[field.name]
            if is_dataclass(kind):
                walk(kind, f"{prefix}{field.name}.")
                continue
            default = field.default if field.default_factory is MISSING else field.default_factory()
            found[prefix + field.name] = Key(kind, default, field.metadata["help"])

    walk(FastpeftConfig, "")
    return found


def key_of(name: str) -> str | None:
    """The key that a name means; None for a name that is none, or that several keys end in."""
    name = name.replace("-", "_")
    if name in keys():
        return name
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    if any(name.startswith(f"{key}.") and "dict" in str(found.kind) for key, found in keys().items()):
        return name  # such as lora.extra.lora_bias
    ending = [key for key in keys() if key.rpartition(".")[2] == name]
    return ending[0] if len(ending) == 1 else None


def check_value(name: str, key: str | None, value: Any) -> None:
    """Raise ValueError for a value that another tool has: `name` is what was written, `key` what it means."""
    wanted = OTHER_VALUES.get((key or "", value)) if isinstance(value, str) else None
    if wanted is not None:
        raise ValueError(f"{name}: got {value!r}, did you mean '{wanted}'?")


def nearest_key(name: str) -> str | None:
    """The key, or option, that a user most likely meant; None if none is near."""
    if (key := key_of(name) or ELSEWHERE.get(name.replace("-", "_"))) is not None:
        return key
    near = nearest(name, [*keys(), *(key.rpartition(".")[2] for key in keys())])
    return key_of(near) or near if near else None
