"""Does a tuned model repeat its training text word for word?

After Carlini et al., Quantifying Memorization Across Neural Language Models (2022): a training text is extractable if
the model, given its first k tokens, goes on with the next ones exactly, taking the likeliest token each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from fastpeft.data.chat import IGNORED
from fastpeft.errors import UserError


class Passage(NamedTuple):
    """Token ids of one training row: what is given, and what comes next in it."""

    given: list[int]
    following: list[int]


@dataclass(frozen=True)
class Memorization:
    """Shares of the passages.

    Attributes:
        passages: how many were tried.
        tokens: length of what should follow.
        verbatim, verbatim_base: share that the tuned model, and the base alone, went on with exactly.
        matching, matching_base: mean share of the following tokens until the first that differs.
    """

    passages: int
    tokens: int
    verbatim: float
    verbatim_base: float
    matching: float
    matching_base: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.passages} passages of the training data, each the next {self.tokens} tokens:",
                f"{'':34}{'tuned':>9}{'base':>9}",
                f"{'repeated word for word':34}{self.verbatim:>9.1%}{self.verbatim_base:>9.1%}",
                f"{'right until the first difference':34}{self.matching:>9.1%}{self.matching_base:>9.1%}",
            ]
        )


def passages(rows: Any, *, prefix: int, tokens: int, most: int, seed: int, ends: Sequence[int] = ()) -> list[Passage]:
    """Passages drawn from encoded rows.

    Args:
        rows: a `datasets.Dataset` with input_ids and labels.
        prefix: tokens given, at least; all up to the first learned one where that comes later, as with chats.
        tokens: how many must follow, all of them learned.
        most: how many passages.
        seed: of the draw.
        ends: tokens that end an answer; a passage has none, for generating would stop there.

    Raises:
        UserError: no row is long enough.
    """
    found: list[Passage] = []
    for row in rows.shuffle(seed=seed):
        ids, labels = row["input_ids"], row["labels"]
        first = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
        start = max(prefix, first)
        following = labels[start : start + tokens]
        if len(following) == tokens and not {IGNORED, *ends} & set(following):
            found.append(Passage(ids[:start], ids[start : start + tokens]))
        if len(found) == most:
            break
    if not found:
        raise UserError(
            f"--tokens: expected at most what a training row has after its first {prefix} tokens, got {tokens}; "
            "try smaller --prefix and --tokens"
        )
    return found


def probe(model: Any, found: Sequence[Passage], *, pad_token_id: int, batch_size: int = 8) -> Memorization:
    """Have the tuned model and its base go on from each passage.

    Args:
        model: a PEFT model; its adapter is switched off for the base.
        found: from `passages`, all with equally many following tokens.
        pad_token_id: for shorter rows of a batch, at their left.
        batch_size: passages at once.
    """
    tuned = _matches(model, found, pad_token_id, batch_size)
    with model.disable_adapter():
        base = _matches(model, found, pad_token_id, batch_size)
    tokens = len(found[0].following)
    count = len(found)
    return Memorization(
        passages=count,
        tokens=tokens,
        verbatim=sum(match == tokens for match in tuned) / count,
        verbatim_base=sum(match == tokens for match in base) / count,
        matching=sum(tuned) / count / tokens,
        matching_base=sum(base) / count / tokens,
    )


def _matches(model: Any, found: Sequence[Passage], pad_token_id: int, batch_size: int) -> list[int]:
    """How many tokens are right before the first that is not, for each passage."""
    import torch

    matches = []
    for start in range(0, len(found), batch_size):
        batch = found[start : start + batch_size]
        longest = max(len(passage.given) for passage in batch)
        padding = [longest - len(passage.given) for passage in batch]
        ids = torch.tensor([[pad_token_id] * p + passage.given for p, passage in zip(padding, batch, strict=True)])
        mask = torch.tensor([[0] * p + [1] * (longest - p) for p in padding])
        tokens = len(batch[0].following)
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=pad_token_id,
        )[:, longest:].tolist()
        for passage, guessed in zip(batch, out, strict=True):
            differs = [i for i, pair in enumerate(zip(passage.following, guessed, strict=True)) if pair[0] != pair[1]]
            matches.append(differs[0] if differs else tokens)
    return matches
