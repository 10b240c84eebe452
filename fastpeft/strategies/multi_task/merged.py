"""The tasks' adapters as one, by PEFT's `add_weighted_adapter`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.utils import get_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from fastpeft.errors import UserError
from fastpeft.metrics.findings import Findings, Metric, Section
from fastpeft.training.preparing import Prepared

from .adapters import activate
from .measured import Measured, difference, figure, value, verdict
from .options import Merge

NAME = "merged"
"""Of the adapter, while it is there."""


@contextmanager
def merged(
    model: Any, adapters: Sequence[str], method: str, options: Merge, *, shares: bool, seed: int
) -> Iterator[None]:
    """Within it the model has one more adapter, NAME, made of these; heads are merged into none.

    Args:
        method: PEFT's combination_type.
        shares: whether each of the adapters has a part that all have.
        seed: of what some methods draw.

    Raises:
        UserError: PEFT refuses it.
    """
    before = list(model.base_model.active_adapters)
    activate(model, [adapters[0]], adapters[0])
    torch.manual_seed(seed)
    try:
        with _without_heads(model):
            weight = options.weight or (1 / len(adapters) if shares else 1.0)
            model.base_model.add_weighted_adapter(
                list(adapters), [weight] * len(adapters), NAME, combination_type=method, density=options.density
            )
    except ValueError as error:
        raise UserError(f"strategy.options.merge.methods: {method}: {error}") from error
    try:
        yield
    finally:
        model.delete_adapter(NAME)
        activate(model, before)


@contextmanager
def _without_heads(model: Any) -> Iterator[None]:
    """PEFT merges no adapters that have copies of whole modules."""
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    held = [(each, each.modules_to_save, set(each._adapters), each._active_adapter) for each in wrappers]
    for wrapper in wrappers:
        wrapper.modules_to_save, wrapper._adapters, wrapper._active_adapter = nn.ModuleDict(), set(), []
    try:
        yield
    finally:
        for wrapper, copies, adapters, active in held:
            wrapper.modules_to_save, wrapper._adapters, wrapper._active_adapter = copies, adapters, active


def save(model: Any, folder: Path, head: str | None) -> None:
    """The merged adapter as PEFT saves one, with a task's copy of the head where one is named."""
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(model, adapter_name=NAME)
    state = {name: tensor for name, tensor in state.items() if "lora_" in name}
    config = replace(model.peft_config[NAME], inference_mode=True)
    config.base_model_name_or_path = config.base_model_name_or_path or model.get_base_model().name_or_path
    if head is not None:
        whole = get_peft_model_state_dict(model, adapter_name=head)
        state |= {name: tensor for name, tensor in whole.items() if "lora_" not in name}
        config.modules_to_save = model.peft_config[head].modules_to_save
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "adapter_model.safetensors")
    config.save_pretrained(str(folder))


def findings(tasks: dict[str, Prepared], own: dict[str, Measured], found: dict[str, dict[str, Measured]]) -> Findings:
    """Merged adapters beside each task's own.

    Args:
        tasks: those that were measured.
        own: with their own adapters.
        found: by method, with the merged one.
    """
    metrics: list[Metric] = []
    lines = [
        "| task | method | figure | own adapter | merged | difference (95 % interval) | merged is |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, measured in found.items():
        for name, prepared in tasks.items():
            metric = difference(f"{name}, {method}", prepared, own[name], measured[name], "its own adapter")
            metrics.append(metric)
            values = " | ".join(f"{value(prepared, columns):.4f}" for columns in (own[name], measured[name]))
            lines.append(
                f"| {name} | {method} | {figure(prepared)[0]} | {values} | "
                f"{metric.value:+.4f} ({metric.low:+.4f} to {metric.high:+.4f}) | {verdict(metric)} |"
            )
    lines += ["", "A classifier's merged adapter has each task's own head."]
    return Findings(tuple(metrics), (), (Section("Merged adapters", "\n".join(lines)),))
