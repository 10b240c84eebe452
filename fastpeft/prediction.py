"""What models with a head of their own make of texts: classes, numbers, tags of words, parts of a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastpeft.config import DataSection
from fastpeft.data.questions import read_in_windows
from fastpeft.data.tagged import placed
from fastpeft.models.bases import positions

LONGEST = 10**9
WINDOW = 512
"""Tokens of a window over a context, where nothing says how many the model can take."""


def classify(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    pairs: Sequence[str | None],
    batch_size: int,
    max_length: int | None,
) -> Iterator[list[tuple[str, float]]]:
    """Each text's classes with their probabilities, the likeliest first.

    A model that learned several classes a text has a probability for each by itself; one that learned numbers has one
    class, and in place of its probability the number.

    Args:
        pairs: second texts, where there are any.
        max_length: in tokens; what is longer is cut, as in training. What the model can take when None.
    """
    most = _length(model, tokenizer, max_length)
    cut: dict[str, Any] = {} if most is None else {"truncation": True, "max_length": most}
    problem = getattr(model.config, "problem_type", None)
    for part in _parts(len(texts), batch_size):
        rows = [tokenizer(text, pair, **cut) for text, pair in zip(texts[part], pairs[part], strict=True)]
        logits = _outputs(model, tokenizer, rows).logits.float()
        if problem == "multi_label_classification":
            logits = logits.sigmoid()
        elif problem != "regression":
            logits = logits.softmax(dim=-1)
        for row in logits:
            order = row.argsort(descending=True).tolist()
            yield [(model.config.id2label[number], row[number].item()) for number in order]


def tag(
    model: Any, tokenizer: Any, sentences: Sequence[Sequence[str]], batch_size: int, max_length: int | None
) -> Iterator[list[str | None]]:
    """The tag of each word, by its first token; None for a word that was cut off or has no token."""
    most = _length(model, tokenizer, max_length)
    for part in _parts(len(sentences), batch_size):
        encoded = [placed(tokenizer, list(words), most) for words in sentences[part]]
        logits = _outputs(model, tokenizer, [row for row, _, _ in encoded]).logits
        likeliest = logits.argmax(dim=-1).tolist()
        for words, guessed, (_, places, _) in zip(sentences[part], likeliest, encoded, strict=True):
            tags: list[str | None] = [None] * len(words)
            for position, word in reversed([*enumerate(places)]):
                if word is not None:
                    tags[word] = model.config.id2label[guessed[position]]
            yield tags


def answer(
    model: Any,
    tokenizer: Any,
    asked: Sequence[tuple[str, str]],
    batch_size: int,
    max_length: int | None,
    where: Sequence[str],
) -> Iterator[str]:
    """The likeliest part of a context for each question; empty where "no answer" is likelier than each.

    Args:
        asked: (question, context).
        batch_size: windows over contexts that are read at once.
        where: how to call each in messages.
    """
    from fastpeft.metrics.answers import LONGEST as WORDS
    from fastpeft.metrics.answers import answers_from

    data = DataSection(max_length=_length(model, tokenizer, max_length) or WINDOW)
    for (question, context), called in zip(asked, where, strict=True):
        rows = read_in_windows(tokenizer, question.strip(), context, data, called)
        scores: tuple[list[Any], list[Any]] = ([], [])
        for part in _parts(len(rows), batch_size):
            inputs = [{n: row[n] for n in row if n not in ("offsets", "null_position")} for row in rows[part]]
            found = _outputs(model, tokenizer, inputs)
            scores[0].extend(found.start_logits.float().cpu().numpy())
            scores[1].extend(found.end_logits.float().cpu().numpy())
        columns = {name: [row[name] for row in rows] for name in ("offsets", "null_position")}
        yield answers_from(scores, columns, [context], [range(len(rows))], WORDS, nothing=True)[0]


def _length(model: Any, tokenizer: Any, max_length: int | None) -> int | None:
    most = min((n for n in (max_length, positions(model.config)) if n is not None), default=tokenizer.model_max_length)
    most = min(most, tokenizer.model_max_length)
    return None if most > LONGEST else most  # how tokenizers say that they do not know


def _parts(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _outputs(model: Any, tokenizer: Any, rows: list[Any]) -> Any:
    import torch

    with torch.no_grad():
        return model(**tokenizer.pad(rows, return_tensors="pt").to(model.device))
