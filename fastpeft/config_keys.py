"""All keys of the configuration in one list, and what else people call them."""

from __future__ import annotations

import difflib
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, NamedTuple, get_type_hints

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


def nearest_key(name: str) -> str | None:
    """The key that a user most likely meant; None if none is near."""
    if (key := key_of(name)) is not None:
        return key
    near = difflib.get_close_matches(name, [*keys(), *(key.rpartition(".")[2] for key in keys())], n=1)
    return key_of(near[0]) or near[0] if near else None
