"""A run that goes on from a checkpoint: what is read of it, and what becomes of the errors of those who read it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from transformers import TrainerCallback

from fastpeft.errors import Interrupted, RunFailed, UserError
from fastpeft_kernels.common.exhaustion import is_out_of_memory

ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
WHOLE = ("model.safetensors", "model.safetensors.index.json")


class _Begun(TrainerCallback):
    """Whether a step was begun: by then all of a checkpoint is read."""

    def __init__(self) -> None:
        self.begun = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begun = True


@contextmanager
def resumed(trainer: Any, checkpoint: Path | None) -> Iterator[None]:
    """Within it the trainer reads a checkpoint, and trains; nothing is done where there is none.

    Raises:
        UserError: the checkpoint holds adapters that the run has not, or other weights than an adapter's; or, in place
            of whatever error, it cannot be read.
    """
    if checkpoint is None:
        yield
        return
    check_weights(trainer.model, checkpoint)
    begun = _Begun()
    trainer.add_callback(begun)
    try:
        yield
    except (UserError, RunFailed, Interrupted):
        raise
    except Exception as error:
        if begun.begun or is_out_of_memory(error):
            raise
        said = "it holds more than values" if isinstance(error, UnpicklingError) else " ".join(str(error).split())[:300]
        raise UserError(f"--resume: {checkpoint} cannot be gone on from: {type(error).__name__}: {said}") from error
    finally:
        trainer.remove_callback(begun)


def check_weights(model: Any, checkpoint: Path) -> None:
    """Raise UserError for weights that the trainer would read, and that a run of this model does not save.

    Of an adapter that the model has not it would make modules, whatever is in its configuration.
    """
    adapters = getattr(model, "peft_config", None)
    if adapters is None:
        return
    if whole := next((checkpoint / name for name in WHOLE if (checkpoint / name).exists()), None):
        raise UserError(f"--resume: expected weights of an adapter alone, got {whole}")
    for folder in sorted(path for path in checkpoint.iterdir() if path.is_dir()):
        if folder.name not in adapters and any((folder / name).exists() for name in ADAPTERS):
            raise UserError(f"--resume: expected adapters that the run has, {', '.join(adapters)}, got {folder}")
