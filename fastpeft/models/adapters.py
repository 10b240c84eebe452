"""A fresh adapter on a base model."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from typing import Any, get_type_hints

from fastpeft.config import LoraSection
from fastpeft.errors import UserError
from fastpeft.hints import did_you_mean
from fastpeft.integrations.versions import told_by
from fastpeft.structured import convert

from .tasks import HEADS, PEFT_TASKS

OURS = {"r": "lora.r", "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout", "task_type": "model.task"}
PATTERNS = {"rank_pattern": dict[str, int] | None, "alpha_pattern": dict[str, float] | None}
"""Types of options of which PEFT says less."""
COMMAS = re.compile(r"[\w.]+(,\s*[\w.]+)+")
"""Names with commas between; no regular expression that could match a module is like that."""


def lora_config(section: LoraSection, task: str) -> Any:
    """PEFT's LoraConfig.

    Raises:
        UserError: a number out of range, an unknown key of `lora.extra`, or options that PEFT refuses.
    """
    from peft import LoraConfig

    if section.r < 1:
        raise UserError(f"lora.r: expected at least 1, got {section.r}")
    if not section.alpha > 0:
        raise UserError(f"lora.alpha: expected more than 0, got {section.alpha}")
    if math.isinf(section.alpha):
        raise UserError(f"lora.alpha: expected a finite number, got {section.alpha}")
    if not 0 <= section.dropout < 1:
        raise UserError(f"lora.dropout: expected 0 to below 1, got {section.dropout}")
    given = {
        "r": section.r,
        "lora_alpha": section.alpha,
        "lora_dropout": section.dropout,
        "target_modules": targets(section),
        "exclude_modules": section.exclude_modules or None,
        "modules_to_save": [*section.modules_to_save, *HEADS.get(task, ())] or None,
        "use_rslora": section.use_rslora,
        "use_dora": section.use_dora,
        "bias": section.bias,
        "init_lora_weights": section.init_lora_weights,
        "task_type": PEFT_TASKS.get(task),
    }
    if isinstance(expression := given["target_modules"], str):
        try:
            re.compile(expression)
        except re.error as error:
            raise UserError(f"lora.target_modules: not a valid regular expression: {error}") from error
    known = [field.name for field in fields(LoraConfig)]
    hints = get_type_hints(LoraConfig) | PATTERNS
    for name in section.extra:
        if name in given:
            raise UserError(f"lora.extra.{name}: expected {OURS.get(name, f'lora.{name}')} instead")
        if name not in known:
            hint = did_you_mean(name, known) or ", and PEFT's LoraConfig has none of this name"
            raise UserError(f"lora.extra.{name}: unknown key{hint}")
    try:
        for name, value in section.extra.items():
            if "tuple" not in str(hints[name]):  # which YAML has none of
                convert(hints[name], value, f"lora.extra.{name}")
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    try:
        return LoraConfig(**given, **section.extra)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"lora: {error}") from error


def targets(section: LoraSection) -> str | list[str]:
    """The modules that get an adapter: names, `a,b` for two, a regular expression, or all-linear."""
    given = section.target_modules
    if isinstance(given, str) and COMMAS.fullmatch(given):
        return [name.strip() for name in given.split(",")]
    return given


def attach_adapter(base: Any, section: LoraSection, task: str, seed: int, name: str = "default") -> Any:
    """A PEFT model with a fresh adapter of this name; the same for the same seed.

    Raises:
        UserError: as lora_config, or one of the names is of no module in the model.
    """
    import torch
    from peft import get_peft_model

    config = lora_config(section, task)
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(names := targets(section) if key == "target_modules" else getattr(section, key), list):
            _check_names(base, names, f"lora.{key}")
    torch.manual_seed(seed)
    try:
        model = get_peft_model(base, config, adapter_name=name)
        _check_head(model.get_output_embeddings())
        if config.modules_to_save is not None:  # PEFT adds a head's names once more
            config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
        return model
    except (ValueError, TypeError, AttributeError, KeyError, NotImplementedError, ImportError, re.error) as error:
        if "arget modules" not in str(error):
            raise UserError(f"lora: {told_by(error) or error}") from error
        wanted = section.target_modules
        raise UserError(f"lora.target_modules: no module has the name {wanted!r}{_hint(base, wanted)}") from error
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError" or not re.search("allocat|overflow", str(error)):
            raise
        raise UserError(f"lora.r: expected an adapter that fits into memory, got {section.r}") from error


def trains_single_rows(module: Any) -> bool:
    """Whether PEFT trains some tokens of it (`trainable_token_indices`)."""
    return type(module).__name__ == "TrainableTokensWrapper"


def _check_head(head: Any) -> None:
    """PEFT's layer for some tokens multiplies by their weight, and leaves a head's bias out without a word."""
    if trains_single_rows(head) and getattr(head.original_module, "bias", None) is not None:
        raise UserError(
            "lora.extra.trainable_token_indices: expected none for a head with a bias, which PEFT would leave out; "
            "lora.modules_to_save takes the embeddings whole"
        )


def _check_names(base: Any, names: list[str], key: str) -> None:
    """PEFT leaves out, without a word, what it does not find beside what it does."""
    for name in names:
        if not any(module == name or module.endswith(f".{name}") for module, _ in base.named_modules()):
            raise UserError(f"{key}: no module has the name {name!r}{_hint(base, name)}")


def _hint(base: Any, name: str | list[str]) -> str:
    projections = sorted({name.rpartition(".")[2] for name, module in base.named_modules() if _is_projection(module)})
    near = did_you_mean(name, projections) if isinstance(name, str) else ""
    return near or f"; the projections are {', '.join(projections)}"


def _is_projection(module: Any) -> bool:
    return getattr(module, "weight", None) is not None and hasattr(module, "in_features")
