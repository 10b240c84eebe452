"""When and how checkpoints and the finished adapter are saved, so that no moment is without a whole one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from fastpeft.errors import RunFailed, UserError
from fastpeft.paths import settle

from .checkpoints import SEAL, checkpoint_of, delete_older, last_checkpoint, seal
from .folder import UNFINISHED


class SaveAfterEvaluation(TrainerCallback):
    """Puts off a checkpoint of the step before an epoch's evaluation until that is done.

    A run resumed from one saved before would do without the evaluation and the random numbers that it draws.
    """

    def __init__(self) -> None:
        self._waits = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save and args.eval_strategy == IntervalStrategy.EPOCH:
            self._waits = at_epoch_end(state) or state.global_step >= state.max_steps
            control.should_save = not self._waits

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = control.should_save or self._waits
        self._waits = False


class Seal(TrainerCallback):
    """Seals each checkpoint that a trainer saves, and only then deletes what is older.

    It must come after callbacks that add files to a checkpoint. The trainer itself must delete none: it goes by the
    files' times, so that with a clock that was set back the newest would go, and by what may not be on the disk yet.

    Args:
        limit: how many checkpoints stay, the best beside the newest; None for all.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.world_size > 1:
            from torch import distributed

            distributed.barrier()  # each process writes its random state
        checkpoint = checkpoint_of(args.output_dir, state.global_step)
        if not args.should_save or not checkpoint.is_dir():
            return
        seal(checkpoint)
        if self._limit is not None:
            delete_older(Path(args.output_dir), self._limit, state.best_model_checkpoint, checkpoint)


def at_epoch_end(state: Any) -> bool:
    """Whether the step was the last of its epoch."""
    return bool(abs(state.epoch - round(state.epoch)) < 1e-6)


@contextmanager
def half_checkpoints_deleted(trainer: Any, folder: Path) -> Iterator[None]:
    """Where a checkpoint cannot be saved, as on a full disk, what there is of it is deleted: its space is wanted.

    Raises:
        RunFailed: in place of the error; the message says what to go on from.
    """
    try:
        yield
    except (RunFailed, UserError):
        raise
    except Exception as error:
        half = checkpoint_of(folder, trainer.state.global_step)
        if not trainer.args.should_save or not half.is_dir() or (half / SEAL).exists():
            raise
        message = f"{half} cannot be saved: {_line(error, folder)}"
        shutil.rmtree(half, ignore_errors=True)
        raise RunFailed(f"{message}; {_further(folder)}") from error


def save_finished(trainer: Any, folder: Path) -> None:
    """Save what was trained beside its place, then put each file there in one piece.

    Raises:
        RunFailed: it cannot be written.
    """
    beside = folder / UNFINISHED
    if trainer.is_world_process_zero():
        shutil.rmtree(beside, ignore_errors=True)
    try:
        trainer.save_model(str(beside))
        if trainer.is_world_process_zero():
            _put_in_place(beside, folder)
    except Exception as error:
        message = f"what was trained cannot be saved: {_line(error, folder)}"
        shutil.rmtree(beside, ignore_errors=True)
        raise RunFailed(f"{message}; {_further(folder)}") from error


def _put_in_place(beside: Path, folder: Path) -> None:
    for path in sorted(beside.rglob("*")):
        target = folder / path.relative_to(beside)
        if path.is_dir():
            target.mkdir(exist_ok=True)
            continue
        with path.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(path, target)
        settle(target.parent)
    shutil.rmtree(beside)


def _line(error: Exception, folder: Path) -> str:
    """Of libraries that do not say why they could not write, too."""
    said = " ".join(str(error).split())[:300] or type(error).__name__
    free = shutil.disk_usage(folder).free
    return f"the disk is full: {said}" if free < 2**20 else said


def _further(folder: Path) -> str:
    last = last_checkpoint(folder)
    return "no checkpoint was saved before" if last is None else f"--resume goes on from {last}"
