"""One training of one method, from a fresh base to its figures."""

from __future__ import annotations

import gc
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastpeft.bench.memory import PeakMemory
from fastpeft.config import FastpeftConfig
from fastpeft.errors import RunFailed, UserError
from fastpeft.metrics.classification import accuracy, f1_macro
from fastpeft.models.devices import pick_device, pick_dtype
from fastpeft.training.arguments import training_arguments
from fastpeft.training.loading import load_base, trained_in_float32
from fastpeft.training.optimizers import chosen_optimizer, set_optimizer
from fastpeft.training.preparing import Prepared
from fastpeft.training.trainers import build_trainer
from fastpeft.training.watching import Speed, StopAtNaN

from .methods import METHODS, Method, Setting
from .plan import Trial
from .splits import Splits


@dataclass(frozen=True)
class Result:
    """What came of a trial; a line of the file of results.

    Attributes:
        key, phase, method, rate, seed: the trial's.
        failed: why there are no figures; None if there are.
        accuracy, f1, loss: over the validation rows in a search, else over the test rows; f1 is the classes' mean.
        guesses: the class guessed for each of these rows.
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
    accuracy: float = 0.0
    f1: float = 0.0
    loss: float = 0.0
    guesses: list[int] | None = None
    trainable: int = 0
    parameters: int = 0
    tokens_per_second: float | None = None
    peak_mib: float = 0.0
    seconds: float = 0.0


def run(trial: Trial, prepared: Prepared, splits: Splits, keep: Path | None = None) -> dict[str, Any]:
    """Train and measure; what goes wrong with the method becomes `failed`.

    Args:
        trial: which.
        prepared: model and settings that all trials share.
        splits: of its rows.
        keep: folder for what was trained; None to forget it.
    """
    start = time.perf_counter()
    result = Result(trial.key, **asdict(trial))
    try:
        result = _measured(result, METHODS[trial.method], _config(trial, prepared.config), prepared, splits, keep)
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
    base, section = load_base(prepared, device, dtype)
    setting = Setting(section, config.model.task, config.training.max_steps, config.training.seed)
    if reason := method.why_not(setting):
        raise UserError(reason)
    model = method.attach(base, setting)
    trained_in_float32(model)
    return fastpeft.accelerate(model) if config.acceleration.enabled else model


def _measured(
    result: Result, method: Method, config: FastpeftConfig, prepared: Prepared, splits: Splits, keep: Path | None
) -> Result:
    import numpy as np

    device = pick_device()
    dtype = pick_dtype(config.model.dtype, device)
    model = trainable(method, replace(prepared, config=config), device, dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    arguments = training_arguments(config, config.model.task, device, dtype, evaluates=False)
    speed, nan = Speed(), StopAtNaN()
    callbacks = [speed, *([method.callback(model)] if method.callback else []), nan]
    kind, options = chosen_optimizer(config.training.optim, arguments, model)
    trainer = build_trainer(config.model.task, model, prepared.tokenizer, arguments, splits.train, None, callbacks)
    set_optimizer(trainer, config.training.optim, (kind, options))
    if method.optimizer is not None:
        trainer.optimizer = method.optimizer(model, kind, options | {"weight_decay": config.training.weight_decay})
    with PeakMemory(device) as peak:
        trainer.train()
    nan.check(model)
    rows = splits.validation if result.phase == "search" else splits.test
    logits = trainer.predict(rows).predictions
    logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits, dtype=np.float64)
    if not np.isfinite(logits).all():
        raise RunFailed("what it computes is no number")
    true, guessed = np.asarray(rows["labels"]), logits.argmax(-1)
    if keep is not None:
        model.save_pretrained(str(keep))
    return replace(
        result,
        accuracy=accuracy(true, guessed),
        f1=f1_macro(true, guessed),
        loss=_cross_entropy(logits, true),
        guesses=[int(label) for label in guessed],
        trainable=sum(parameter.numel() for parameter in trained),
        parameters=_numbers(model),
        tokens_per_second=speed.tokens_per_second,
        peak_mib=round(peak.mib, 1),
    )


def _cross_entropy(logits: Any, true: Any) -> float:
    """Mean over the rows. logits: (rows, classes) in fp64; true: (rows,)."""
    import numpy as np

    shifted = logits - logits.max(-1, keepdims=True)
    return float(np.mean(np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(true)), true]))


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
