"""Runs of the command at a tiny size, with the trained model at hand."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import yaml

from fastpeft.cli import app
from fastpeft.strategies import base
from fastpeft.training import watching
from tests.checkpoints import Checkpoints, write_rows

C = TypeVar("C", bound="Case")
SAYINGS = ["the sky is blue", "grass is green", "snow is white", "coal is black", "blood is red", "sand is brown"]


@dataclass(frozen=True)
class Run:
    """One that has ended.

    Attributes:
        folder: its output.
        model: as trained, in memory; None if none was loaded.
    """

    folder: Path
    model: Any

    @property
    def record(self) -> dict[str, Any]:
        found = json.loads((self.folder / "run.json").read_text())
        assert isinstance(found, dict)
        return found

    @property
    def config(self) -> dict[str, Any]:
        found = yaml.safe_load((self.folder / "config.yaml").read_text())
        assert isinstance(found, dict)
        return found

    @property
    def losses(self) -> list[float]:
        return [loss for _, loss in self.record["losses"]]


def train(folder: Path, *arguments: str, code: int = 0) -> Run:
    """`fastpeft train --quiet --output-dir FOLDER ARGUMENTS`, which should end with `code`."""
    made: list[Any] = []
    original = base.load_model

    def kept(*given: Any) -> Any:
        made.append(original(*given))
        return made[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(base, "load_model", kept)
        assert app.run(["train", "--quiet", "--output-dir", str(folder), *arguments]) == code
    return Run(folder, made[-1] if made else None)


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        id: of the test.
        model: name of a tiny checkpoint.
        rows: of the data.
        task: that should come of both.
        more: further arguments of the command.
    """

    id: str
    model: str
    rows: list[dict[str, Any]]
    task: str
    more: str = ""


def each_trained(cases: Sequence[C], full: Sequence[C], arguments: Sequence[str]) -> Callable[..., tuple[C, Run]]:
    """A fixture of a module: each case with the run that it is trained by, those of `full` in full tests alone."""

    @pytest.fixture(
        scope="module",
        params=[*cases, *(pytest.param(case, marks=pytest.mark.full) for case in full)],
        ids=lambda case: case.id,
    )
    def done(
        request: pytest.FixtureRequest, checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
    ) -> tuple[C, Run]:
        case: C = request.param
        folder = tmp_path_factory.mktemp(case.id)
        rows = write_rows(folder / "rows.jsonl", *case.rows)
        given = ["--model", checkpoints[case.model], "--data", rows, *arguments, *case.more.split()]
        return case, train(folder / "run", *given)

    return done


def interrupted(folder: Path, *arguments: str, at: int, by: signal.Signals = signal.SIGTERM) -> None:
    """`train`, with a signal that comes during step `at`."""
    begin = watching.Speed.on_step_begin

    def signalled(self: Any, args: Any, state: Any, control: Any, **others: Any) -> None:
        begin(self, args, state, control, **others)
        if state.global_step == at - 1:
            signal.raise_signal(by)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(watching.Speed, "on_step_begin", signalled)
        train(folder, *arguments, code=128 + by)
    assert [path.name for path in folder.glob("checkpoint-*")][-1:], "a checkpoint"


def chats(count: int = 12) -> list[dict[str, Any]]:
    """Of two turns each."""

    def chat(number: int) -> dict[str, Any]:
        words = SAYINGS[number % len(SAYINGS)].split()
        turns = [
            ("user", f"what is {words[0]} {words[1]}?"),
            ("assistant", words[-1]),
            ("user", "and?"),
            ("assistant", "no"),
        ]
        return {"messages": [{"role": role, "content": content} for role, content in turns[: 2 + number % 2 * 2]]}

    return [chat(number) for number in range(count)]


def completions(count: int = 12) -> list[dict[str, Any]]:
    halves = [SAYINGS[number % len(SAYINGS)].rpartition(" ") for number in range(count)]
    return [{"prompt": first, "completion": f" {last}"} for first, _, last in halves]


def classes(count: int = 12) -> list[dict[str, Any]]:
    return [{"text": SAYINGS[number % len(SAYINGS)], "label": "ab"[number % 2]} for number in range(count)]


def texts(count: int = 12) -> list[dict[str, Any]]:
    return [{"text": SAYINGS[number % len(SAYINGS)]} for number in range(count)]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The saved values."""
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")
