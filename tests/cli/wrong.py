"""Wrong command lines of `fastpeft train`: what they find, and the one line that they should answer."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import SHIPPED, Checkpoints
from tests.commands import run


@dataclass(frozen=True)
class Wrong:
    """A command line, its files and its answer.

    Attributes:
        id: of the test.
        arguments: as typed; `llama@` is the folder of that one of tests.checkpoints, `shipped@` the shipped model.
        message: the whole of it; `CWD` is the current folder, `…` words of a library's own.
        files: by name, text or bytes.
        loads: whether it is found out only with the model loaded.
    """

    id: str
    arguments: str
    message: str
    files: dict[str, str | bytes] = field(default_factory=dict)
    loads: bool = False

    def check(
        self,
        folder: Path,
        checkpoints: Checkpoints,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """One line on stderr, nothing on stdout, exit code 2, and no file more or less or changed."""
        monkeypatch.chdir(folder)
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        if not self.loads:
            monkeypatch.setattr("fastpeft.models.bases.load_base", _not_yet)
        before = contents(folder)
        words = [_folder_of(word, checkpoints) for word in shlex.split(self.arguments)]
        answer = run(capsys, "train", *words, "--quiet")
        assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1), answer
        message = _folder_of(self.message.replace("CWD", str(folder)), checkpoints)
        begins, varies, ends = f"fastpeft: {message}\n".partition("…")
        if varies:
            assert answer.err.startswith(begins) and answer.err.endswith(ends), answer.err
        else:
            assert answer.err == begins
        assert contents(folder) == before


def _folder_of(text: str, checkpoints: Checkpoints) -> str:
    """`bert@` and the like in `text` as paths."""
    words = text.split(" ")
    for i, word in enumerate(words):
        name, mark, rest = word.partition("@")
        if mark:
            words[i] = (SHIPPED if name == "shipped" else checkpoints[name]) + rest
    return " ".join(words)


def _not_yet(*_: object, **__: object) -> None:
    raise AssertionError("the model was loaded before the mistake was found")


def contents(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def lines(*rows: Any) -> str:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def chat(*roles: str) -> dict[str, Any]:
    """A row with a message of each role."""
    return {"messages": [{"role": role, "content": "some words"} for role in roles]}


TEXTS: dict[str, str | bytes] = {"texts.jsonl": lines({"text": "some words"}, {"text": "and others"})}
CHATS: dict[str, str | bytes] = {"chats.jsonl": lines(chat("user", "assistant"), chat("system", "user", "assistant"))}
PAIRS: dict[str, str | bytes] = {"pairs.jsonl": lines({"prompt": "one", "completion": "two"})}
CLASSES: dict[str, str | bytes] = {"classes.jsonl": lines({"text": "a", "label": "x"}, {"text": "b", "label": "y"})}


def option(id: str, more: str, message: str, *, loads: bool = False, **files: str | bytes) -> Wrong:
    """All is good but for one option. Of a file's name, `__` is the dot."""
    named = {name.replace("__", "."): content for name, content in files.items()}
    return Wrong(id, f"--model shipped@ --data texts.jsonl {more}", message, TEXTS | named, loads)


def data(id: str, name: str, content: str | bytes, message: str, more: str = "") -> Wrong:
    """A file of data that is wrong."""
    return Wrong(id, f"--model shipped@ --data {name} {more}", message, {name: content})


def rows(id: str, first: Any, second: Any, message: str, more: str = "") -> Wrong:
    """Two rows, of which something is wrong."""
    return data(id, "some.jsonl", lines(first, second), message, more)


def fit(id: str, model: str, files: dict[str, str | bytes], message: str, more: str = "") -> Wrong:
    """A model and data that do not go together."""
    return Wrong(id, f"--model {model}@ --data {next(iter(files))} {more}", message, files)
