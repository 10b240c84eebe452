"""Which checkpoints a run goes on from, and which are deleted."""

from __future__ import annotations

import json
import os
import pkgutil
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastpeft.paths import write_whole
from fastpeft.training.checkpoints import SEAL, STATE, checkpoints, delete_older, is_whole, last_checkpoint, seal
from tests.checkpoints import Checkpoints, write_rows
from tests.commands import run as command

from .runs import chats, train


def saved(folder: Path, step: int, *, sealed: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "shard").mkdir(parents=True)
    (checkpoint / STATE).write_text(json.dumps({"global_step": step}))
    (checkpoint / "optimizer.pt").write_bytes(bytes(range(256)) * 10)
    (checkpoint / "shard" / "empty").touch()
    if sealed:
        seal(checkpoint)
    return checkpoint


def test_they_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        saved(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def truncated(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").write_bytes(b"")


def flipped(checkpoint: Path) -> None:
    data = bytearray((checkpoint / "optimizer.pt").read_bytes())
    data[1234] ^= 1
    (checkpoint / "optimizer.pt").write_bytes(data)


def missing(checkpoint: Path) -> None:
    (checkpoint / "shard" / "empty").unlink()


def unsealed(checkpoint: Path) -> None:
    (checkpoint / SEAL).unlink()


def resealed(text: str) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        (checkpoint / SEAL).write_text(text)

    change.__name__ = f"seal of {text[:20]}"
    return change


@pytest.mark.parametrize(
    "change",
    [
        *(truncated, flipped, missing, unsealed),
        *map(resealed, ("", "[]", "7", '{"files": 3}', '{"files": {"a": 1}}', '{"files": {"a": [1, 2]}}')),
        resealed('{"files": {"../checkpoint-1/trainer_state.json": [18, "0"]}}'),
        resealed("[" * 100_000),
        resealed('{"files": {}}'),
    ],
    ids=lambda change: change.__name__,
)
def test_what_is_not_as_it_was_saved_is_passed_over(change: Callable[[Path], None], tmp_path: Path) -> None:
    before, newest = saved(tmp_path, 1), saved(tmp_path, 2)
    assert last_checkpoint(tmp_path) == newest
    change(newest)
    assert not is_whole(newest)
    assert last_checkpoint(tmp_path) == before


def test_files_of_others_in_a_checkpoint_do_no_harm(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, 1)
    (checkpoint / "notes.txt").write_text("mine")
    assert is_whole(checkpoint)


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(1, None, [5]), (2, None, [4, 5]), (9, None, [1, 2, 3, 4, 5]), (1, 2, [2, 5]), (2, 2, [2, 5]), (3, 2, [2, 4, 5])],
)
def test_the_newest_and_the_best_stay_whatever_the_clock_says(
    limit: int, best: int | None, left: list[int], tmp_path: Path
) -> None:
    for step in range(1, 6):
        os.utime(saved(tmp_path, step), times=(1e9 - step, 1e9 - step))  # set back before each
    named = None if best is None else str(tmp_path / f"checkpoint-{best}")
    delete_older(tmp_path, limit, named, tmp_path / "checkpoint-5")
    assert checkpoints(tmp_path) == [tmp_path / f"checkpoint-{step}" for step in left]


@pytest.mark.parametrize("limit", [1, 2])
def test_what_a_broken_save_left_behind_takes_no_whole_ones_place(limit: int, tmp_path: Path) -> None:
    """A run that died while it saved step 27 goes on from 20, and is stopped at 24."""
    steps = [saved(tmp_path, 10), saved(tmp_path, 20), saved(tmp_path, 24)]
    saved(tmp_path, 27, sealed=False)
    delete_older(tmp_path, limit, None, steps[-1])
    assert checkpoints(tmp_path) == steps[-limit:] and last_checkpoint(tmp_path) == steps[-1]


def test_a_seal_comes_after_the_names_of_all_that_it_seals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settled: list[Path] = []
    monkeypatch.setattr("fastpeft.training.checkpoints.settle", settled.append)
    monkeypatch.setattr("fastpeft.training.checkpoints.write_whole", lambda path, _: settled.append(path))
    checkpoint = saved(tmp_path, 1)
    assert set(settled[:-1]) == {tmp_path, checkpoint, checkpoint / "shard"} and settled[-1] == checkpoint / SEAL


def test_a_clock_that_is_set_back_during_a_run_costs_nothing(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer itself would delete the newest of the two."""

    def set_back(checkpoint: Path) -> None:
        seal(checkpoint)
        step = int(checkpoint.name.partition("-")[2])
        os.utime(checkpoint, times=(1e9 - step, 1e9 - step))

    monkeypatch.setattr("fastpeft.training.saving.seal", set_back)
    rows = write_rows(tmp_path / "rows.jsonl", *chats())
    settings = shlex.split("--batch-size 4 --report-to none --max-steps 4 --save-steps 1 --save-total-limit 2")
    train(tmp_path / "run", "--model", checkpoints["llama"], "--data", rows, *settings)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize(
    ("save", "message"),
    [
        ("transformers.Trainer._save_rng_state", "{run}/checkpoint-2 cannot be saved: no space"),
        ("fastpeft.training.saving.seal", "{run}/checkpoint-2 cannot be saved: no space"),
        ("fastpeft.training.saving._put_in_place", "what was trained cannot be saved: no space"),
    ],
)
def test_what_cannot_be_saved_ends_a_run_in_words_and_takes_no_space(
    save: str,
    message: str,
    checkpoints: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, _, name = save.rpartition(".")
    before = getattr(pkgutil.resolve_name(module), name)

    def full(first: Any, *others: Any) -> None:
        if "checkpoint-1" not in str((first, *others)):
            raise OSError("no space")
        before(first, *others)

    monkeypatch.setattr(save, full)
    rows, run = write_rows(tmp_path / "rows.jsonl", *chats()), tmp_path / "run"
    settings = shlex.split("--batch-size 4 --report-to none --max-steps 2 --save-steps 1")
    given = ["--output-dir", str(run), "--model", checkpoints["llama"], "--data", rows, *settings]
    answer = command(capsys, "train", "--quiet", *given)
    last = "checkpoint-2" if "trained" in message else "checkpoint-1"
    assert answer.code == 1
    assert answer.err == f"fastpeft: {message.format(run=run)}; --resume goes on from {run}/{last}\n"
    assert sorted(path.name for path in run.glob("checkpoint-*"))[-1] == last
    assert not {".unfinished", ".lock", "adapter_model.safetensors"} & {path.name for path in run.iterdir()}
    monkeypatch.undo()
    assert train(run, "--resume").record["steps"] == 2


def test_a_file_is_written_as_a_whole_or_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "file", "before")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", "after")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", "")
    (tmp_path / "other").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode
