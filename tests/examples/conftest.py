"""Models for examples and notebooks, built once a process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .tiny import build


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model's folder, by its kind."""
    folder, made = tmp_path_factory.mktemp("models"), dict[str, Path]()

    def one(kind: str) -> Path:
        if kind not in made:
            made[kind] = build(kind, folder / kind)
        return made[kind]

    return one
