"""What a run has found out about its model and machine, in its checkpoints: a resumed run computes in the same way.

Those are the measured choice between implementations, which another `fastpeft tune` may have changed meanwhile, and
the groups of projections that are computed together, which may depend on the first batch. Each changes rounding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from fastpeft.errors import UserError
from fastpeft.layers.grouping import Grouping, group_again, grouping_of
from fastpeft.paths import write_whole
from fastpeft.structured import build, convert
from fastpeft_kernels.tuning import choosing

from .checkpoints import checkpoint_of


@dataclass(frozen=True)
class Choices:
    """Of one process.

    Attributes:
        device: the name under which choices are measured.
        measured: [op, case, winner] of each; the case is a list of plain values and lists of those.
        grouping: of the model.
    """

    device: str
    measured: list[list[Any]]
    grouping: Grouping


def file_of(checkpoint: Path, process: int) -> Path:
    """Beside the process's random state."""
    return checkpoint / f"choices_{process}.json"


class KeepChoices(TrainerCallback):
    """Puts each process's choices into its checkpoints.

    Args:
        model: accelerated or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        checkpoint = checkpoint_of(args.output_dir, state.global_step)
        if checkpoint.is_dir():
            device = args.device
            measured = [list(row) for row in choosing.measured(device)]
            kept = Choices(choosing.device_name(device), measured, grouping_of(self._model))
            write_whole(file_of(checkpoint, args.process_index), json.dumps(asdict(kept)) + "\n")


@contextmanager
def settled(model: nn.Module, args: Any, checkpoint: Path | None) -> Iterator[None]:
    """Choices as a checkpoint has them; without one, on several processes, what the first one has measured.

    On another kind of device what is measured there counts.

    Args:
        model: accelerated, if it is to be; no forward has run yet.
        args: the trainer's.
        checkpoint: that is gone on from; None to begin.

    Raises:
        UserError: the file in the checkpoint is none of ours.
    """
    kept = None if checkpoint is None else _read(file_of(checkpoint, args.process_index))
    here, own = choosing.device_name(args.device), choosing.measured(args.device)
    there, winners = here, own
    if kept is not None:
        group_again(model, kept.grouping)
        there, winners = kept.device, [(op, _tuple(case), winner) for op, case, winner in kept.measured]
    elif checkpoint is None and args.world_size > 1:
        there, winners = _of_first(here, own)
    with choosing.measured_as(args.device, winners if there == here else own):
        yield


def _of_first(*own: Any) -> Any:
    from torch import distributed

    found = [own]
    distributed.broadcast_object_list(found, src=0)
    return found[0]


def _read(path: Path) -> Choices | None:
    """None where there is none: an earlier version saved the checkpoint."""
    if not path.exists():
        return None
    try:
        found = build(Choices, json.loads(path.read_text(encoding="utf-8")))
        for op, case, winner in found.measured:
            hash((convert(str, op, "op"), _tuple(convert(list[Any], case, "case")), convert(str, winner, "winner")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: expected the choices of a run, got another file: {error}") from error
    return found


def _tuple(case: list[Any]) -> tuple[Any, ...]:
    return tuple([tuple(value) if isinstance(value, list) else value for value in case])
