"""A loss that is no number ends a run, and nothing of what came of it is kept or gone on from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import Checkpoints, write_rows
from tests.commands import run as command

from .runs import adapter, chats, train


@pytest.fixture(scope="module")
def settings(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    rows = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", *chats())
    return ["--model", checkpoints["llama"], "--data", rows, "--batch-size", "4", "--report-to", "none"]


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("when", "found"),
    [
        ("--logging-steps 1 --save-steps 4", "no adapter was saved: the gradients of step 2 are no numbers"),
        ("--logging-steps 100 --save-steps 1", "no adapter was saved: the gradients of step 2 are no numbers"),
    ],
)
def test_no_checkpoint_is_saved_of_it(
    when: str, found: str, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = f"--lr 1e30 --max-grad-norm 0 --max-steps 8 --save-total-limit null {when}".split()
    answer = command(capsys, "train", "--quiet", "--output-dir", str(tmp_path / "run"), *settings, *more)
    assert answer.code == 1 and answer.err.startswith(f"fastpeft: {found}")
    saved = steps(tmp_path / "run")
    assert len(saved) < 8
    for step in saved:
        assert all(value.isfinite().all() for value in adapter(tmp_path / "run" / f"checkpoint-{step}").values())


def test_an_epochs_end_saves_none_either(settings: list[str], tmp_path: Path) -> None:
    train(tmp_path / "run", *settings, "--lr", "1e30", "--max-grad-norm", "0", "--epochs", "3", code=1)
    assert len(steps(tmp_path / "run")) < 2
