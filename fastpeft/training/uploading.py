"""A run's adapter on the hub, without what is this machine's."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastpeft.config import FastpeftConfig
from fastpeft.errors import RunFailed
from fastpeft.models.tuned import TOKENIZER

from .folder import CONFIG, LOSS, REPORT

FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md", REPORT, LOSS)


def upload(folder: Path, config: FastpeftConfig, tokenizer: Any) -> str:
    """Make the repository if need be, and upload; not the trainer's own upload, which writes another model card.

    Returns:
        The repository's ID.

    Raises:
        RunFailed: the hub refuses, or cannot be reached; the adapter lies in the folder all the same.
    """
    from huggingface_hub import HfApi

    private = config.training.extra.get("hub_private_repo")
    name = config.training.hub_model_id or folder.resolve().name
    with tempfile.TemporaryDirectory() as made:
        published(folder, config, tokenizer, Path(made))
        try:
            api = HfApi()
            repository = str(api.create_repo(name, private=private, exist_ok=True).repo_id)
            api.upload_folder(repo_id=repository, folder_path=Path(made))
        except Exception as error:  # the HTTP library's own; which one that is has changed
            line = " ".join(str(error).split())[:300]
            raise RunFailed(f"training.push_to_hub: {line}; the adapter is in {folder} all the same") from error
    return repository


def published(folder: Path, config: FastpeftConfig, tokenizer: Any, target: Path) -> None:
    """Write what is to be seen by others, with names in place of local paths.

    Args:
        folder: of the finished run.
        config: as resolved, so local paths in it begin at the root.
        tokenizer: of the model; which files make one is its own affair.
        target: an empty folder.
    """
    tokenizer.save_pretrained(target)
    for name in FILES:
        if (folder / name).is_file():
            shutil.copy(folder / name, target / name)
    base = config.model.name
    shared = replace(
        config,
        training=replace(config.training, output_dir=folder.resolve().name, extra={}),
        strategy=replace(config.strategy, options={}),
    )
    (target / CONFIG).write_text(FastpeftConfig.from_dict(_named(shared.to_dict())).to_yaml(), encoding="utf-8")
    for name in ("README.md", REPORT, "adapter_config.json", TOKENIZER):
        if (target / name).is_file():
            text = _without_paths((target / name).read_text(encoding="utf-8"), config, quoted=name.endswith(".json"))
            if name == "README.md" and base != _named(base):  # the hub takes IDs of its own only
                text = "\n".join(line for line in text.splitlines() if "base_model" not in line) + "\n"
            (target / name).write_text(text, encoding="utf-8")


def _named(value: Any) -> Any:
    """A configuration's values with names in place of paths."""
    if isinstance(value, dict):
        return {_named(key): _named(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_named(below) for below in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _without_paths(text: str, config: FastpeftConfig, *, quoted: bool) -> str:
    """A file's text with names in place of the configuration's paths; in JSON, of strings that are nothing else."""
    for path in sorted(_strings(config.to_dict()), key=len, reverse=True):
        if _named(path) != path:
            ours, theirs = (json.dumps(path), json.dumps(_named(path))) if quoted else (path, _named(path))
            text = text.replace(ours, theirs)
    return text


def _strings(value: Any) -> set[str]:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return set().union(*map(_strings, value))
    return {value} if isinstance(value, str) else set()
