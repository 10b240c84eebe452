"""One training run, from its configuration to its folder."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fastpeft.config import FastpeftConfig, LoraSection
from fastpeft.data.chat import TEMPLATES, set_template
from fastpeft.data.encoding import Encoded, encode
from fastpeft.data.endings import learned_end
from fastpeft.data.kinds import Kind, check_columns, kind_of, rename
from fastpeft.data.labels import check_labels, find_labels, named_labels
from fastpeft.data.rows import is_document, load_rows
from fastpeft.errors import Interrupted, RunFailed, UserError
from fastpeft.models import bases
from fastpeft.models.adapters import attach_adapter, lora_config
from fastpeft.models.devices import pick_device, pick_dtype
from fastpeft.models.tasks import resolve_task

from . import folder as run_folder
from .arguments import check, training_arguments
from .end_token import why_it_cannot_stop
from .outcome import Outcome
from .packing import check_packing
from .uploading import upload


@dataclass(frozen=True)
class Prepared:
    """All that is checked and loaded before a model is.

    Attributes:
        config: as resolved.
        rows, evaluation: encoded.
        chat_template: what it is called; empty without chats.
        notes: what should be looked at.
    """

    config: FastpeftConfig
    tokenizer: Any
    rows: Encoded
    evaluation: Encoded | None
    chat_template: str
    notes: list[str]


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
        RunFailed: the loss became NaN.
    """
    ready = check_run(config, console, resume=resume, overwrite=overwrite)
    return _train(ready, console, overwrite)


@dataclass(frozen=True)
class Ready:
    """A run that may begin.

    Attributes:
        prepared: model and data.
        arguments: the trainer's.
        checkpoint: to go on from; None to begin.
        fingerprint: of the training rows.
    """

    prepared: Prepared
    arguments: Any
    checkpoint: Path | None
    fingerprint: str


def check_run(config: FastpeftConfig, console: Console, *, resume: bool = False, overwrite: bool = False) -> Ready:
    """All that can be told about a run before its model is loaded; writes nothing. Arguments and errors as train's."""
    check(config)
    target = Path(config.training.output_dir).expanduser()
    checkpoint = run_folder.prepare(target, resume=resume, overwrite=overwrite)
    if resume and config.training.extra.get("save_only_model"):
        raise UserError("--resume: expected checkpoints with the optimizer's state, got save_only_model")
    prepared = prepare(config, console)
    fingerprint = _fingerprint(prepared.rows)
    if checkpoint is not None:
        run_folder.check_same(prepared.config, target)
        _check_fingerprint(target, fingerprint)
    device = pick_device()
    dtype = pick_dtype(config.model.dtype, device)
    evaluates = prepared.evaluation is not None
    arguments = training_arguments(prepared.config, prepared.config.model.task, device, dtype, evaluates=evaluates)
    return Ready(prepared, arguments, checkpoint, fingerprint)


def prepare(config: FastpeftConfig, console: Console) -> Prepared:
    """Check model and data against each other, and encode the data.

    Raises:
        UserError: they cannot be had, do not fit, or cannot be trained on as configured.
    """
    name = bases.checked_name(config.model.name)
    if not config.data.path:
        raise UserError("data.path: expected a file, a folder or a hub ID, got nothing")
    _check_evaluation(config)
    quantization = bases.quantization_of(config)
    model = replace(config.model, name=name, quantization=quantization)  # type: ignore[arg-type]
    hf_config = bases.load_config(model)
    data = replace(config.data, max_length=bases.checked_length(config.data.max_length, hf_config))
    raw = _rows(config, "path")
    kind = kind_of(raw.column_names, model.task)
    task = resolve_task(model.task, kind, hf_config, config.model.name)
    lora_config(config.lora, task)
    if data.packing and task != "causal-lm":
        raise UserError(f"data.packing: expected false for task {task}, got true")
    tokenizer = bases.load_tokenizer(model)
    _set_end(tokenizer, data.eos_token)
    template = set_template(tokenizer, data.chat_template) if _is_chat(raw, kind) else ""
    if task == "causal-lm" and tokenizer.eos_token_id is None:
        raise UserError("model.name: expected a tokenizer with an end-of-sequence token, got one without")
    evaluated = "data.eval_path" if data.eval_path else "data.eval_split"
    raw_evaluation = _rows(config, "eval_path") if data.eval_path or data.eval_split else None
    if raw_evaluation is not None:
        check_columns(raw_evaluation.column_names, kind, evaluated)
    if task == "sequence-classification":
        data = replace(data, labels=find_labels(raw) if data.labels is None else data.labels)
        raw = named_labels(raw)
        raw_evaluation = raw_evaluation and named_labels(raw_evaluation)
        check_labels(data.labels or [])
    console.print("reading the data", highlight=False)
    rows = encode(raw, kind, task, tokenizer, data, document=is_document(data.path))
    evaluation = None
    if raw_evaluation is not None:
        document = is_document(data.eval_path or data.path)
        evaluation = encode(raw_evaluation, kind, task, tokenizer, data, document=document, where=evaluated)
    elif data.eval_fraction:
        rows, evaluation = _held_back(rows, data.eval_fraction, config.training.seed)
    notes = []
    if template:
        token, note = _end_of_answers(rows, tokenizer, data.eos_token)
        data = replace(data, eos_token=token, chat_template=template)
        notes = [note] if note else []
    dtype = str(pick_dtype(model.dtype, pick_device())).removeprefix("torch.")
    model = replace(model, task=task, dtype=dtype)  # type: ignore[arg-type]
    resolved = replace(config, model=model, data=_whole_paths(data))
    return Prepared(resolved, tokenizer, rows, evaluation, template, notes)


def _end_of_answers(rows: Encoded, tokenizer: Any, wanted: str | None) -> tuple[str | None, str | None]:
    """(the token that ends answers if it is not the tokenizer's, a note if it is not learned); sets the tokenizer's."""
    learned, unlearned = learned_end(rows.rows, tokenizer)
    if learned is None:
        after = f", {tokenizer.convert_ids_to_tokens(unlearned)!r}," if unlearned is not None else ""
        return wanted, (
            f"the model does not learn to stop: the chat template does not mark the token that ends an answer{after} "
            "as the assistant's; give data.chat_template one that does, or set data.assistant_only to false"
        )
    token = tokenizer.convert_ids_to_tokens(learned)
    if wanted is None and token != tokenizer.eos_token:
        tokenizer.eos_token = wanted = token
    return wanted, None


def _check_evaluation(config: FastpeftConfig) -> None:
    data = config.data
    given = [name for name in ("eval_path", "eval_split", "eval_fraction") if getattr(data, name)]
    if "eval_fraction" in given and len(given) > 1:
        raise UserError(f"data.eval_fraction: expected it alone, got data.{given[0]} too")
    if not 0 <= data.eval_fraction < 1:
        raise UserError(f"data.eval_fraction: expected 0 to below 1, got {data.eval_fraction}")
    if data.limit is not None and data.limit < 1:
        raise UserError(f"data.limit: expected at least 1, got {data.limit}")


def _rows(config: FastpeftConfig, which: str) -> Any:
    data = config.data
    if which == "path":
        rows = load_rows(data.path, split=data.split, name=data.name, split_key="data.split")
    elif data.eval_path:
        split = data.eval_split
        rows = load_rows(data.eval_path, split=split, key="data.eval_path", split_key="data.eval_split")
    else:
        rows = load_rows(data.path, split=data.eval_split, name=data.name, split_key="data.eval_split")
    rows = rename(rows, data.columns)
    return rows.select(range(min(data.limit, len(rows)))) if data.limit is not None else rows


def _is_chat(rows: Any, kind: Kind) -> bool:
    return kind.name == "chat" or (kind.name == "completion" and isinstance(rows[0]["prompt"], list))


def _set_end(tokenizer: Any, token: str | None) -> None:
    if token is None:
        return
    if token not in tokenizer.get_vocab():
        raise UserError(f"data.eos_token: expected a token of the tokenizer's vocabulary, got {token!r}")
    tokenizer.eos_token = token


def _held_back(rows: Encoded, fraction: float, seed: int) -> tuple[Encoded, Encoded]:
    count = max(1, round(len(rows) * fraction))
    if count >= len(rows):
        raise UserError(f"data.eval_fraction: expected at least one row on either side, got {len(rows)} in all")
    parts = rows.rows.train_test_split(test_size=count, seed=seed)

    def part(name: str) -> Encoded:
        return replace(rows, rows=parts[name], tokens=sum(map(len, parts[name]["input_ids"])))

    return part("train"), part("test")


def _whole_paths(data: Any) -> Any:
    """Local paths from the root, so that config.yaml means the same from anywhere."""

    def whole(path: str | None) -> str | None:
        local = Path(path).expanduser() if path else None
        return str(local.resolve()) if local is not None and local.exists() else path

    template = data.chat_template if data.chat_template in TEMPLATES else whole(data.chat_template)
    return replace(data, path=whole(data.path), eval_path=whole(data.eval_path), chat_template=template)


def _train(ready: Ready, console: Console, overwrite: bool) -> Outcome:
    from fastpeft.bench.memory import PeakMemory
    from fastpeft.bench.records import environment

    from .stopping import StopOnSignal
    from .trainers import build_trainer
    from .watching import Progress, Speed, StopAtNaN

    prepared, checkpoint = ready.prepared, ready.checkpoint
    config = prepared.config
    target = Path(config.training.output_dir).expanduser()
    device = pick_device()
    dtype = pick_dtype(config.model.dtype, device)
    task = config.model.task
    evaluation = None if prepared.evaluation is None else prepared.evaluation.rows
    console.print("loading the model", highlight=False)
    model = _model(prepared, device, dtype)
    if config.data.packing:
        check_packing(model, dtype)
    notes = _notes(model, prepared, dtype, console)
    stop, speed, progress, nan = StopOnSignal(), Speed(), Progress(console), StopAtNaN()
    trainer = build_trainer(
        task, model, prepared.tokenizer, ready.arguments, prepared.rows.rows, evaluation, [stop, speed, progress, nan]
    )
    first = trainer.is_world_process_zero()
    if first:
        if overwrite:
            run_folder.clear(target)
        target.mkdir(parents=True, exist_ok=True)
        (target / run_folder.CONFIG).write_text(config.to_yaml(), encoding="utf-8")
        (target / run_folder.FINGERPRINT).write_text(ready.fingerprint + "\n")
    with stop, progress, PeakMemory(device) as peak:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    _check_finite(model, nan.step)
    if stop.received is not None and trainer.state.global_step < trainer.state.max_steps:
        saved = run_folder.last_checkpoint(target)
        assert saved is not None
        raise Interrupted(stop.received, f"{stop.received.name}: {saved} was saved; --resume goes on from it")
    losses = [(log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log]
    outcome = Outcome(
        base=config.model.name,
        task=task,
        method=config.method,
        rows=len(prepared.rows),
        evaluation_rows=0 if prepared.evaluation is None else len(prepared.evaluation),
        cut=prepared.rows.cut,
        dropped=prepared.rows.dropped,
        tokens=prepared.rows.tokens,
        fingerprint=ready.fingerprint,
        losses=losses,
        evaluation=[(log["step"], log["eval_loss"]) for log in trainer.state.log_history if "eval_loss" in log],
        metrics=_metrics(trainer),
        steps=trainer.state.global_step,
        tokens_per_second=speed.tokens_per_second,
        peak_mib=peak.mib,
        peak_method=peak.method,
        notes=notes,
        accelerated=_accelerated(model) if config.acceleration.enabled else "",
        chat_template=prepared.chat_template,
        environment=asdict(environment(device.type)),
    )
    trainer.save_model(str(target))
    if first:
        outcome.write(target)
    if first and config.training.push_to_hub:
        upload(target, config, prepared.tokenizer)
    return outcome


def _check_finite(model: Any, step: int | None) -> None:
    """Raise RunFailed if the loss, or what was trained, is no number any more."""
    if step is None and all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad):
        return
    where = f"the loss of step {step}" if step is not None else "what was trained"
    raise RunFailed(
        f"{where} is no number, so no adapter was saved; try a lower training.learning_rate, or model.dtype float32"
    )


def _model(prepared: Prepared, device: Any, dtype: Any) -> Any:
    """Base and fresh adapter, accelerated; what is trained is in float32."""
    import fastpeft

    config = prepared.config
    labels = config.data.labels if config.model.task == "sequence-classification" else None
    others: dict[str, Any] = {} if labels is None else {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
    if labels is not None:
        others["label2id"] = {label: number for number, label in enumerate(labels)}
    _seed(config.training.seed)  # a fresh classifier's first values
    others["whole"] = config.lora.modules_to_save
    base, fresh = bases.load_base(
        config.model, config.model.task, device, dtype, config.model.quantization or "none", **others
    )
    if labels is not None or base.config.get_text_config().pad_token_id is None:  # decoders look for the last token
        base.config.get_text_config().pad_token_id = prepared.tokenizer.pad_token_id
    model = attach_adapter(base, _training_what_is_fresh(config, fresh), config.model.task, config.training.seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # a scaled float16 gradient could not be unscaled
    if config.acceleration.enabled:
        fastpeft.accelerate(model)
    return model


def _training_what_is_fresh(config: FastpeftConfig, fresh: list[str]) -> LoraSection:
    """A classifier's new modules are trained and saved whole; a language model should not have any."""
    known = (*config.lora.modules_to_save, "classifier", "score")  # PEFT trains the last two by itself
    added = [name for name in fresh if not any(name == one or name.endswith(f".{one}") for one in known)]
    if added and config.model.task != "sequence-classification":
        raise UserError(
            f"model.name: {config.model.name} has no values for {', '.join(added[:4])}, so its head would be random; "
            "take a checkpoint with a head, or name these in lora.modules_to_save"
        )
    return replace(config.lora, modules_to_save=[*config.lora.modules_to_save, *added])


def _notes(model: Any, prepared: Prepared, dtype: Any, console: Console) -> list[str]:
    """What should be looked at, shown at once and kept for the report."""
    import torch

    notes = list(prepared.notes)
    if prepared.config.model.task == "causal-lm" and (reason := why_it_cannot_stop(model, prepared.tokenizer)):
        notes.append(reason)
    if dtype == torch.float16 and "t5" in model.config.model_type:
        notes.append("T5 models are known to overflow in float16: if the loss becomes NaN, set model.dtype to float32")
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    return notes


def _seed(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)


def _accelerated(model: Any) -> str:
    import fastpeft

    return str(fastpeft.report(model))


def _metrics(trainer: Any) -> dict[str, float]:
    """Of the last evaluation, without times and counts."""
    found: dict[str, Any] = next((log for log in reversed(trainer.state.log_history) if "eval_loss" in log), {})
    unwanted = ("per_second", "runtime", "num_tokens")
    return {
        name.removeprefix("eval_"): float(value)
        for name, value in found.items()
        if name.startswith("eval_") and isinstance(value, (int, float)) and not any(u in name for u in unwanted)
    }


def _fingerprint(rows: Encoded) -> str:
    """Of all token ids and labels, in their order."""
    import numpy as np

    digest = hashlib.sha256()
    names = [name for name in ("input_ids", "labels") if name in rows.rows.column_names]
    for batch in rows.rows.select_columns(names).iter(batch_size=1000):
        for values in zip(*(batch[name] for name in names), strict=True):
            for value in values:
                digest.update(np.asarray(value, dtype=np.int32).tobytes() + b";")
    return digest.hexdigest()


def _check_fingerprint(target: Path, fingerprint: str) -> None:
    saved = target / run_folder.FINGERPRINT
    if saved.is_file() and saved.read_text().strip() != fingerprint:
        raise UserError("data.path: expected the rows that the run to resume began with, got others")
