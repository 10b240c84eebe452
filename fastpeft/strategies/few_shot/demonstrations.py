"""Examples in the prompt, in place of training: drawn at random, or the nearest to each text."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from fastpeft.requirements import require
from fastpeft.training.preparing import Prepared

if TYPE_CHECKING:
    from .worded import Worded


def with_demonstrations(prepared: Prepared, classifier: Worded, count: int, *, nearest: bool) -> list[dict[str, Any]]:
    """Prompts of the rows that are measured on, each behind examples of the drawn rows.

    Each text is cut to its share of data.max_length. The nearest example is the last, next to the question.

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
    share = prepared.config.data.max_length // (count + 1)

    def cut(text: str) -> str:
        ends = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        spare = max(1, share - _own_tokens(classifier, tokenizer))
        return text if len(ends) <= spare else text[: ends[spare - 1][1]]

    examples = [pattern.shown(cut(r["source"]), r["source_pair"], a) for r, a in zip(shown, answers, strict=True)]
    order = _nearest(shown, asked, count) if nearest else _drawn(len(shown), len(asked), count, prepared)
    found = []
    for row, places in zip(asked, order, strict=True):
        question = pattern.prompt(cut(row["source"]), row["source_pair"], tokenizer)
        text = "\n\n".join([*(examples[place] for place in places), question])
        found.append(dict(tokenizer(text, verbose=False)))
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
