"""With everything on disk, no command opens a connection or looks a name up."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.checkpoints import SHIPPED, write_rows
from tests.commands import run
from tests.fresh import run_fresh

CODE = """
import os, socket

def none(*given, **named):
    print("asked", given, flush=True)
    os._exit(3)  # in whatever thread, and whoever expects an error

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = none
from fastpeft.cli import app
for arguments in %r:
    assert app.run(arguments) == 0, arguments
print("done")
"""


@pytest.mark.full
def test_plan_train_verify_generate_merge(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", *({"text": f"some words {number}"} for number in range(8)))
    run = str(tmp_path / "run")
    commands = [
        ["plan", SHIPPED, "--gpu-memory", "24GiB", "--seq", "64", "--no-largest"],
        ["train", "--model", SHIPPED, "--data", rows, "--max-steps", "1", "--output-dir", run, "--quiet"],
        ["verify", run, "--quiet"],
        ["generate", run, "--prompt", "hi", "--max-new-tokens", "1", "--quiet"],
        ["merge", run, str(tmp_path / "merged"), "--quiet"],
    ]
    assert run_fresh(CODE % commands).endswith("done\n")


def test_train(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda _, *given: asked.append(given))
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, lambda *given, **_: asked.append(given) or [])
    rows = write_rows(tmp_path / "rows.jsonl", *({"text": f"some words {number}"} for number in range(8)))
    train = ("train", "--model", SHIPPED, "--data", rows, "--max-steps", "1", "--quiet")
    assert run(capsys, *train, "--output-dir", str(tmp_path / "run")).code == 0 and asked == []
