"""The trainer's arguments, from a configuration."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, get_type_hints

from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError
from fastpeft.hints import nearest
from fastpeft.hub import unreachable
from fastpeft.requirements import require
from fastpeft.structured import convert

from .memory import check_memory
from .optimizers import OURS, name_for_trainer

if TYPE_CHECKING:
    import torch

POSITIVE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "logging_steps")
NOT_NEGATIVE = ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "seed")
FINITE = ("learning_rate", "warmup_steps", "weight_decay")
PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}
"""Of trackers whose own name is another."""
OWN = ("eval_steps", "save_steps", "save_total_limit", "report_to", "push_to_hub", "hub_model_id", "extra")
"""Settings that are not handed on as they are."""


def check(config: FastpeftConfig) -> None:
    """What can be told without loading anything.

    Raises:
        UserError: a number out of range, a schedule, optimizer or tracker that there is not, or what is not built yet.
        MissingExtraError: a package is missing that is wanted only at the end.
    """
    require("train", "matplotlib", "the loss curve")
    training = config.training
    for name in POSITIVE:
        _at_least(name, getattr(training, name), 1)
    for name in NOT_NEGATIVE:
        _at_least(name, getattr(training, name), 0)
    for name in ("eval_steps", "save_steps", "save_total_limit"):
        if (value := getattr(training, name)) is not None:
            _at_least(name, value, 1)
    for name in ("num_train_epochs", *FINITE):
        if math.isinf(value := getattr(training, name)):
            raise UserError(f"training.{name}: expected a finite number, got {value}")
    if training.max_steps < 1 and not training.num_train_epochs > 0:
        raise UserError(f"training.num_train_epochs: expected more than 0, got {training.num_train_epochs}")
    if training.max_steps == 0 or training.max_steps < -1:
        raise UserError(f"training.max_steps: expected at least 1, or -1 for no limit, got {training.max_steps}")
    if training.seed >= 2**32:
        raise UserError(f"training.seed: expected less than 2^32, got {training.seed}")
    if not training.output_dir:
        raise UserError("training.output_dir: expected a folder, got nothing")
    if training.push_to_hub:
        _check_hub()
    check_memory(config)
    _known_choices(config)


def trackers(config: FastpeftConfig) -> list[str]:
    """Names of the trackers to report to, without "none"."""
    given = config.training.report_to
    return [name for name in ([given] if isinstance(given, str) else given) if name != "none"]


def _check_hub() -> None:
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError("training.push_to_hub: expected to be logged in to the hub: run hf auth login")
    if offline := unreachable():
        raise UserError(f"training.push_to_hub: {offline}")


def _known_choices(config: FastpeftConfig) -> None:
    from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    _one_of("lr_scheduler_type", config.training.lr_scheduler_type, [kind.value for kind in SchedulerType])
    _one_of("optim", config.training.optim, [*(kind.value for kind in OptimizerNames), OURS])
    for tracker in trackers(config):
        _one_of("report_to", tracker, ["none", "all", *INTEGRATION_TO_CALLBACK])
        if tracker != "all" and tracker not in get_available_reporting_integrations():
            package = PACKAGES.get(tracker, tracker)
            raise UserError(f"training.report_to: {tracker} is not installed: pip install {package}")


def _one_of(name: str, value: str, known: list[str]) -> None:
    if value not in known:
        if near := nearest(value, known):
            raise UserError(f"training.{name}: expected a known name, got {value!r}, did you mean {near!r}?")
        raise UserError(f"training.{name}: expected one of {', '.join(known)}; got {value!r}")


def _at_least(name: str, value: float, least: int) -> None:
    if not value >= least:
        raise UserError(f"training.{name}: expected at least {least}, got {value}")


def training_arguments(
    config: FastpeftConfig, task: str, device: torch.device, dtype: torch.dtype, *, evaluates: bool
) -> Any:
    """transformers' TrainingArguments; TRL's SFTConfig for decoders.

    Args:
        config: checked, with data.max_length filled in.
        task: what the model is trained to do.
        device, dtype: where and in what it computes; float16 with gradient scaling, as Trainer does it.
        evaluates: whether there is something to evaluate on.

    Raises:
        UserError: an unknown key of `training.extra`, or options that the trainer refuses.
        MissingExtraError: TRL is not installed.
    """
    import torch
    from transformers import TrainingArguments

    kind = require("train", "trl", "training decoders").SFTConfig if task == "causal-lm" else TrainingArguments
    section = config.training
    given = {name: value for name, value in asdict(section).items() if name not in OWN}
    given |= {
        "optim": name_for_trainer(section.optim),
        "eval_strategy": _when(section.eval_steps) if evaluates else "no",
        "save_strategy": _when(section.save_steps),
        "report_to": trackers(config),
        "gradient_checkpointing": config.memory.gradient_checkpointing,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        "logging_first_step": True,
        "include_num_input_tokens_seen": "non_padding",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # it would show a loss that is no number as 0
        "label_names": ["start_positions", "end_positions"] if task == "question-answering" else ["labels"],
    }
    if config.memory.gradient_checkpointing:
        given["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    given |= {name: value for name in ("eval_steps", "save_steps") if (value := getattr(section, name)) is not None}
    if task == "causal-lm":
        given |= {"max_length": config.data.max_length, "packing": config.data.packing, "eval_packing": False}
    _check_extra(section.extra, given, [field.name for field in fields(kind) if field.init])
    try:
        hints = get_type_hints(kind)
        for name, value in section.extra.items():
            convert(hints[name], value, f"training.extra.{name}")
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    try:
        arguments = kind(**given | section.extra)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"training: {error}") from error
    if arguments.n_gpu > 1:  # one process trains on one GPU; torchrun and accelerate launch start one for each
        arguments._n_gpu = 1
    _check_schedule(arguments)
    _check_loader(arguments)
    return arguments


def _check_loader(arguments: Any) -> None:
    """What reads the rows has settings of its own, and looks at them only once everything is loaded."""
    from torch.utils.data import DataLoader

    names = ("num_workers", "persistent_workers", "prefetch_factor")
    settings = {name: getattr(arguments, f"dataloader_{name}") for name in names}
    try:
        DataLoader([0], **settings)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"training.extra.dataloader_num_workers: {error}") from error


def _check_schedule(arguments: Any) -> None:
    """Some schedules want settings of their own, and ask for them only once everything is loaded."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=arguments.learning_rate)
    try:
        get_scheduler(arguments.lr_scheduler_type, optimizer, 0, 10, arguments.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        name = arguments.lr_scheduler_type.value
        raise UserError(f"training.lr_scheduler_type: {name}: {error} (training.extra.lr_scheduler_kwargs)") from error


def _when(steps: int | None) -> str:
    return "epoch" if steps is None else "steps"


def _check_extra(extra: dict[str, Any], given: dict[str, Any], known: list[str]) -> None:
    settings = {field.name for field in fields(FastpeftConfig().training)}
    for name in extra:
        if name in settings:
            raise UserError(f"training.extra.{name}: expected training.{name} instead")
        if name not in known:
            near = nearest(name, [*settings, *known])
            place = f"training.{near}" if near in settings else near
            hint = f", did you mean {place!r}?" if near else ", and the trainer's arguments have none of this name"
            raise UserError(f"training.extra.{name}: unknown key{hint}")
        if name in ("use_cpu", "bf16", "fp16", "packing", "max_length", "disable_tqdm", "eval_strategy", "hub_token"):
            raise UserError(f"training.extra.{name}: expected nothing, other settings decide it")
