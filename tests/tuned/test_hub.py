"""Adapters on the hub: a hub in a folder stands for it, and none at all."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpeft import hub
from fastpeft.cli import app
from fastpeft.errors import UserError
from fastpeft.models import bases, tuned

from .conftest import SHIPPED

ID = "some/adapter"


@pytest.fixture
def adapter(chat_run: Path, tmp_path: Path) -> Path:
    """What the hub has of a run."""
    folder = tmp_path / "on-the-hub"
    folder.mkdir()
    for path in chat_run.iterdir():
        if path.is_file() and path.name not in ("run.json", "data.sha256"):
            shutil.copy(path, folder)
    return folder


@pytest.fixture
def asked(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """A hub that answers: (file, whether only what is here already will do) of each question."""
    questions: list[tuple[str, bool]] = []

    def download(name: str, file: str, *, local_files_only: bool) -> str:
        questions.append((file, local_files_only))
        if name != ID or not (adapter / file).is_file():
            raise FileNotFoundError(f"404 {name}/{file}")
        return str(adapter / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(tuned, "unreachable", lambda: None)
    return questions


def test_an_adapter_is_found_with_its_run_and_its_tokenizer(asked: list[tuple[str, bool]], adapter: Path) -> None:
    source = tuned.find(ID)
    assert (source.adapter, source.tokenizer_from, source.model.name) == (ID, ID, str(SHIPPED))
    assert source.chats and source.max_length == 64
    model = tuned.load(source, torch.device("cpu"), torch.float32)
    here = tuned.load(tuned.find(str(adapter)), torch.device("cpu"), torch.float32)
    ids = torch.arange(20)[None] + 5
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, here(input_ids=ids).logits)
    assert not any(only_here for _, only_here in asked)


def test_what_an_adapter_does_not_bring_is_the_base_s(asked: list[tuple[str, bool]], adapter: Path) -> None:
    for name in ("config.yaml", "tokenizer_config.json"):
        (adapter / name).unlink()
    source = tuned.find(ID)
    assert (source.chats, source.max_length, source.tokenizer_from) == (None, None, str(SHIPPED))


def test_an_adapter_without_weights_is_told(asked: list[tuple[str, bool]], adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    source = tuned.find(ID)
    with pytest.raises(UserError, match=f"MODEL: {ID} has no adapter_model.safetensors here, and none on the hub"):
        tuned.load(source, torch.device("cpu"), torch.float32)


def test_an_adapter_s_tokenizer_is_not_asked_for_at_the_base_s_revision(
    asked: list[tuple[str, bool]], adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[tuple[str, Any]] = []
    monkeypatch.setattr(bases, "load_tokenizer", lambda model, key, **_: wanted.append((model.name, model.revision)))
    found = tuned.find(ID)
    source = replace(found, model=replace(found.model, name="some/base", revision="abc"))
    tuned.load_tokenizer(source)
    (adapter / "tokenizer_config.json").unlink()
    tuned.load_tokenizer(source)
    assert wanted == [(ID, None), ("some/base", "abc")]


class TestWithoutANetwork:
    @pytest.fixture(autouse=True)
    def unreachable(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        hub._ask.cache_clear()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    @pytest.mark.parametrize("words", [["generate", ID, "-p", "x"], ["merge", ID, "out"], ["verify", ID]])
    def test_what_is_not_here_is_not_waited_for(self, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        start = time.monotonic()
        assert app.run([*words, "--quiet"]) == 2
        assert time.monotonic() - start < 5
        shown = capsys.readouterr().err
        assert f": {ID} is no local folder, and http://127.0.0.1:9 cannot be reached: " in shown
        assert shown.count("\n") == 1

    def test_what_was_fetched_earlier_will_do(
        self, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        there = tmp_path / "cache/models--some--adapter"
        shutil.copytree(adapter, there / "snapshots/abc")
        (there / "refs").mkdir()
        (there / "refs/main").write_text("abc")
        start = time.monotonic()
        assert app.run(["generate", ID, "-p", "Say yes.", "--max-new-tokens", "8", "--quiet"]) == 0
        assert time.monotonic() - start < 20
        assert capsys.readouterr().out == "yes yes yes\n"
