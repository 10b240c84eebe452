"""How well a language model knows texts: losses row by row, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .intervals import Interval, over_rows


@dataclass(frozen=True)
class Losses:
    """Of a language model's rows.

    Attributes:
        sums: float64 array (rows,), each row's cross-entropy in nats, summed over the tokens that are learned.
        tokens: int64 array (rows,), how many these are.
    """

    sums: Any
    tokens: Any

    def __len__(self) -> int:
        return len(self.sums)

    def loss(self) -> Interval:
        """A token's, in nats, with its interval over the rows."""
        return over_rows(lambda sums, tokens: float(sums.sum() / tokens.sum()), self.sums, self.tokens)

    def perplexity(self) -> Interval:
        """exp of the loss, with its interval over the rows."""
        return Interval(*(math.exp(min(value, 700.0)) for value in self.loss()))  # beyond, a float is no more

    def since(self, before: Losses) -> Interval:
        """How much higher a token's loss is than in `before`, which has the same rows and tokens; the interval is over
        rows, each of which is compared with itself."""
        return over_rows(lambda more, tokens: float(more.sum() / tokens.sum()), self.sums - before.sums, self.tokens)


def losses(
    model: Any, rows: Any, collate: Callable[[list[Any]], Any], batch_size: int, *, shifted: bool, computing: Any
) -> Losses:
    """Each row's loss, with dropout off; no random number is drawn.

    Args:
        model: of transformers or PEFT; its mode is as before afterwards.
        rows: a `datasets.Dataset`.
        collate: a batch of them to tensors, with labels (rows, length), -100 where nothing is learned.
        shifted: a token's logits are before it, as in decoders.
        computing: makes a context manager to compute in, such as autocast.
    """
    import numpy as np
    import torch
    from torch.nn.functional import cross_entropy

    training, sums, tokens = model.training, list[float](), list[int]()
    model.eval()
    try:
        for start in range(0, len(rows), batch_size):
            batch = collate([rows[number] for number in range(start, min(start + batch_size, len(rows)))])
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            labels = batch["labels"] if "decoder_input_ids" in batch else batch.pop("labels")
            with torch.no_grad(), computing():
                logits = model(**batch).logits
            if shifted:
                logits, labels = logits[:, :-1], labels[:, 1:]
            for row, wanted in zip(logits, labels, strict=True):  # a row at a time: float32 logits are large
                learned = wanted != -100
                row_losses = cross_entropy(row[learned].float(), wanted[learned], reduction="none")
                sums.append(float(row_losses.double().sum()))
                tokens.append(int(learned.sum()))
    finally:
        model.train(training)
    return Losses(np.asarray(sums, dtype=np.float64), np.asarray(tokens, dtype=np.int64))
