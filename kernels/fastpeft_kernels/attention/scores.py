"""What happens to the scores between q kT and the product with v."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """score = scale * (q . k); then softcap * tanh(score / softcap); then + relative + bias; masked; softmax; dropout.

    Attributes:
        scale: factor of the product.
        softcap: bound of the scores (Gemma 2); None for none.
        relative: (heads, queries + keys - 1), added at [head, key - query + queries - 1]: a bias that depends on the
            distance alone, as T5's out of its table, or ALiBi's.
        bias: floating, broadcastable to (batch, heads, queries, keys), added.
        sinks: (heads,), one more score of each row, of a key that has no value (gpt-oss).
        dropout: probability of dropping a weight, in [0, 1).
        seed: int64 (1,) on q's device, as `random.draw_seed` makes it; needed where dropout > 0. The weight of batch b,
            head h is kept as `random.dropout_bits(seed, row=query, column=key, stream=b * heads + h)` says.
    """

    scale: float
    softcap: float | None = None
    relative: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0
    seed: Tensor | None = None
