"""A model on rows, one result a row: classes, losses of tokens, generated answers. Changes no random state.

Every process looks at all rows, so that no result depends on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from fastpeft.data.chat import IGNORED
from fastpeft.data.encoding import Encoded
from fastpeft.metrics.language import Losses
from fastpeft.models.devices import autocast, pick_device, pick_dtype

from .preparing import Prepared

MOST_NEW_TOKENS = 512


class Exchange(NamedTuple):
    """A prompt and the answer that a row has to it, as token ids."""

    prompt: list[int]
    answer: list[int]


def classes(prepared: Prepared, trainer: Any, encoded: Encoded) -> list[int]:
    """The likeliest class of each row."""
    found: list[int] = []
    with evaluating(prepared, trainer.model) as forward:
        for batch in batches(prepared, trainer, encoded):
            batch.pop("labels")
            found += forward(batch).logits.argmax(dim=-1).tolist()
    return found


def token_losses(prepared: Prepared, trainer: Any, encoded: Encoded) -> Losses:
    """Of a language model of any kind. Masks are those that the training's evaluations have."""
    import numpy as np
    import torch

    task = prepared.config.model.task
    shift = int(task == "causal-lm")
    sums, tokens, right = list[float](), list[int](), list[int]()
    with evaluating(prepared, trainer.model) as forward:
        for batch in batches(prepared, trainer, encoded):
            labels = batch["labels"] if task == "seq2seq-lm" else batch.pop("labels")
            logits = forward(batch).logits
            labels = labels.to(logits.device)
            virtual = logits.shape[1] - labels.shape[1]  # tokens of a prompt that PEFT puts before a decoder's
            for row, wanted in enumerate(labels):  # a row at a time: float32 logits are large
                wanted = wanted[shift:]
                scores = logits[row, virtual : virtual + len(wanted)][wanted != IGNORED].float()
                wanted = wanted[wanted != IGNORED]
                losses = torch.nn.functional.cross_entropy(scores, wanted, reduction="none")
                sums.append(losses.double().sum().item())
                tokens.append(len(wanted))
                right.append(int((scores.argmax(dim=-1) == wanted).sum()))
    return Losses(np.asarray(sums), np.asarray(tokens), np.asarray(right))


def exchange(row: dict[str, Any], task: str) -> Exchange | None:
    """An encoded row's last answer and what comes before it; None for a text that is learned from its first token."""
    ids, labels = list(row["input_ids"]), list(row["labels"])
    if task == "seq2seq-lm":
        return Exchange(ids, labels)
    end = max((place + 1 for place, label in enumerate(labels) if label != IGNORED), default=0)
    start = end
    while start > 0 and labels[start - 1] != IGNORED:
        start -= 1
    return Exchange(ids[:start], ids[start:end]) if 0 < start < end else None


def answers(prepared: Prepared, trainer: Any, prompts: Sequence[list[int]], new_tokens: int) -> list[str]:
    """What the model generates, the likeliest token each time, up to `new_tokens`."""
    from fastpeft.generation import Generator, Sampling

    size = trainer.args.per_device_eval_batch_size
    with evaluating(prepared, trainer.model):
        return list(
            Generator(trainer.model, prepared.tokenizer).answers(prompts, Sampling(new_tokens), size),
        )


@contextmanager
def evaluating(prepared: Prepared, model: Any) -> Iterator[Callable[[dict[str, Any]], Any]]:
    """A forward without gradients or dropout, in the dtype of the run; everything is as before when it ends."""
    import torch

    from fastpeft.layers.random_state import RandomState, devices_of

    device = pick_device()
    dtype = pick_dtype(prepared.config.model.dtype, device)
    state, training = RandomState(devices_of(model)), model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(device, dtype):
            yield lambda batch: model(**{name: value.to(device) for name, value in batch.items()})
    finally:
        model.train(training)
        state.put_back()


def batches(prepared: Prepared, trainer: Any, encoded: Encoded) -> Iterator[dict[str, Any]]:
    """All rows in their order, with their labels. Masks are those that the training's evaluations have."""
    collate, size = _collator(prepared, trainer), trainer.args.per_device_eval_batch_size
    for start in range(0, len(encoded), size):
        rows = encoded.rows.select(range(start, min(start + size, len(encoded))))
        yield dict(collate(list(rows)))


def _collator(prepared: Prepared, trainer: Any) -> Any:
    if hasattr(trainer, "evaluation_collator"):  # the same masks and spans each time
        return trainer.evaluation_collator
    return _padded if prepared.config.model.task == "causal-lm" else trainer.data_collator


def _padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Each row by itself, padded at its end; the trainer's own collator may put all into one."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def column(values: list[list[int]], padding: int) -> Any:
        return pad_sequence([torch.tensor(value) for value in values], batch_first=True, padding_value=padding)

    ids, labels = ([row[name] for row in rows] for name in ("input_ids", "labels"))
    mask = column([[1] * len(row) for row in ids], 0)
    return {"input_ids": column(ids, 0), "attention_mask": mask, "labels": column(labels, IGNORED)}
