"""What fastpeft itself wrote, and somebody may have changed since: tuning, checkpoints, notes of runs."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hypothesis import strategies as st

from benchmarks.fuzz.making import as_json
from benchmarks.fuzz.watching import Target
from fastpeft.config import TrainingSection
from fastpeft.errors import UserError
from fastpeft.training.checkpoints import SEAL, STATE, check_steps, is_whole, last_checkpoint, seal
from fastpeft.training.trainer_state import check_trainer_state
from fastpeft_kernels.tuning import files
from fastpeft_kernels.tuning.records import UnusableError, stamp

DEVICE = "some CPU, 1 threads"
WINNER = {"op": "decode_4bit", "key": {"rows": 1, "dtype": "float32", "shape": [1, 2], "frozen": True}}
WINNER |= {"choice": "library", "us": {"library": 2.0, "triton": 3.5}}
TUNING = {**stamp(), "device": DEVICE, "winners": [WINNER, WINNER]}
SEALED = {"files": {STATE: [2, hashlib.sha256(b"{}").hexdigest()]}}
STATES = {
    "global_step": 10,
    "epoch": 0.5,
    "max_steps": 20,
    "logging_steps": 10,
    "log_history": [{"epoch": 0.5, "loss": 2.5, "step": 10}],
    "best_model_checkpoint": None,
    "stateful_callbacks": {"EarlyStoppingCallback": {"attributes": {}}},
}


def read_tuning(path: Path) -> None:
    """What an op does that asks for the fastest way; what is read can be written again."""
    found = files.read(path, DEVICE)
    _ = {(winner.op, winner.case): winner.choice for winner in found}
    again = path.with_name("again.json")
    again.unlink(missing_ok=True)
    files.add(again, DEVICE, found)
    assert {repr(one) for one in files.read(again, DEVICE)} <= {repr(one) for one in found}, "other winners come back"


def read_seal(path: Path) -> None:
    """What `--resume` does: a checkpoint that is not what was sealed is passed over."""
    checkpoint = path.parent / "run" / "checkpoint-1"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / STATE).write_text("{}")
    (checkpoint / SEAL).write_bytes(path.read_bytes())
    whole = is_whole(checkpoint)
    assert last_checkpoint(checkpoint.parent) == (checkpoint if whole else None)


def read_state(path: Path) -> None:
    """The state in a checkpoint that somebody sealed anew."""
    checkpoint = path.parent / "run" / "checkpoint-2"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / STATE).write_bytes(path.read_bytes())
    seal(checkpoint)
    if last_checkpoint(checkpoint.parent) is not None:
        check_trainer_state(checkpoint)
        check_steps(checkpoint, TrainingSection())


TARGETS = (
    Target("tuning", "some-cpu-1-threads.json", as_json(st.just(TUNING)), read_tuning, (UnusableError,), ".+"),
    Target("seals of checkpoints", "sealed.json", as_json(st.just(SEALED)), read_seal, ()),
    Target("states of checkpoints", STATE, as_json(st.just(STATES)), read_state, (UserError,), "--resume: "),
)
