"""The files of a checkpoint that the trainer reads back, looked at before it does: a folder may come from anybody."""

from __future__ import annotations

import zipfile
from pathlib import Path

from fastpeft.errors import UserError

READ = ("*.pt", "*.pth")
"""What torch reads, with `weights_only`: optimizer, schedule, random states. `training_args.bin` is never read."""
PICKLES = ("adapter_model.bin", "pytorch_model*.bin")


def check_trainer_state(checkpoint: Path) -> None:
    """Look at a checkpoint that a run is to go on from.

    Raises:
        UserError: weights in a pickle, or a file of torch that is compressed or holds more than its own size.
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
