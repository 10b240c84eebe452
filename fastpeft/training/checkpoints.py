"""A run's checkpoints: sealed when all of it is on the disk, older ones deleted after that, the newest whole one found.

The trainer writes the files of a checkpoint one by one. The seal, their sizes and hashes, comes last and in one piece:
a checkpoint without one was never finished, one that differs from its seal was damaged, and both are passed over.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import IO, Any

from fastpeft.config import TrainingSection
from fastpeft.errors import UserError
from fastpeft.paths import settle, write_whole
from fastpeft.structured import convert

SEAL = "sealed.json"
STATE = "trainer_state.json"
_PREFIX = "checkpoint-"


def checkpoint_of(folder: str | Path, step: int) -> Path:
    """Where the trainer puts the checkpoint of a step."""
    return Path(folder) / f"{_PREFIX}{step}"


def seal(checkpoint: Path) -> None:
    """Wait until every file of a checkpoint is on the disk, then write down what they hold.

    Raises:
        OSError: it cannot be written.
    """
    files, there = {}, _files(checkpoint)
    for path in there:
        with path.open("r+b") as file:
            os.fsync(file.fileno())
            files[path.relative_to(checkpoint).as_posix()] = [path.stat().st_size, _sha256(file)]
    for folder in {checkpoint.parent, *(path.parent for path in there)}:  # the names of files, and the checkpoint's own
        settle(folder)
    write_whole(checkpoint / SEAL, json.dumps({"files": files}, indent=1) + "\n")


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint holds what was sealed."""
    try:
        files = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))["files"]
        sealed = {str(name): (size, digest) for name, (size, digest) in files.items()}
        there = {path.relative_to(checkpoint).as_posix(): path for path in _files(checkpoint)}
        if STATE not in sealed or not sealed.keys() <= there.keys():
            return False
        if any(there[name].stat().st_size != size for name, (size, _) in sealed.items()):
            return False
        for name, (_, digest) in sealed.items():
            with there[name].open("rb") as file:
                if _sha256(file) != digest:
                    return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return True


def checkpoints(folder: Path) -> list[Path]:
    """Whole or not, the oldest step first."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=_step)


def delete_older(folder: Path, limit: int, best: str | None, newest: Path) -> None:
    """Delete the checkpoints of the first steps; the newest and the best stay.

    One of a later step than the newest's is what a broken save left behind before the run was resumed, and goes first.

    Args:
        folder: of the run.
        limit: how many stay, at least one.
        best: the folder of the best one, if there is one.
        newest: the one that was sealed just now.
    """
    stay = {newest.resolve()} if best is None else {newest.resolve(), Path(best).resolve()}
    others = [one for one in checkpoints(folder) if one.resolve() not in stay]
    others.sort(key=lambda one: (_step(one) < _step(newest), _step(one)))
    for one in others[: max(0, len(others) - max(0, limit - len(stay)))]:
        shutil.rmtree(one, ignore_errors=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint."""
    return next(filter(is_whole, reversed(checkpoints(folder))), None)


def state_of(checkpoint: Path) -> dict[str, Any]:
    """What the trainer wrote of itself.

    Raises:
        UserError: it is no object in JSON.
    """
    path = checkpoint / STATE
    try:
        return convert(dict[str, Any], json.loads(path.read_text(encoding="utf-8")), "state")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"--resume: {path} cannot be read: {error}") from error


def callback_state(checkpoint: Path, callback: str) -> dict[str, Any]:
    """What a callback of the trainer left in a checkpoint; errors as `state_of`."""
    found: Any = state_of(checkpoint)
    for name in ("stateful_callbacks", callback, "attributes"):
        found = found.get(name) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"--resume: {checkpoint / STATE}: expected the state of {callback}, got none")
    return found


def steps(checkpoint: Path, training: TrainingSection) -> tuple[int, int]:
    """(steps that a checkpoint has, steps that a run on its data has in all); errors as `state_of`."""
    state = state_of(checkpoint)
    try:
        done: int = convert(int, state.get("global_step"), "global_step")
        epoch: float | None = convert(float | None, state.get("epoch"), "epoch")
        if training.max_steps > 0:
            return done, training.max_steps
        an_epoch = round(done / epoch) if epoch else 1
        return done, math.ceil(training.num_train_epochs * an_epoch)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"--resume: {checkpoint / STATE}: {error}") from error


def check_steps(checkpoint: Path, training: TrainingSection) -> None:
    """Raise UserError if a run to resume has more steps than are asked for."""
    done, wanted = steps(checkpoint, training)
    if done > wanted:
        raise UserError(f"--resume: expected at least the {done} steps that {checkpoint} has, got {wanted}")


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
