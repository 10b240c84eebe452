"""A model's config.json, as `fastpeft plan` reads it: no weights, and a model that takes no memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from hypothesis import strategies as st

from benchmarks.fuzz.making import as_json
from benchmarks.fuzz.targets.rows import MODEL
from benchmarks.fuzz.watching import Target
from fastpeft.config import LoraSection, ModelSection
from fastpeft.errors import UserError
from fastpeft.memory.trace.skeleton import build
from fastpeft.models import bases
from fastpeft.models.tasks import task_of

CONFIG = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
LAYERS = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "head_dim": 4}


def read(path: Path) -> None:
    folder = path.parent / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(path.read_bytes())
    config = bases.load_config(ModelSection(name=str(folder)), "MODEL")
    build(config, task_of(config), torch.float32, False, LoraSection())


TARGETS = (
    Target("models' configurations", "config.json", as_json(st.just(CONFIG | LAYERS)), read, (UserError,), "MODEL"),
)
