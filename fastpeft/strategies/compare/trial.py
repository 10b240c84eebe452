"""One training of one method, from a fresh base to its figures."""

from __future__ import annotations

import gc
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fastpeft.bench.memory import PeakMemory
from fastpeft.config import FastpeftConfig
from fastpeft.errors import RunFailed, UserError
from fastpeft.integrations.peft import hands_over_a_cache
from fastpeft.models.devices import pick_device, pick_dtype
from fastpeft.training.arguments import training_arguments
from fastpeft.training.loading import load_base, trained_in_float32
from fastpeft.training.optimizers import chosen_optimizer, set_optimizer
from fastpeft.training.preparing import Prepared
from fastpeft.training.trainers import build_trainer
from fastpeft.training.watching import Speed, StopAtNaN

from .measures import Measure
from .methods import METHODS, Method, Setting
from .plan import Trial
from .splits import Splits


@dataclass(frozen=True)
class Result:
    """What came of a trial; a line of the file of results.

    Attributes:
        key, phase, method, rate, seed: the trial's.
        failed: why there are no figures; None if there are.
        figures, loss: over the validation rows in a search, else over the test rows; by name of measures.Figure.
        score: the first figure; its negative where lower is better.
        columns: what is kept of each of these rows, see measures.Columns.
        trainable, parameters: how many numbers are trained, and there are in all.
        tokens_per_second: median of the steps but the first; None if there were too few.
        peak_mib: see PeakMemory.
        seconds: of the whole trial.
    """

    key: str
    phase: str
    method: str
    rate: float
    seed: int
    failed: str | None = None
    figures: dict[str, float] = field(default_factory=dict)
    score: float = 0.0
    loss: float = 0.0
    columns: dict[str, list[Any]] = field(default_factory=dict)
    trainable: int = 0
    parameters: int = 0
    tokens_per_second: float | None = None
    peak_mib: float = 0.0
    seconds: float = 0.0


def run(trial: Trial, prepared: Prepared, splits: Splits, measure: Measure, keep: Path | None = None) -> dict[str, Any]:
    """Train and measure; what goes wrong with the method becomes `failed`.

    Args:
        trial: which.
        prepared: model and settings that all trials share.
        splits: of its rows.
        measure: what is measured of their task.
        keep: folder for what was trained; None to forget it.
    """
    start = time.perf_counter()
    result = Result(trial.key, **asdict(trial))
    try:
        result = _measured(
            result, METHODS[trial.method], _config(trial, prepared.config), prepared, splits, measure, keep
        )
    except Exception as error:  # libraries refuse a model in ways of their own, often at the first step
        result = replace(result, failed=_reason(error))
    gc.collect()
    return asdict(replace(result, seconds=round(time.perf_counter() - start, 2)))


def _config(trial: Trial, config: FastpeftConfig) -> FastpeftConfig:
    """The trial's own: the seed is of fresh values, dropout and the order of the rows."""
    extra = config.training.extra | {"save_strategy": "no", "data_seed": trial.seed}
    training = replace(config.training, learning_rate=trial.rate, seed=trial.seed, report_to="none", extra=extra)
    model = config.model
    if (wanted := METHODS[trial.method].quantization) != "none":
        model = replace(model, quantization=wanted)  # type: ignore[arg-type]
    return replace(config, model=model, training=training)


def trainable(method: Method, prepared: Prepared, device: Any, dtype: Any) -> Any:
    """A fresh model with what the method trains, accelerated if the configuration says so.

    Raises:
        UserError: the method does not serve the model.
    """
    import fastpeft

    config = prepared.config
    if reason := method.serves_not(config.model.task):
        raise UserError(reason)
    base, section = load_base(prepared, device, dtype)
    setting = Setting(section, config.model.task, config.training.max_steps, config.training.seed)
    if reason := method.why_not(setting):
        raise UserError(reason)
    model = method.attach(base, setting)
    if config.memory.gradient_checkpointing and hands_over_a_cache(model):
        raise UserError(
            f"memory.gradient_checkpointing: expected false for {method.title}, as layers that are computed again get "
            "no cache, in which its keys and values come"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"{method.title} would train nothing of this model: it trains {method.trains}")
    trained_in_float32(model)
    return fastpeft.accelerate(model) if config.acceleration.enabled else model


def _measured(
    result: Result,
    method: Method,
    config: FastpeftConfig,
    prepared: Prepared,
    splits: Splits,
    measure: Measure,
    keep: Path | None,
) -> Result:
    device = pick_device()
    dtype = pick_dtype(config.model.dtype, device)
    model = trainable(method, replace(prepared, config=config), device, dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    arguments = training_arguments(config, config.model.task, device, dtype, evaluates=False)
    speed, nan = Speed(), StopAtNaN()
    callbacks = [speed, *([method.callback(model)] if method.callback else []), nan]
    kind, options = chosen_optimizer(config.training.optim, arguments, model)
    trainer = build_trainer(config.model.task, model, prepared.tokenizer, arguments, splits.train.rows, None, callbacks)
    set_optimizer(trainer, config.training.optim, (kind, options))
    if method.optimizer is not None:
        trainer.optimizer = method.optimizer(model, kind, options | {"weight_decay": config.training.weight_decay})
    if reads_padding(model, splits.train.rows, prepared.tokenizer.pad_token_id, arguments):
        raise UserError(
            f"{method.title} gives the classifier no token ids, by which it finds a row's last token, so it would read "
            "padding; batches of one row need none"
        )
    with PeakMemory(device) as peak:
        trainer.train()
    nan.check(model)
    columns, loss = measure.columns(prepared, trainer, tested=result.phase == "test")
    figures = measure.values(columns)
    score = figures[measure.chief.name]
    if keep is not None:
        model.save_pretrained(str(keep))
    return replace(
        result,
        figures=figures,
        score=score if measure.chief.better == "higher" else -score,
        loss=loss,
        columns={name: column.tolist() for name, column in columns.items()},
        trainable=sum(parameter.numel() for parameter in trained),
        parameters=_numbers(model),
        tokens_per_second=speed.tokens_per_second,
        peak_mib=round(peak.mib, 1),
    )


def reads_padding(model: Any, rows: Any, padding: int, arguments: Any) -> bool:
    """Whether a classifier behind virtual tokens answers otherwise where its row is padded, as in a batch.

    Decoders of transformers find the last token of a row by its ids, which PEFT does not give them then.
    """
    import torch

    config: Any = getattr(model, "active_peft_config", None)
    sizes = {arguments.per_device_train_batch_size, arguments.per_device_eval_batch_size}
    if not getattr(config, "is_prompt_learning", False) or config.task_type != "SEQ_CLS" or sizes == {1}:
        return False
    ids = torch.tensor([list(rows[0]["input_ids"])[:8]], device=next(model.parameters()).device)
    padded = torch.nn.functional.pad(ids, (0, 8), value=padding)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 8))
    training = model.training
    try:
        with torch.no_grad():
            model.eval()
            alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
            within = model(input_ids=padded, attention_mask=mask).logits.float()
    finally:
        model.train(training)
    return not torch.allclose(alone, within, rtol=0.05, atol=0.05 * float(alone.abs().max()))


def _numbers(model: Any) -> int:
    """How many there are; two to a byte where they are packed in four bits."""
    packed = {id(p) for p in model.parameters() if type(p).__name__ == "Params4bit"}
    return sum(p.numel() * (2 if id(p) in packed else 1) for p in model.parameters())


def _reason(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        return "out of memory"
    line = " ".join(str(error).split())
    said = isinstance(error, (UserError, RunFailed)) or not line
    return (line if said else f"{type(error).__name__}: {line}")[:300] or type(error).__name__
