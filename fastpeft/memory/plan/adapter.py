"""What a configuration of PEFT says of an adapter's sizes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastpeft.config import LoraSection
from fastpeft.errors import UserError
from fastpeft.models.tasks import HEADS
from fastpeft.models.untrusted import check_adapter_config

NAME = "adapter_config.json"
_NUMBER = re.compile(r"(?<![a-zA-Z_\d])\d|\[|\\d")
"""Of a layer, in a name or an expression."""
_OURS = ("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save", "use_rslora")
_OTHERS = ("use_dora", "bias", "init_lora_weights", "task_type", "peft_type", "base_model_name_or_path", "revision")
_NO_SHAPES = ("inference_mode", "peft_version", "auto_mapping", "runtime_config", "loftq_config", "eva_config")


def section_of(
    adapter: Any, names: Sequence[str] | None = None, task: str | None = None, key: str = "model"
) -> LoraSection:
    """The configuration of ours that gives an adapter of the same sizes.

    Args:
        adapter: of PEFT.
        names: of the model's modules; None where it is not made yet, and `task` says what its head is.
        key: what the user calls it.

    Raises:
        ValueError: it is no adapter of LoRA.
    """
    if str(getattr(adapter.peft_type, "value", adapter.peft_type)) != "LORA":
        raise ValueError(f"{key}: expected an adapter of LoRA, got {adapter.peft_type}")
    targets = adapter.target_modules
    if targets is not None and not isinstance(targets, str):
        targets = sorted(targets)
        if adapter.layers_to_transform is None:  # a name may be of a layer that is not traced
            targets = rf"(.*\.)?({'|'.join(targets)})"
    # PEFT names heads of any classifier, "classifier" and "score", and takes those that are there
    whole = list(adapter.modules_to_save or ())
    if names is None:
        whole = [name for name in whole if name not in HEADS.get(task or "", ())]
    else:
        whole = [name for name in whole if any(each.endswith(name) for each in names)]
    plain, known = type(adapter)(), (*_OURS, *_OTHERS, *_NO_SHAPES)
    others = [field.name for field in fields(adapter) if field.name not in known]
    extra = {name: getattr(adapter, name) for name in others if getattr(adapter, name) != getattr(plain, name)}
    return LoraSection(
        r=adapter.r, alpha=adapter.lora_alpha, dropout=adapter.lora_dropout, target_modules=targets,
        exclude_modules=sorted(adapter.exclude_modules or ()), modules_to_save=whole,
        use_rslora=adapter.use_rslora, use_dora=adapter.use_dora, bias=adapter.bias, extra=extra,
    )  # fmt: skip


def names_layers(section: LoraSection) -> bool:
    """Whether it may give one layer what it does not give another that is like it."""
    given: list[Any] = [section.target_modules, section.exclude_modules, section.modules_to_save]
    given += [section.extra.get(name) or () for name in ("rank_pattern", "alpha_pattern", "target_parameters")]
    names = [name for each in given for name in ([each] if isinstance(each, str) else each or ())]
    return section.extra.get("layers_to_transform") is not None or any(_NUMBER.search(name) for name in names)


def read_adapter(path: str) -> Any:
    """PEFT's configuration in a file, or in a folder's adapter_config.json.

    Raises:
        UserError: there is none, or none that can be read.
    """
    from peft import PeftConfig

    file = Path(path) / NAME if Path(path).is_dir() else Path(path)
    try:
        found = PeftConfig.from_peft_type(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"--adapter: {file} cannot be read as PEFT's {NAME}: {error or type(error).__name__}"
        ) from error
    check_adapter_config(found, "--adapter")
    return found
