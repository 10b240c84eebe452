"""The files of a checkpoint that the trainer reads back, looked at before it does: a folder may come from anybody."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from fastpeft.errors import UserError
from fastpeft.structured import convert

from .checkpoints import STATE, state_of

READ = ("*.pt", "*.pth")
"""What torch reads, with `weights_only`: optimizer, schedule, random states. `training_args.bin` is never read."""
PICKLES = ("adapter_model.bin", "pytorch_model*.bin")
_KINDS: dict[str, Any] = {
    "epoch": float | None,
    "global_step": int,
    "max_steps": int,
    "num_train_epochs": float,
    "logging_steps": float,
    "eval_steps": float,
    "save_steps": float,
    "train_batch_size": int | None,
    "best_model_checkpoint": str | None,
    "stateful_callbacks": dict[str, Any],
    "log_history": list[dict[str, Any]],
}
_POSITIVE = ("max_steps", "num_train_epochs", "logging_steps", "eval_steps", "save_steps", "train_batch_size")
_FIGURES: dict[str, Any] = {"step": int, "loss": float, "eval_loss": float}


def check_trainer_state(checkpoint: Path) -> None:
    """Look at a checkpoint that a run is to go on from.

    Raises:
        UserError: weights in a pickle, a file of torch that is compressed or holds more than its own size, or a state
            of the trainer that is none, or names a best checkpoint that lies elsewhere.
    """
    for pattern in PICKLES:
        if found := next(checkpoint.rglob(pattern), None):
            raise UserError(f"--resume: expected weights in safetensors, got {found}; pickles are never read")
    for path in (path for pattern in READ for path in sorted(checkpoint.rglob(pattern))):
        try:
            with zipfile.ZipFile(path) as file:
                members = file.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
            raise UserError(f"--resume: {path} cannot be read: expected a file as torch.save writes it") from None
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if packed or sum(member.file_size for member in members) > path.stat().st_size:
            raise UserError(f"--resume: {path} cannot be read: expected nothing compressed, as torch.save writes it")
    _check_values(checkpoint)


def _check_values(checkpoint: Path) -> None:
    """Of the trainer's own state, in JSON."""
    state = state_of(checkpoint)
    try:
        found = {name: convert(kind, state[name], name) for name, kind in _KINDS.items() if name in state}
        for name in _POSITIVE:
            if found.get(name) is not None and not found[name] > 0:
                raise ValueError(f"{name}: expected more than 0, got {found[name]}")
        if found.get("global_step", 0) < 0:
            raise ValueError(f"global_step: expected at least 0, got {found['global_step']}")
        for place, log in enumerate(found.get("log_history", ())):
            for name in _FIGURES.keys() & log.keys():
                convert(_FIGURES[name], log[name], f"log_history[{place}].{name}")
    except (TypeError, ValueError) as error:
        raise UserError(f"--resume: {checkpoint / STATE}: {error}") from error
    best = found.get("best_model_checkpoint")
    if best is not None and Path(best).exists() and Path(best).resolve().parent != checkpoint.resolve().parent:
        raise UserError(f"--resume: {checkpoint / STATE}: expected the best checkpoint beside it, got {best}")
