"""A fine-tuned model for use: an adapter's folder with its base, or a whole model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpeft.config import FastpeftConfig, ModelSection
from fastpeft.errors import UserError

from . import bases
from .tasks import PEFT_TASKS, task_of

if TYPE_CHECKING:
    import torch

TOKENIZER = "tokenizer_config.json"


@dataclass(frozen=True)
class Source:
    """What a name stands for, found out without loading weights.

    Attributes:
        name: as the user gave it.
        model: the base's section, with quantisation as the adapter was trained on.
        adapter: folder or hub ID of the adapter; None for a whole model.
        task: what it does.
        labels: of a classifier that `fastpeft train` made; None where they are not known.
        config: transformers', of the base.
    """

    name: str
    model: ModelSection
    adapter: str | None
    task: str
    labels: list[str] | None
    config: Any

    @property
    def tokenizer_from(self) -> str:
        """The adapter's folder where it holds one: it may have a chat template of its own."""
        own = self.adapter is not None and (Path(self.adapter) / TOKENIZER).is_file()
        return str(self.adapter) if own else self.model.name


def find(name: str, *, base: str | None = None, key: str = "MODEL") -> Source:
    """What `name` stands for.

    Args:
        name: an adapter's folder or hub ID, or a whole model's.
        base: another base for an adapter than the one that its configuration names.
        key: what the user calls it.

    Raises:
        UserError: neither an adapter nor a model, or the base cannot be had.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and not any((folder / mark).is_file() for mark in ("adapter_config.json", "config.json")):
        raise UserError(f"{key}: expected a folder with adapter_config.json or config.json, got {name}{_runs(folder)}")
    adapter = _adapter_config(name, folder, key)
    run = _run_of(folder)
    if adapter is None:
        if base is not None:
            raise UserError(f"--base: expected none, because {name} is a whole model, got {base}")
        model = ModelSection(name=bases.checked_name(name, key))
        config = bases.load_config(model, key)
        return Source(name, model, None, task_of(config), _labels(config), config)
    model = run.model if run else ModelSection(name=adapter.base_model_name_or_path or "", revision=adapter.revision)
    if base is not None:
        model = replace(model, name=base, revision=None)
    base_key = "--base" if base is not None else f"{key}: base model of {name}"
    model = replace(model, name=bases.checked_name(model.name, base_key), quantization=model.quantization or "none")
    config = bases.load_config(model, base_key)
    named = {peft: task for task, peft in PEFT_TASKS.items()}
    task = run.model.task if run else named.get(adapter.task_type) or task_of(config)
    labels = run.data.labels if run else None
    path = str(folder.resolve()) if folder.is_dir() else name
    return Source(name, model, path, task, labels if task == "sequence-classification" else None, config)


def load(source: Source, device: torch.device, dtype: torch.dtype, quantization: str | None = None) -> Any:
    """The model, in evaluation mode; an adapter's layers accelerated.

    Args:
        quantization: storage of the base's weights; as the adapter was trained on when None.

    Raises:
        UserError: base or adapter cannot be loaded, or do not belong together.
    """
    import fastpeft

    base = load_base(source, device, dtype, quantization)
    if source.adapter is None:
        return base.eval()
    model = attach(source, base)
    fastpeft.accelerate(model)
    return model


def load_base(source: Source, device: torch.device, dtype: torch.dtype, quantization: str | None = None) -> Any:
    """The base alone; errors as `load`."""
    kept = source.model.quantization or "none"
    others: dict[str, Any] = {}
    if source.labels is not None:
        others = {"num_labels": len(source.labels), "id2label": dict(enumerate(source.labels))}
    base, _ = bases.load_base(source.model, source.task, device, dtype, quantization or kept, key="MODEL", **others)
    return base


def attach(source: Source, base: Any) -> Any:
    """The adapter on its base, in evaluation mode; errors as `load`."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(base, source.adapter).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = next((line.strip() for line in str(error).splitlines()[1:] if "size mismatch" in line), str(error))
        raise UserError(f"MODEL: {source.name} does not fit {source.model.name}: {reason.splitlines()[0]}") from error


def load_tokenizer(source: Source) -> Any:
    """The tokenizer; errors as `load`."""
    return bases.load_tokenizer(replace(source.model, name=source.tokenizer_from), "MODEL")


def _adapter_config(name: str, folder: Path, key: str) -> Any:
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        return None
    if not folder.is_dir() and not bases.HUB_ID.fullmatch(name):
        bases.checked_name(name, key)  # says what is wrong
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(str(folder) if folder.is_dir() else name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if folder.is_dir():
            raise UserError(f"{key}: {name}/adapter_config.json cannot be read: {error}") from error
        return None  # an ID of something else, or out of reach: what follows says so


def _run_of(folder: Path) -> FastpeftConfig | None:
    """The configuration of the run that made an adapter, beside it or, for a checkpoint, above it."""
    for place in (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,):
        try:
            return FastpeftConfig.from_yaml(place / "config.yaml")
        except (OSError, ValueError, TypeError):
            continue
    return None


def _labels(config: Any) -> list[str] | None:
    names: dict[int, str] | None = getattr(config, "id2label", None)
    return [names[number] for number in sorted(names)] if names else None


def _runs(folder: Path) -> str:
    found = sorted(path.name for path in folder.glob("checkpoint-*"))
    return f"; an unfinished run has {folder / found[-1]}" if found else ""
