"""The model of a run: base and fresh adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastpeft.config import FastpeftConfig, LoraSection
from fastpeft.errors import UserError
from fastpeft.memory.allocator import grow_segments
from fastpeft.models import bases
from fastpeft.models.adapters import attach_adapter
from fastpeft.models.tasks import HEADS, UNUSED, head_options

from .preparing import Prepared


def load_model(
    prepared: Prepared,
    device: Any,
    dtype: Any,
    change: Callable[[Any, LoraSection], LoraSection] = lambda base, section: section,
    attach: Callable[[Any, LoraSection, str, int], Any] = attach_adapter,
) -> Any:
    """Base and fresh adapter, accelerated; what is trained is in float32.

    Where layers are streamed, the base is loaded on the CPU, and only what stays on the device is moved there. Weights
    that wait on the disk stay in their cache's files.

    Args:
        change: what is done to the base before; it gives the adapter's settings.
        attach: makes the PEFT model; as `attach_adapter`.
    """
    import torch

    import fastpeft

    home = torch.device("cpu") if prepared.memory.streams else device
    config = prepared.config
    if config.acceleration.enabled and prepared.memory.policy is not None:
        grow_segments()  # before the base takes its memory
    base, section = load_base(prepared, home, dtype)
    model = attach(base, change(base, section), config.model.task, config.training.seed)
    trained_in_float32(model)
    if config.acceleration.enabled:
        fastpeft.accelerate(model, memory=prepared.memory.policy)
    if home != device:
        model.to(device)
        if hasattr(base, "hf_device_map"):
            base.hf_device_map = {"": device}  # what accelerate compares with the device that trains
    return model


def load_base(prepared: Prepared, device: Any, dtype: Any) -> tuple[Any, LoraSection]:
    """(the base, `lora` with what its checkpoint has no values for among what is trained whole)."""
    config = prepared.config
    task = config.model.task
    others = head_options(task, config.data.labels, config.data.problem_type)
    _seed(config.training.seed)  # a fresh classifier's first values
    others["whole"] = config.lora.modules_to_save
    others["mapped"] = prepared.memory.waits and device.type == "cpu"
    base, fresh = bases.load_base(config.model, task, device, dtype, config.model.quantization or "none", **others)
    text = base.config.get_text_config()
    if task == "sequence-classification" or text.pad_token_id is None:  # decoders look for the last token
        text.pad_token_id = prepared.tokenizer.pad_token_id
    return base, _training_what_is_fresh(config, base, fresh)


def check_ids(model: Any, prepared: Prepared) -> None:
    """Raise UserError for a token that the model does not know: training would end at it, on a GPU without a word."""
    from fastpeft.noticing.batches import facts_of

    described, writes = facts_of(model, prepared.tokenizer), prepared.config.model.task.endswith("-lm")
    known = {"input_ids": described.embeddings, "labels": described.words if writes else None}
    sides = {"data": prepared.rows, "the evaluation": prepared.evaluation}
    for where, encoded in sides.items():
        for name, count in known.items():
            if encoded is None or count is None or name not in encoded.rows.column_names:
                continue
            if not _may_reach(encoded.rows, name, count):
                continue
            for ids, number in zip(encoded.rows[name], encoded.numbers, strict=True):
                if (most := max(ids, default=0)) >= count:
                    token = prepared.tokenizer.convert_ids_to_tokens(most)
                    raise UserError(
                        f"model.name: expected a tokenizer of the model, which knows {count} tokens, got one with "
                        f"token {most} ({token!r}), as in row {number} of {where}"
                    )


def _may_reach(rows: Any, name: str, count: int) -> bool:
    """Whether a number in a column of lists is that large; without making rows, of all that its table holds."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = rows.data.column(name)
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):  # a class for each row
        return False
    most = pc.max(pc.list_flatten(column)).as_py()
    return most is not None and most >= count


def trained_in_float32(model: Any) -> None:
    """A scaled float16 gradient could not be unscaled."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _training_what_is_fresh(config: FastpeftConfig, base: Any, fresh: list[str]) -> LoraSection:
    """A head's new modules are trained and saved whole; a language model should not have any, and no body should."""
    heads = HEADS.get(config.model.task, ())
    known = (*config.lora.modules_to_save, *heads)
    fresh = [name for name in fresh if name not in UNUSED.get(config.model.task, ())]
    added = [name for name in fresh if not any(name == one or name.endswith(f".{one}") for one in known)]
    embeddings = base.get_input_embeddings()
    if any(base.get_submodule(name) is embeddings for name in fresh):
        raise UserError(
            f"model.name: {config.model.name} has no values for {', '.join(fresh[:4])}, so the model would be random; "
            f"transformers finds none of its layers for task {config.model.task}"
        )
    if added and not heads:
        raise UserError(
            f"model.name: {config.model.name} has no values for {', '.join(added[:4])}, so its head would be random; "
            "take a checkpoint with a head, or name these in lora.modules_to_save"
        )
    return replace(config.lora, modules_to_save=[*config.lora.modules_to_save, *added])


def _seed(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)
