"""One training run under a strategy, from its configuration to its folder."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fastpeft.config import FastpeftConfig
from fastpeft.errors import Interrupted, RunFailed, UserError
from fastpeft.models.devices import pick_device, pick_dtype
from fastpeft.printable import printable
from fastpeft.training import folder as run_folder
from fastpeft.training.arguments import check, training_arguments
from fastpeft.training.checkpoints import check_steps, last_checkpoint, steps
from fastpeft.training.end_token import why_it_cannot_stop
from fastpeft.training.memory import decide, local_processes
from fastpeft.training.outcome import Outcome
from fastpeft.training.packing import check_packing
from fastpeft.training.preparing import Prepared
from fastpeft.training.uploading import upload

from .base import Strategy
from .registry import strategy_of
from .run_outcome import outcome_of

if TYPE_CHECKING:
    import torch

    from fastpeft.bench.memory import PeakMemory
    from fastpeft.training.stopping import StopOnSignal
    from fastpeft.training.watching import Progress, Speed, StopAtNaN


def train(config: FastpeftConfig, console: Console, *, resume: bool = False, overwrite: bool = False) -> Outcome:
    """Train an adapter.

    Args:
        config: what to do.
        console: for progress; a quiet one shows nothing.
        resume: go on from the newest checkpoint in the output folder, with the same numbers as without a break.
        overwrite: replace a run in the output folder.

    Returns:
        What came of it; it lies in the output folder too, beside the adapter.

    Raises:
        UserError: something in the configuration cannot be; nothing was written.
        MissingExtraError: a package is missing.
        Interrupted: a signal came; a checkpoint was saved.
        RunFailed: the loss, or what is trained, is no number any more.
    """
    ready = check_run(config, console, resume=resume, overwrite=overwrite)
    with ExitStack() as held:
        return _train(ready, console, overwrite, held)


@dataclass(frozen=True)
class Ready:
    """A run that may begin.

    Attributes:
        strategy: the one that the configuration asks for.
        prepared: tokenizer and encoded data, with the configuration as resolved.
        folder: the output folder.
        arguments: the trainer's, from the configuration.
        checkpoint: the one to go on from; None to begin.
        fingerprint: of the training rows.
    """

    strategy: Strategy
    prepared: Prepared
    folder: Path
    arguments: Any
    checkpoint: Path | None
    fingerprint: str


def check_run(config: FastpeftConfig, console: Console, *, resume: bool = False, overwrite: bool = False) -> Ready:
    """All that can be told about a run before its model is loaded; writes nothing. Arguments and errors as train's."""
    check(config)
    strategy = strategy_of(config)
    folder = Path(config.training.output_dir).expanduser()
    if config.model.name and Path(config.model.name).expanduser().resolve() == folder.resolve():
        raise UserError(f"training.output_dir: expected another folder than model.name, got {folder}")
    checkpoint = run_folder.prepare(folder, resume=resume, overwrite=overwrite)
    if resume and config.training.extra.get("save_only_model"):
        raise UserError("--resume: expected checkpoints with the optimizer's state, got save_only_model")
    prepared = strategy.prepare(console)
    fingerprint = prepared.rows.fingerprint()
    if checkpoint is not None:
        run_folder.check_same(strategy.kept(prepared.config), folder)
        check_steps(checkpoint, config.training)
        run_folder.check_data(folder, fingerprint)
    device = pick_device()
    dtype = pick_dtype(config.model.dtype, device)
    evaluates = prepared.watched is not None
    arguments = training_arguments(prepared.config, prepared.config.model.task, device, dtype, evaluates=evaluates)
    if checkpoint is not None:
        run_folder.check_processes(folder, arguments.world_size)
    longest = _longest(prepared)
    processes = arguments.world_size
    memory = decide(
        prepared.config, device, dtype, longest=longest, processes=processes, local=local_processes(processes),
        change=strategy.planned,
    )  # fmt: skip
    if memory.summary:
        console.print(f"memory: {memory.summary}", markup=False, highlight=False, soft_wrap=True)
    return Ready(strategy, replace(prepared, memory=memory), folder, arguments, checkpoint, fingerprint)


@dataclass(frozen=True)
class Loaded:
    """A run whose model and trainer are made.

    Attributes:
        model: that is trained; the trainer may have wrapped it.
        trainer: transformers' Trainer or one of its kind.
        arguments: the trainer's, as the strategy settled them.
        device: that the model is on.
        notes: for the report; they have been shown.
        stop, speed, progress, nan: those of the trainer's callbacks that the run asks afterwards.
    """

    model: Any
    trainer: Any
    arguments: Any
    device: torch.device
    notes: list[str]
    stop: StopOnSignal
    speed: Speed
    progress: Progress
    nan: StopAtNaN


def _train(ready: Ready, console: Console, overwrite: bool, held: ExitStack) -> Outcome:
    from fastpeft.training.choices import settled
    from fastpeft.training.saving import save_finished

    strategy, prepared = ready.strategy, ready.prepared
    config = prepared.config
    loaded = _load(ready, console)
    trainer = loaded.trainer
    first = trainer.is_world_process_zero()
    if first:
        _claim_folder(ready, overwrite, held)
    held.enter_context(settled(loaded.model, loaded.arguments, ready.checkpoint))
    strategy.before(prepared, trainer)
    peak, noticed = _run_steps(ready, loaded, console)
    outcome = outcome_of(
        prepared,
        loaded.model,
        trainer,
        strategy.after(prepared, trainer),
        fingerprint=ready.fingerprint,
        tokens_per_second=loaded.speed.tokens_per_second,
        peak=peak,
        notes=[*loaded.notes, *noticed],
        device=loaded.device,
    )
    save_finished(trainer, ready.folder)
    if first:
        outcome.write(ready.folder)
    if first and config.training.push_to_hub:
        upload(ready.folder, config, prepared.tokenizer)
    return outcome


def _load(ready: Ready, console: Console) -> Loaded:
    """The model, its notes, and the trainer with its callbacks and optimizer."""
    import fastpeft
    from fastpeft.training.choices import KeepChoices
    from fastpeft.training.loading import check_ids
    from fastpeft.training.optimizers import chosen_optimizer, set_optimizer
    from fastpeft.training.saving import SaveAfterEvaluation, Seal
    from fastpeft.training.stopping import StopOnSignal
    from fastpeft.training.watching import Progress, Speed, StopAtNaN

    strategy, prepared = ready.strategy, ready.prepared
    config = prepared.config
    device = pick_device()
    dtype = pick_dtype(config.model.dtype, device)
    arguments = strategy.settle(prepared, ready.arguments, ready.checkpoint, console)
    console.print("loading the model", highlight=False)
    model = strategy.load(prepared, device, dtype)
    check_ids(model, prepared)
    if config.data.packing:
        check_packing(model, dtype)
    notes = _notes(model, prepared, dtype, console, generates=strategy.read_as is None)
    stop, speed, progress, nan = StopOnSignal(), Speed(), Progress(console), StopAtNaN()
    saving = [KeepChoices(model), Seal(config.training.save_total_limit)]
    callbacks = [SaveAfterEvaluation(), stop, speed, progress, *strategy.callbacks(prepared), nan, *saving]
    optimizer = chosen_optimizer(config.training.optim, arguments, model)
    trainer = strategy.trainer(prepared, model, arguments, callbacks)
    set_optimizer(trainer, config.training.optim, optimizer)
    if config.memory.retry:
        fastpeft.retry_steps(trainer)
    return Loaded(model, trainer, arguments, device, notes, stop, speed, progress, nan)


def _claim_folder(ready: Ready, overwrite: bool, held: ExitStack) -> None:
    """Make the output folder this run's alone until `held` is closed: another run may have begun since the check."""
    folder, checkpoint = ready.folder, ready.checkpoint
    held.enter_context(run_folder.held(folder))
    if run_folder.prepare(folder, resume=checkpoint is not None, overwrite=overwrite) != checkpoint:
        raise UserError(f"training.output_dir: expected a folder that no other run writes, got {folder}")
    if overwrite:
        run_folder.clear(folder)
    kept = ready.strategy.kept(ready.prepared.config)
    run_folder.begin(folder, kept, ready.fingerprint, ready.arguments.world_size)


def _run_steps(ready: Ready, loaded: Loaded, console: Console) -> tuple[PeakMemory, list[str]]:
    """Train until the run is over. Returns the peak of memory, and what `fastpeft.watch` noticed.

    Raises:
        Interrupted, RunFailed: as `train`.
    """
    import fastpeft
    from fastpeft.bench.memory import PeakMemory
    from fastpeft.noticing.watch import Watch
    from fastpeft.training.resuming import resumed
    from fastpeft.training.saving import half_checkpoints_deleted

    config, checkpoint, trainer = ready.prepared.config, ready.checkpoint, loaded.trainer
    explained = fastpeft.explain_out_of_memory(loaded.model, optimizer=config.training.optim)
    watch = Watch(
        trainer.model,
        tokenizer=ready.prepared.tokenizer,
        steps_before=lambda: trainer.state.global_step,
        tell=partial(_show_note, console),
    )
    try:
        saved_or_not, read = half_checkpoints_deleted(trainer, ready.folder), resumed(trainer, checkpoint)
        with saved_or_not, loaded.stop, loaded.progress, PeakMemory(loaded.device) as peak, explained, watch, read:
            if checkpoint is not None and (ready.strategy.is_over(checkpoint) or _is_done(checkpoint, config, console)):
                _restore(trainer, checkpoint)
            else:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except FloatingPointError as error:
        raise RunFailed(f"no adapter was saved: {error}") from error
    loaded.nan.check(loaded.model, watch.origin)
    received = loaded.stop.received
    if received is not None and trainer.state.global_step < trainer.state.max_steps:
        saved = last_checkpoint(ready.folder)
        assert saved is not None
        further = "--resume goes on from it"
        if ready.arguments.save_only_model:
            further = "--resume cannot go on from it, because save_only_model left the optimizer's state out"
        raise Interrupted(received, f"{received.name}: {saved} was saved; {further}")
    return peak, [str(notice) for notice in watch.notices]


def _is_done(checkpoint: Path, config: FastpeftConfig, console: Console) -> bool:
    """Whether no step is left of a run that is resumed, which is said."""
    done, wanted = steps(checkpoint, config.training)
    if done < wanted:
        return False
    console.print(
        f"note: the run has all of its {wanted} steps, so none is trained; a larger training.max_steps or "
        "training.num_train_epochs goes on",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return True


def _restore(trainer: Any, checkpoint: Path) -> None:
    """What a resumed trainer has before its first step, which it would take before it looks whether any is left."""
    from transformers import TrainerState

    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        trainer._load_best_model()


def _notes(model: Any, prepared: Prepared, dtype: Any, console: Console, *, generates: bool) -> list[str]:
    """What should be looked at, shown at once and kept for the report.

    Args:
        generates: a decoder learns to write, and has to stop.
    """
    import torch

    notes = [*prepared.notes, *filter(None, [prepared.memory.note])]
    writes = generates and prepared.config.model.task == "causal-lm"
    if writes and (reason := why_it_cannot_stop(model, prepared.tokenizer)):
        notes.append(reason)
    if dtype == torch.float16 and "t5" in model.config.model_type:
        notes.append("T5 models are known to overflow in float16: if the loss becomes NaN, set model.dtype to float32")
    for note in notes:
        _show_note(console, note)
    return notes


def _show_note(console: Console, note: str) -> None:
    console.print(f"note: {printable(note)}", markup=False, highlight=False, soft_wrap=True)


def _longest(prepared: Prepared) -> int:
    """Tokens of the longest row of a batch."""
    data, rows = prepared.config.data, prepared.rows.rows
    assert data.max_length is not None
    names = [name for name in ("input_ids", "labels") if name in rows.column_names]
    if data.packing or not len(rows) or "input_ids" not in names:
        return data.max_length
    lengths = (
        len(value)
        for batch in rows.select_columns(names).iter(batch_size=1000)
        for name in names
        for value in batch[name]
        if isinstance(value, list)
    )
    return max(2, min(data.max_length, max(lengths)))
