"""Files that mean harm, made of good ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import SHIPPED


class Payload:
    """Leaves a file behind where it is unpickled by anything that runs what it reads."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.mark, "run"))


def changed(file: Path, **values: Any) -> None:
    """Other values in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def model(folder: Path, **values: Any) -> Path:
    """A model that is whole but for these values of its config.json."""
    shutil.copytree(SHIPPED, folder)
    changed(folder / "config.json", **values)
    return folder


def adapter(folder: Path, made: Path, **values: Any) -> Path:
    """An adapter that is whole but for these values of its adapter_config.json."""
    shutil.copytree(made, folder)
    changed(folder / "adapter_config.json", **values)
    return folder


def lora(folder: Path) -> Path:
    """A good adapter of rank 4 for the shipped model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(SHIPPED)
    get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(folder)
    return folder
