"""Span corruption: spans of a text are taken out for sentinels, and learned (T5, arXiv 1910.10683, section 3.1.4)."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from fastpeft.errors import UserError

DENSITY, MEAN_SPAN = 0.15, 3.0
"""Share of the tokens that are taken out, and how many of them in a row on average: T5's own."""


def sentinels_of(tokenizer: Any) -> list[int]:
    """IDs of `<extra_id_0>`, `<extra_id_1>`, ... as far as the tokenizer has them.

    Raises:
        UserError: it has none, or no end-of-sequence token.
    """
    vocabulary, found = tokenizer.get_vocab(), list[int]()
    while (number := vocabulary.get(f"<extra_id_{len(found)}>")) is not None:
        found.append(number)
    if not found or tokenizer.eos_token_id is None:
        raise UserError(
            "model.name: expected a tokenizer with sentinels (<extra_id_0>, ...) and an end token, as T5's has, to "
            "learn from texts alone, got one without"
        )
    return found


def corrupted(ids: list[int], sentinels: list[int], end: int, draw: np.random.Generator) -> tuple[list[int], list[int]]:
    """(what the encoder reads, what the decoder learns), both with `end` behind.

    The spans to learn alternate with those that stay, which begin, so that a text ends with one to learn.

    Args:
        ids: at least two tokens.
        sentinels: one for each span; with more spans than these, the spans are longer.
        draw: where the spans are is drawn from it.
    """
    noise = min(max(round(len(ids) * DENSITY), 1), len(ids) - 1)
    spans = min(max(round(noise / MEAN_SPAN), 1), len(ids) - noise, len(sentinels))
    kept, taken = (_lengths(total, spans, draw) for total in (len(ids) - noise, noise))
    read, learned, place = list[int](), list[int](), 0
    for sentinel, stays, goes in zip(sentinels, kept, taken, strict=False):
        read += [*ids[place : place + stays], sentinel]
        learned += [sentinel, *ids[place + stays : place + stays + goes]]
        place += stays + goes
    return [*read, end], [*learned, end]


def _lengths(total: int, parts: int, draw: np.random.Generator) -> list[int]:
    """Of `parts` parts, none empty, each division as likely."""
    cuts = np.sort(draw.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate(([0], cuts, [total]))).astype(int).tolist()  # type: ignore[no-any-return]


class RepeatableSpans:
    """A collator that draws by seed, epoch and row, so that a resumed run sees what one without a break sees.

    Attributes:
        epoch: which spans are drawn; others in each.
    """

    def __init__(self, tokenizer: Any, seed: int, model: Any) -> None:
        """Raises UserError as `sentinels_of`; `model` makes the decoder's inputs of the labels."""
        from transformers import DataCollatorForSeq2Seq

        self._sentinels, self._end = sentinels_of(tokenizer), tokenizer.eos_token_id
        self._pad = DataCollatorForSeq2Seq(tokenizer, model=model)
        self._seed, self.epoch = seed, 0

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        return self._pad([self._example(list(example["input_ids"])) for example in examples])

    def _example(self, ids: list[int]) -> dict[str, list[int]]:
        digest = hashlib.sha256(f"{self._seed} {self.epoch} {ids}".encode()).digest()
        draw = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        read, learned = corrupted(ids, self._sentinels, self._end, draw)
        return {"input_ids": read, "attention_mask": [1] * len(read), "labels": learned}
