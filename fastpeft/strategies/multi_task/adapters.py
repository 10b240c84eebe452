"""One PEFT adapter a task on one base, and which of them a forward uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from fastpeft.config import LoraSection
from fastpeft.errors import UserError
from fastpeft.models.adapters import attach_adapter, lora_config
from fastpeft.models.tasks import HEADS

PEFTS = {"base_model", "base_layer", "model", "modules_to_save", "original_module"}
"""Parts that PEFT adds to the names of a model's."""


def attach(base: Any, sections: dict[str, LoraSection], task: str, seed: int) -> Any:
    """A PEFT model with a fresh adapter of each name; those of the same rank begin with the same values.

    Args:
        base: the model.
        sections: `lora` of each adapter.
        task: as `attach_adapter`.

    Raises:
        UserError: a name that a part of the model has, by which PEFT would take it for an adapter's.
    """
    parts = {part for path, _ in base.named_parameters() for part in path.split(".")} | PEFTS
    if (taken := next((name for name in sections if name in parts), None)) is not None:
        raise UserError(f"strategy.options.tasks: expected names that no part of the model has, got {taken!r}")
    (first, section), *others = sections.items()
    model = attach_adapter(base, section, task, seed, first)
    whole = [name for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    if whole:  # which PEFT would take for targets of a second adapter
        config = model.peft_config[first]
        config.exclude_modules = [*(config.exclude_modules or ()), *whole]
    for name, section in others:
        add(model, name, section, task, seed)
    return model


def add(model: Any, name: str, section: LoraSection, task: str, seed: int) -> None:
    """One more adapter, on the modules that the first one is on."""
    config = lora_config(section, task)
    first = next(iter(model.peft_config))
    config.target_modules = model.peft_config[first].target_modules  # all-linear would take copies of heads for some
    config.exclude_modules = model.peft_config[first].exclude_modules
    activate(model, [first], first)  # PEFT sets what is active anew, and heads of one adapter at a time
    torch.manual_seed(seed)
    model.add_adapter(name, config)
    if config.modules_to_save is not None:  # PEFT adds a head's names once more
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save))


def size_head(model: Any, adapter: str, task: str, labels: Sequence[str], seed: int) -> None:
    """Give an adapter's copy of a classifier's head as many outputs as there are labels, with fresh values.

    Args:
        adapter: its name.
        task: what the model is trained to do; nothing happens to models without a head of classes.
    """
    base = model.get_base_model()
    for name, wrapper in heads(base, task):
        copy = wrapper.modules_to_save[adapter]
        places = [place for place, module in copy.named_modules() if _is_last(module, base.config.num_labels)]
        if not places:
            raise TypeError(f"model: expected a head that ends in a linear layer in {name}, got {type(copy).__name__}")
        old = copy.get_submodule(places[-1])
        torch.manual_seed(seed)
        new = nn.Linear(old.in_features, len(labels), old.bias is not None, old.weight.device, old.weight.dtype)
        base._init_weights(new)
        parent, _, last = places[-1].rpartition(".")
        if last:
            setattr(copy.get_submodule(parent), last, new)
        else:
            wrapper.modules_to_save[adapter] = new
        wrapper.__class__ = TaskHead


def heads(base: Any, task: str) -> Iterator[tuple[str, Any]]:
    """(name, PEFT's wrapper) of the heads that adapters have copies of."""
    for name, module in base.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and name.rpartition(".")[2] in HEADS.get(task, ()):
            yield name, module


def _is_last(module: nn.Module, labels: int) -> bool:
    return isinstance(module, nn.Linear) and module.out_features == labels


class TaskHead(ModulesToSaveWrapper):
    """A wrapped head whose copies differ in their number of outputs; those of a mixed batch are as wide as the widest.

    PEFT's own mixes linear layers of one width alone.
    """

    def _mixed_batch_forward(self, input: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        parts, places = [], []
        for name in dict.fromkeys(adapter_names):
            rows = torch.tensor([row for row, other in enumerate(adapter_names) if other == name], device=input.device)
            parts.append(self.modules_to_save[name](input[rows], *args, **kwargs))
            places.append(rows)
        widest = max(part.shape[-1] for part in parts)
        padded = torch.cat([nn.functional.pad(part, (0, widest - part.shape[-1])) for part in parts])
        return padded[torch.cat(places).argsort()]


def activate(model: Any, adapters: Sequence[str], head: str | None = None) -> None:
    """Have these adapters trained, and used by a forward that is told of no other.

    Args:
        adapters: names; a forward outside `fastpeft.mixed_batch` adds all of them up.
        head: whose copy of the head such a forward uses; None for the first of `adapters`, all of whose are trained.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter(list(adapters))
        elif isinstance(module, ModulesToSaveWrapper):
            module.set_adapter(head or adapters[0])
            for name in adapters if head is None else ():
                module.modules_to_save[name].requires_grad_(True)
    model.base_model.active_adapter = list(adapters)
    model.active_adapter = adapters[0]


@contextmanager
def only(model: Any, adapter: str, head: str | None = None) -> Iterator[None]:
    """Within it a forward uses one adapter, with the head of another where one is named."""
    before = list(model.base_model.active_adapters)
    activate(model, [adapter], head or adapter)
    try:
        yield
    finally:
        activate(model, before)
