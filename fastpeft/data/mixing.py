"""Rows held back, and rows of general text among those of a domain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastpeft.errors import UserError

from .cleaning import paragraphs
from .dividing import divided
from .encoding import Encoded


def held_back(rows: Any, document: bool, fraction: float, seed: int, key: str) -> tuple[Any, Any]:
    """(what is left, what is held back): whole rows drawn by the seed, or the end of a single document.

    Args:
        rows: a `datasets.Dataset` with the column text.
        document: rows are whole texts.
        fraction: of the rows; of a single document's paragraphs.
        key: the configuration's name of it, for messages.

    Raises:
        UserError: nothing would be left on one side.
    """
    import datasets

    if document and len(rows) == 1:
        parts = paragraphs(str(rows[0]["text"]))
        first = len(parts) - max(1, round(len(parts) * fraction))
        if first < 1:
            raise UserError(f"{key}: expected a document of at least two paragraphs, or two documents, got one")
        texts = ("\n\n".join(parts[:first]), "\n\n".join(parts[first:]))
        kept, held = (datasets.Dataset.from_dict({"text": [text]}) for text in texts)
        return kept, held
    rest, drawn = divided(len(rows), fraction, seed, key)
    return rows.select(rest), rows.select(drawn)


@dataclass(frozen=True)
class Mix:
    """Rows of a domain and of general text, in an order drawn by the seed.

    Attributes:
        encoded: all of them.
        general_rows, general_tokens: how many of them are general.
        fell_short: general text had fewer tokens than its share takes.
    """

    encoded: Encoded
    general_rows: int
    general_tokens: int
    fell_short: bool

    @property
    def share(self) -> float:
        """Of the tokens."""
        return self.general_tokens / self.encoded.tokens


def mixed(domain: Encoded, general: Encoded, share: float, seed: int) -> Mix:
    """General rows, drawn by the seed, until they hold `share` of all tokens or come to an end; none comes twice."""
    import datasets
    import numpy as np

    wanted = share / (1 - share) * domain.tokens
    order = np.random.default_rng(seed).permutation(len(general))
    lengths = np.fromiter((len(ids) for ids in general.rows["input_ids"]), dtype=np.int64, count=len(general))
    sums = np.cumsum(lengths[order])
    taken = order[: min(int(np.searchsorted(sums, wanted)) + 1, len(general))] if wanted > 0 else order[:0]
    tokens = int(lengths[taken].sum())
    names = [name for name in domain.rows.column_names if name in general.rows.column_names]
    ours, theirs = domain.rows.select_columns(names), general.rows.select_columns(names).select(taken)
    rows = datasets.concatenate_datasets([ours, theirs.cast(ours.features)])
    were_cut = [*domain.were_cut, *(general.were_cut[place] for place in taken)]
    texts = [each.raw.select_columns(["text"]) for each in (domain, general)]
    raw = datasets.concatenate_datasets([texts[0], texts[1].cast(texts[0].features)])
    numbers = [*domain.numbers, *(len(domain.raw) + general.numbers[place] for place in taken)]
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    encoded = Encoded(
        rows.select(shuffled),
        domain.cut + sum(were_cut[len(domain) :]),
        domain.dropped,
        domain.tokens + tokens,
        tuple(were_cut[place] for place in shuffled),
        raw,
        tuple(numbers[place] for place in shuffled),
    )
    return Mix(encoded, len(taken), tokens, tokens < wanted)
