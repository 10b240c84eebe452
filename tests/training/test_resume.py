"""A run that was broken off and resumed is the same as one that was not: losses, evaluation, adapter."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpeft.cli import app
from tests.checkpoints import SHIPPED, Checkpoints, write_rows
from tests.commands import run as command
from tests.processes import Forked

from .runs import Run, adapter, chats, classes, completions, interrupted, texts, train

LOGGED = shlex.split("--learning-rate 1e-2 --logging-steps 1 --lora.r 4 --lora.dropout 0.2 --report-to none")
"""Nine steps, three an epoch: nine rows in batches of two, two batches a step."""
THREE_EPOCHS = [*LOGGED, *shlex.split("--batch-size 2 --gradient-accumulation-steps 2 --epochs 3 --eval-fraction 0.25")]


def assert_same(found: Run, wanted: Run) -> None:
    assert found.record["losses"] == wanted.record["losses"]
    assert found.record["evaluation"] == wanted.record["evaluation"]
    assert found.record["metrics"] == wanted.record["metrics"]
    ours, theirs = adapter(found.folder), adapter(wanted.folder)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@dataclass(frozen=True)
class Case:
    """What is trained, and at which steps it is broken off."""

    id: str
    model: str
    rows: list[dict[str, Any]]
    more: str
    at: tuple[int, ...]


CASES = [
    Case("saved-rarely", "llama", chats(), "--save-steps 100", (3,)),
    Case("masked", "bert", texts(), "--save-steps 100", (4,)),
]
MORE_CASES = [
    Case("chats", "llama", chats(), "", (4,)),
    Case("chats-elsewhere", "llama", chats(), "", (1, 3, 8)),
    Case("saved-by-steps", "llama", chats(), "--save-steps 2 --eval-steps 2", (4, 6)),
    Case("saved-rarely-elsewhere", "llama", chats(), "--save-steps 100", (5, 6)),
    Case("masked-elsewhere", "bert", texts(), "--save-steps 100", (3, 5)),
    Case("workers", "bert", texts(), "--save-steps 100 --training.extra.dataloader_num_workers 1", (4,)),
    Case("classes", "bert", classes(), "", (5,)),
    Case("t5", "t5", completions(), "", (4,)),
    Case("packing", "llama", chats(40), "--packing --max-length 64", (2,)),
    Case("qlora", "llama", chats(), "--method qlora", (4,)),
    Case("bfloat16", "llama", chats(), "--dtype bfloat16", (4,)),
]


@pytest.fixture(
    scope="module",
    params=[*CASES, *(pytest.param(case, marks=pytest.mark.full) for case in MORE_CASES)],
    ids=lambda case: case.id,
)
def whole(
    request: pytest.FixtureRequest, checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Case, list[str], Run]:
    """A run without a break, and its command line."""
    case: Case = request.param
    folder = tmp_path_factory.mktemp(case.id)
    rows = write_rows(folder / "rows.jsonl", *case.rows)
    arguments = ["--model", checkpoints[case.model], "--data", rows, *THREE_EPOCHS, *case.more.split()]
    return case, arguments, train(folder / "run", *arguments)


def test_it_ends_as_one_without_a_break(whole: tuple[Case, list[str], Run], tmp_path: Path) -> None:
    case, arguments, wanted = whole
    for number, at in enumerate(case.at):
        folder = tmp_path / str(at)
        interrupted(folder, *arguments, at=at, by=(signal.SIGTERM, signal.SIGINT)[number % 2])
        assert (folder / f"checkpoint-{at}" / "trainer_state.json").is_file()
        assert not (folder / "run.json").exists() and not (folder / "adapter_model.safetensors").exists()
        assert_same(train(folder, "--resume"), wanted)


class TestOneRun:
    """Of nine steps, with checkpoints after each epoch, all kept."""

    @pytest.fixture(scope="class")
    @classmethod
    def arguments(cls, checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
        rows = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", *chats())
        return ["--model", checkpoints["llama"], "--data", rows, *THREE_EPOCHS, "--save-total-limit", "null"]

    @pytest.fixture(scope="class")
    @classmethod
    def finished(cls, arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
        return train(tmp_path_factory.mktemp("finished") / "run", *arguments)

    @pytest.fixture
    def copy(self, finished: Run, tmp_path: Path) -> Path:
        """Of the finished run, without what is written at its end."""
        shutil.copytree(finished.folder, tmp_path / "copy")
        for name in ("run.json", "adapter_model.safetensors"):
            (tmp_path / "copy" / name).unlink()
        return tmp_path / "copy"

    def test_checkpoints_that_were_not_written_to_their_end_are_passed_over(
        self, copy: Path, finished: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (copy / "checkpoint-9" / "trainer_state.json").unlink()
        (copy / "checkpoint-6" / "trainer_state.json").write_text('{"epoch": 2.0, "global_')
        begun: list[int] = []
        monkeypatch.setattr(
            "fastpeft.training.watching.Speed.on_step_begin",
            lambda self, args, state, control, **_: begun.append(state.global_step),
        )
        assert_same(train(copy, "--resume"), finished)
        assert begun == [3, 4, 5, 6, 7, 8]

    def test_a_finished_run_stays_as_it_is(self, copy: Path, finished: Run) -> None:
        resumed = train(copy, "--resume")
        assert_same(resumed, finished)
        assert resumed.record["tokens_per_second"] is None

    @pytest.mark.parametrize("ended", [pytest.param(False, marks=pytest.mark.full), True], ids=["killed", "ended"])
    def test_all_steps_done_within_an_epoch(
        self, ended: bool, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The trainer would take one more."""
        folder = tmp_path / "run"
        whole = train(folder, *arguments, "--max-steps", "4", "--save-steps", "4")
        wanted = Run(tmp_path / "wanted", None)
        shutil.copytree(folder, wanted.folder)
        if not ended:
            (folder / "run.json").unlink()
            (folder / "adapter_model.safetensors").unlink()
        answer = command(capsys, "train", "--resume", "--output-dir", str(folder))
        assert answer.code == 0, answer.err
        assert "note: the run has all of its 4 steps, so none is trained" in answer.err
        assert whole.record["steps"] == 4
        assert_same(Run(folder, None), wanted)
        answer = command(capsys, "train", "--resume", "--output-dir", str(folder), "--max-steps", "3")
        assert answer.code != 0 and "--resume: expected at least the 4 steps that" in answer.err
        assert train(folder, "--resume", "--max-steps", "5").record["steps"] == 5

    def test_a_finished_run_goes_on_with_more_epochs(self, copy: Path, finished: Run) -> None:
        resumed = train(copy, "--resume", "--epochs", "4")
        assert resumed.record["steps"] == 12 and resumed.losses[:9] == finished.losses
        assert resumed.config["training"]["num_train_epochs"] == 4

    def test_resumed_from_another_folder(
        self, arguments: list[str], finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        interrupted(Path("run"), *arguments, at=5)
        (tmp_path / "other").mkdir()
        monkeypatch.chdir("other")
        assert_same(train(tmp_path / "run", "--resume"), finished)

    @pytest.mark.parametrize(
        ("settings", "from_step"),
        [
            ("--save-steps 3", 3),
            pytest.param("--save-steps 3 --eval-steps 3", 3, marks=pytest.mark.full),
            ("--save-steps 2 --eval-steps 4", 4),
        ],
        ids=["last-of-an-epoch", "both-by-steps", "elsewhere"],
    )
    def test_checkpoints_by_steps_hold_their_evaluation(
        self, settings: str, from_step: int, arguments: list[str], tmp_path: Path
    ) -> None:
        """As a machine that loses its power leaves them."""
        wanted = train(tmp_path / "whole", *arguments, *settings.split())
        shutil.copytree(wanted.folder, tmp_path / "cut")
        for path in (tmp_path / "cut").glob("checkpoint-*"):
            if int(path.name.partition("-")[2]) > from_step:
                shutil.rmtree(path)
        (tmp_path / "cut" / "run.json").unlink()
        (tmp_path / "cut" / "adapter_model.safetensors").unlink()
        resumed = train(tmp_path / "cut", "--resume")
        assert from_step in [step for step, _ in wanted.record["evaluation"]]
        assert_same(resumed, wanted)

    @pytest.mark.full
    def test_broken_off_twice(self, arguments: list[str], finished: Run, tmp_path: Path) -> None:
        interrupted(tmp_path / "run", *arguments, at=2)
        interrupted(tmp_path / "run", "--resume", at=7)
        assert_same(train(tmp_path / "run", "--resume"), finished)

    def test_a_second_ctrl_c_does_not_wait(
        self, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def twice(*_: object, **__: object) -> None:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)

        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        monkeypatch.setattr("fastpeft.training.watching.Speed.on_step_begin", twice)
        answer = command(capsys, "train", "--quiet", "--output-dir", str(tmp_path / "run"), *arguments)
        assert (answer.code, answer.err) == (130, "fastpeft: interrupted\n")
        assert not list((tmp_path / "run").glob("checkpoint-*"))
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("by", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
def test_a_process_of_its_own(by: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    rows = write_rows(tmp_path / "rows.jsonl", *chats(24))
    arguments = [
        "--model",
        SHIPPED,
        "--data",
        rows,
        *LOGGED,
        "--batch-size",
        "2",
        "--output-dir",
        str(tmp_path / "run"),
    ]
    process = Forked(lambda: app.run(["train", *arguments]))
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith("training: step 3/12"):
            os.kill(process.pid, by)
            break
    out, more = process.stdout.read(), process.stderr.read()
    [checkpoint] = (tmp_path / "run").glob("checkpoint-*")
    assert 3 <= int(checkpoint.name.partition("-")[2]) < 12
    assert more.splitlines()[-1] == f"fastpeft: {by.name}: {checkpoint} was saved; --resume goes on from it", seen
    assert (process.wait(), out) == (128 + by, "")
    assert "\x1b" not in "".join(seen) + more  # no colours where there is no terminal
    resumed = train(tmp_path / "run", "--resume")
    assert_same(resumed, train(tmp_path / "whole", "--model", SHIPPED, "--data", rows, *LOGGED, "--batch-size", "2"))
