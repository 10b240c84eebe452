"""A run's folder: what is in it, whether it may be written, and who writes it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError
from fastpeft.paths import can_be_made, write_whole

from .checkpoints import SEAL, checkpoints, last_checkpoint
from .trainer_state import check_trainer_state

CONFIG, RUN, REPORT, LOSS = "config.yaml", "run.json", "report.md", "loss.png"
FINGERPRINT, PROCESSES = "data.sha256", "processes.txt"
RATES = "rate_search.json"
LOCK, UNFINISHED = ".lock", ".unfinished"
FEW_SHOT = ("few_shot.json", "few_shot.safetensors", "few_shot_draws.json")
DECISIONS, DECISIONS_PLOT, COSTS = "decisions.jsonl", "decisions.png", "costs.json"
ALONE, MERGED = "alone.json", "merged"
OWN = (
    CONFIG,
    RUN,
    REPORT,
    LOSS,
    FINGERPRINT,
    PROCESSES,
    RATES,
    *FEW_SHOT,
    DECISIONS,
    DECISIONS_PLOT,
    COSTS,
    ALONE,
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
)
"""What a run writes beside checkpoints, tokenizer and trackers."""
MAY_CHANGE = {
    "training.output_dir",
    "training.max_steps",
    "training.num_train_epochs",
    "training.per_device_eval_batch_size",
    "training.logging_steps",
    "training.eval_steps",
    "training.save_steps",
    "training.save_total_limit",
    "training.report_to",
    "training.push_to_hub",
    "training.hub_model_id",
    "memory.budget_gib",
    "memory.host_gib",
    "memory.gradient_checkpointing",
    "memory.activations",
    "memory.streamed",
    "memory.ring",
    "memory.decoded",
    "acceleration.enabled",
}
"""Settings that a resumed run may have others of: they change no step that is done."""


def prepare(folder: Path, *, resume: bool, overwrite: bool) -> Path | None:
    """Whether a run may begin or go on; changes nothing.

    Returns:
        The checkpoint to go on from; None to begin.

    Raises:
        UserError: a file is in the way, a run is there that nobody asked to replace, or none to go on with; a link in
            the folder leads out of it, and what is written would be written there.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"training.output_dir: expected a folder or a new name, got a file: {folder}")
    if not can_be_made(folder):
        raise UserError(f"training.output_dir: expected a folder that can be written, got {folder}")
    if (link := _link_elsewhere(folder)) is not None:
        raise UserError(f"training.output_dir: expected no link that leads out of {folder}, got {link}")
    if resume and overwrite:
        raise UserError("--resume: expected it without --overwrite, got both")
    if resume:
        if (found := last_checkpoint(folder)) is None:
            none = "none that is whole" if checkpoints(folder) else "none"
            raise UserError(f"--resume: expected a checkpoint in training.output_dir, got {none} in {folder}")
        check_trainer_state(found)
        return found
    if _holds_a_model(folder):
        raise UserError(f"training.output_dir: expected a folder of a run or a new one, got a model's: {folder}")
    there = _in_the_way(folder)
    if there and not _is_run(folder):
        raise UserError(f"training.output_dir: expected a folder of a run or a new one, got {folder}, with a {there}")
    if there and not overwrite and _has_something_to_lose(folder):
        raise UserError(
            f"training.output_dir: {folder} holds a run already: --resume goes on with it, --overwrite replaces it"
        )
    return None


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Nobody else trains into the folder meanwhile; a process that was killed holds nothing.

    Raises:
        UserError: somebody does.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"training.output_dir: expected a folder that no other run writes, got {folder}") from None
    except (OSError, NotImplementedError):  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # while it is held
        lock.release()


def _link_elsewhere(folder: Path) -> Path | None:
    """The first link that leads out of the folder, among what a run writes over."""
    if not folder.is_dir():
        return None
    within = (path for checkpoint in checkpoints(folder) for path in checkpoint.rglob("*"))
    links = (path for path in (*folder.iterdir(), *within) if path.is_symlink())
    return next((link for link in links if folder.resolve() not in link.resolve().parents), None)


def _holds_a_model(folder: Path) -> bool:
    """A run would change its tokenizer, and put an adapter beside its weights."""
    weights = ("model*.safetensors", "pytorch_model*.bin", "*.gguf", "tf_model.h5", "flax_model.msgpack")
    return (folder / "config.json").is_file() and any(any(folder.glob(pattern)) for pattern in weights)


def _has_something_to_lose(folder: Path) -> bool:
    """A run that died before its first checkpoint, or while it was written, left nothing to go on with."""
    names = (RUN, REPORT, "adapter_model.safetensors", *(f"{each.name}/{SEAL}" for each in checkpoints(folder)))
    return any((folder / name).exists() for name in names)


def _is_run(folder: Path) -> bool:
    """Whether what is there may be deleted: other folders have a README.md too."""
    return any((folder / name).is_file() for name in (FINGERPRINT, RUN, "adapter_config.json"))


def _in_the_way(folder: Path) -> str | None:
    found = [name for name in OWN if (folder / name).exists()] + [path.name for path in checkpoints(folder)]
    return found[0] if found else None


def clear(folder: Path) -> None:
    """Delete what a former run left, and nothing else."""
    for tasks in _task_folders(folder):
        shutil.rmtree(tasks)
    for name in OWN:
        (folder / name).unlink(missing_ok=True)
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint)
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def _task_folders(folder: Path) -> list[Path]:
    """Those that a multi-task run's adapters are in, by the run's own configuration."""
    try:
        strategy = FastpeftConfig.from_yaml(folder / CONFIG).strategy
    except (OSError, ValueError, TypeError):
        return []
    tasks = strategy.options.get("tasks") if strategy.name == "multi-task" else None
    places = [folder / name for name in [*tasks, MERGED]] if isinstance(tasks, dict) else []
    inside = [place for place in places if place.resolve().parent == folder.resolve() and not place.is_symlink()]
    return [place for place in inside if any(place.rglob("adapter_config.json"))]


def check_same(config: FastpeftConfig, folder: Path) -> None:
    """Raise UserError if a resumed run's configuration differs in what its steps so far depend on."""
    if not (folder / CONFIG).is_file():
        return
    try:
        saved = FastpeftConfig.from_yaml(folder / CONFIG)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--resume: {folder / CONFIG} cannot be read: {error}") from error
    before, now = flat(saved.to_dict()), flat(config.to_dict())
    for key in before | now:
        if key not in MAY_CHANGE and before.get(key) != now.get(key):
            earlier, wanted = _as_yaml(before.get(key)), _as_yaml(now.get(key))
            raise UserError(f"{key}: expected {earlier}, as the run to resume has it, got {wanted}")


def begin(folder: Path, config: FastpeftConfig, fingerprint: str, processes: int) -> None:
    """Write what a run that goes on from here is compared with."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CONFIG, config.to_yaml())
    write_whole(folder / FINGERPRINT, f"{fingerprint}\n")
    write_whole(folder / PROCESSES, f"{processes}\n")


def check_data(folder: Path, fingerprint: str) -> None:
    """Raise UserError if a resumed run's rows are others."""
    if _written(folder / FINGERPRINT) not in (None, fingerprint):
        raise UserError("data.path: expected the rows that the run to resume began with, got others")


def check_processes(folder: Path, processes: int) -> None:
    """Raise UserError if a resumed run is trained by more or fewer processes: steps would hold other rows."""
    if (before := _written(folder / PROCESSES)) not in (None, str(processes)):
        raise UserError(f"--resume: expected {before} processes, as the run to resume has them, got {processes}")


def _written(path: Path) -> str | None:
    """The line in a file; None if there is no such file, as in runs of older versions."""
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else None


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"lora": {"r": 8, "extra": {}}} as {"lora.r": 8}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
