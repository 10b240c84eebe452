"""A tiny comparison's rows and configuration."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path

import pytest

from tests.checkpoints import Checkpoints

from .compared import Configure, configuration, words


@pytest.fixture
def uncollected(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests left is not collected at every trial."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return words(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture
def configure(checkpoints: Checkpoints, data: str, tmp_path: Path) -> Configure:
    return partial(configuration, checkpoints["bert"], data, tmp_path / "out")
