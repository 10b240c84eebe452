"""The matrix between a student's and a teacher's hidden states: trained with the adapter, saved beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from fastpeft.errors import UserError
from fastpeft.training.checkpoints import checkpoint_of

FILE = "projection.safetensors"
PROJECTION = "distillation_projection"
"""Its name in the student's model."""


class KeptProjection(TrainerCallback):
    """Puts the matrix among what is trained, and its values into every checkpoint; no adapter has it.

    Args:
        model: the student.
        projection: the matrix; drawn by torch's generator where no checkpoint has it.
        checkpoint: that the run goes on from; None to begin.

    Raises:
        UserError: the checkpoint has no values for it, or others.
    """

    def __init__(self, model: Any, projection: nn.Linear, checkpoint: Path | None) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        self._projection = projection.to(model.device)
        model.add_module(PROJECTION, projection)
        if checkpoint is None:
            return
        if not (checkpoint / FILE).is_file():
            raise UserError(f"--resume: expected a checkpoint with {FILE}, got {checkpoint}")
        try:
            found = load_file(checkpoint / FILE)["weight"]
        except (SafetensorError, KeyError) as error:
            raise UserError(f"--resume: {checkpoint / FILE} cannot be read: {error}") from error
        if found.shape != projection.weight.shape:
            expected = tuple(projection.weight.shape)
            raise UserError(
                f"--resume: {checkpoint / FILE}: expected weight of shape {expected}, got {tuple(found.shape)}"
            )
        with torch.no_grad():
            projection.weight.copy_(found)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        from safetensors.torch import save_file

        folder = checkpoint_of(args.output_dir, state.global_step)
        if state.is_world_process_zero and folder.is_dir():
            save_file({"weight": self._projection.weight.detach().cpu().contiguous()}, folder / FILE)
