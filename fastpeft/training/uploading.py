"""A run's adapter on the hub, without what is this machine's."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from fastpeft.config import FastpeftConfig
from fastpeft.errors import RunFailed

from .folder import CONFIG, LOSS, REPORT

FILES = ("adapter_model.safetensors", LOSS, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TEXTS = ("adapter_config.json", "README.md", REPORT)
"""Files that may name the base, which is a path of this machine where it was a folder."""


def upload(folder: Path, config: FastpeftConfig) -> str:
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
        published(folder, config, Path(made))
        try:
            api = HfApi()
            repository = str(api.create_repo(name, private=private, exist_ok=True).repo_id)
            api.upload_folder(repo_id=repository, folder_path=Path(made))
        except Exception as error:  # the HTTP library's own; which one that is has changed
            line = " ".join(str(error).split())[:300]
            raise RunFailed(f"training.push_to_hub: {line}; the adapter is in {folder} all the same") from error
    return repository


def published(folder: Path, config: FastpeftConfig, target: Path) -> None:
    """Copy what is to be seen by others, with names in place of local paths."""
    for name in FILES:
        if (folder / name).is_file():
            shutil.copy(folder / name, target / name)
    base = config.model.name
    known = Path(base).name if Path(base).is_absolute() else base
    for name in TEXTS:
        if (folder / name).is_file():
            text = (folder / name).read_text(encoding="utf-8").replace(json.dumps(base)[1:-1], known)
            if name == "README.md" and known != base:  # the hub takes IDs of its own only
                text = "\n".join(line for line in text.splitlines() if "base_model" not in line) + "\n"
            (target / name).write_text(text, encoding="utf-8")
    shared = replace(
        config,
        model=replace(config.model, name=known),
        data=replace(config.data, path=_name(config.data.path) or "", eval_path=_name(config.data.eval_path)),
        training=replace(config.training, output_dir=folder.resolve().name, extra={}),
    )
    (target / CONFIG).write_text(shared.to_yaml(), encoding="utf-8")


def _name(path: str | None) -> str | None:
    return Path(path).name if path and Path(path).is_absolute() else path
