"""Examples in the prompt, in place of training: drawn at random, or the nearest to each text."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from fastpeft.requirements import require
from fastpeft.training.preparing import Prepared

from .pattern import cut

if TYPE_CHECKING:
    from .worded import Worded


def with_demonstrations(prepared: Prepared, classifier: Worded, count: int, *, nearest: bool) -> list[dict[str, Any]]:
    """Prompts of the rows that are measured on, each behind examples of the drawn rows.

    Each text is cut to its share of data.max_length, and the first examples go where all are still too long. The
    nearest example is the last, next to the question.

    Args:
        count: of examples, at most.
        nearest: by the cosine of TF-IDF vectors of words; else drawn by the run's seed for each row.
    """
    assert prepared.evaluation is not None and prepared.config.data.max_length is not None
    shown = [prepared.rows.raw[number - 1] for number in prepared.rows.numbers]
    asked = [prepared.evaluation.raw[number - 1] for number in prepared.evaluation.numbers]
    answers = [classifier.words[label] for label in prepared.rows.rows["labels"]]
    pattern, tokenizer = classifier.pattern, prepared.tokenizer
    count = min(count, len(shown))
    room = classifier.room(prepared.config.data.max_length)
    spare = (room // (count + 1) - _own_tokens(classifier, tokenizer)) // (1 + pattern.pairs)

    def texts(row: dict[str, Any]) -> tuple[str, str]:
        return cut(row["source"], max(1, spare), tokenizer), cut(row["source_pair"] or "", max(1, spare), tokenizer)

    examples = [pattern.shown(*texts(row), answer) for row, answer in zip(shown, answers, strict=True)]
    order = _nearest(shown, asked, count) if nearest else _drawn(len(shown), len(asked), count, prepared)
    found = []
    for row, places in zip(asked, order, strict=True):
        question = pattern.fit(*texts(row), tokenizer, room)
        for first in range(len(places) + 1):
            text = "\n\n".join([*(examples[place] for place in places[first:]), question])
            if len((encoded := dict(tokenizer(text, verbose=False)))["input_ids"]) <= room:
                break
        found.append(encoded)
    return found


def _own_tokens(classifier: Worded, tokenizer: Any) -> int:
    """Of the pattern without its text, with an answer and what stands between examples."""
    longest = max(classifier.words, key=len)
    return len(tokenizer("\n\n" + classifier.pattern.shown("", "", longest), verbose=False)["input_ids"])


def _nearest(shown: list[Any], asked: list[Any], count: int) -> list[list[int]]:
    text = require("train", "sklearn.feature_extraction.text", "the nearest examples")
    vectors = text.TfidfVectorizer(token_pattern=r"(?u)\b\w+\b").fit([row["source"] for row in shown])
    alike = vectors.transform([r["source"] for r in asked]) @ vectors.transform([r["source"] for r in shown]).T
    return [row.argsort(kind="stable")[-count:].tolist() for row in alike.toarray()]


def _drawn(of: int, rows: int, count: int, prepared: Prepared) -> list[list[int]]:
    generator = random.Random(f"examples {prepared.config.training.seed}")
    return [generator.sample(range(of), count) for _ in range(rows)]
