"""The trainer for each task: transformers' Trainer, TRL's SFTTrainer for decoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from fastpeft.errors import UserError
from fastpeft.hub import without_telemetry
from fastpeft.metrics.classification import classification_metrics
from fastpeft.metrics.multilabel import multilabel_metrics
from fastpeft.metrics.regression import regression_metrics
from fastpeft.metrics.tokens import token_metrics
from fastpeft.models.adapters import trains_single_rows
from fastpeft.models.tasks import HEADS
from fastpeft.requirements import require


def _as_it_is(kind: type) -> type:
    return kind


def build_trainer(
    task: str,
    model: Any,
    tokenizer: Any,
    arguments: Any,
    rows: Any,
    evaluation: Any,
    callbacks: list[Any],
    subclass: Callable[[type], Any] = _as_it_is,
) -> Any:
    """A trainer that reports through `callbacks` alone.

    Args:
        task: what the model is trained to do.
        model: of PEFT or transformers, accelerated or not.
        arguments: from training_arguments.
        rows, evaluation: encoded; None for no evaluation.
        subclass: makes of the class of the trainer what it is an instance of.

    Raises:
        UserError: a model that the task's collator or trainer refuses.
    """
    from transformers.trainer_callback import PrinterCallback

    given = {
        "model": model,
        "args": arguments,
        "train_dataset": rows,
        "eval_dataset": evaluation,
        "processing_class": tokenizer,
        "callbacks": callbacks,
    }
    make = _decoder_trainer if task == "causal-lm" else partial(_trainer, task, tokenizer)
    trainer = make(given, subclass)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _decoder_trainer(given: dict[str, Any], subclass: Callable[[type], Any]) -> Any:
    trl = require("train", "trl", "training decoders")
    head = given["model"].get_output_embeddings()
    if trains_single_rows(head):
        head.register_parameter("bias", None)  # TRL reads it beside the weight, which has the trained rows in it
    with dtypes_kept(given["model"]), without_telemetry():
        try:
            return subclass(trl.SFTTrainer)(**given)
        except ValueError as error:
            if "lm_head" in str(error):
                raise UserError("lora.target_modules: expected none of the head's modules, got lm_head") from error
            raise UserError(f"training: {error}") from error


def _trainer(task: str, tokenizer: Any, given: dict[str, Any], subclass: Callable[[type], Any]) -> Any:
    from transformers import (
        DataCollatorForSeq2Seq,
        DataCollatorForTokenClassification,
        DataCollatorWithPadding,
        Trainer,
    )

    from .masking import RepeatableMasks, RepeatableTrainer
    from .spans import RepeatableSpans

    collator: Any
    seed, model = given["args"].seed, given["model"]
    if task == "masked-lm":
        if tokenizer.mask_token is None:
            raise UserError("model.name: expected a tokenizer with a mask token, got one without")
        return subclass(RepeatableTrainer)(lambda: RepeatableMasks(tokenizer, seed), **given)
    if task == "seq2seq-lm" and "labels" not in given["train_dataset"].column_names:  # texts alone
        spans = partial(RepeatableSpans, tokenizer, seed, _base_of(model))
        return subclass(RepeatableTrainer)(spans, **given)
    if task == "seq2seq-lm":
        collator = DataCollatorForSeq2Seq(tokenizer, model=_base_of(model))
    elif task == "token-classification":
        collator = DataCollatorForTokenClassification(tokenizer)
    else:
        collator = DataCollatorWithPadding(tokenizer)
    if task in HEADS:
        given["compute_metrics"] = metrics_of(task, given["model"].config)
        given["preprocess_logits_for_metrics"] = KEPT.get(task, _first)
    return subclass(Trainer)(**given, data_collator=collator)


def _base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def metrics_of(task: str, config: Any) -> Callable[[Any], dict[str, float]] | None:
    """What is measured with each evaluation beside the loss; None for nothing.

    Args:
        config: the model's.
    """
    if task == "question-answering":
        return None  # which is over questions, not over the windows that a trainer sees
    if task == "token-classification":
        return token_metrics([config.id2label[number] for number in range(config.num_labels)])
    measured = {"multi_label_classification": multilabel_metrics, "regression": regression_metrics}
    return measured.get(config.problem_type, classification_metrics)


def _first(logits: Any, labels: Any) -> Any:
    """Encoder-decoders give hidden states beside their logits, which nothing is measured on."""
    return logits[0] if isinstance(logits, tuple) else logits


KEPT: dict[str, Callable[[Any, Any], Any]] = {
    "token-classification": lambda logits, labels: _first(logits, labels).argmax(dim=-1),
    "question-answering": lambda logits, labels: logits[:2],
}
"""Of a batch's outputs: the likeliest label of each token, and the scores of starts and ends."""


@contextmanager
def dtypes_kept(model: Any) -> Iterator[None]:
    """TRL casts what is trained over a quantised base to bfloat16, where small updates are lost; PEFT keeps float32."""
    trained = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    yield
    for parameter, data in trained:
        parameter.data = data
