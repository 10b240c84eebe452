"""How good tags of words are: entities as CoNLL counts them, and single words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fastpeft.data.chat import IGNORED
from fastpeft.data.encoded import Encoded
from fastpeft.metrics.findings import Findings, Metric

from .counts import by_class, f1_mean, f1_micro, precision, recall
from .intervals import over_rows

Spans = set[tuple[str, int, int]]
Tags = list[list[str]]
"""Of each row, of each word."""
AGAINST = "each word's most frequent tag in the training rows"


def is_iob2(labels: Iterable[str]) -> bool:
    """Whether the tags are those of entities: all O, B-something or I-something."""
    return all(label == "O" or label.startswith(("B-", "I-")) for label in labels)


def spans(tags: Sequence[str]) -> Spans:
    """(type, first word, the one behind the last) of each entity in tags of IOB2.

    One begins with B- and goes on with I- of the same type. An I- that follows neither belongs to none: what seqeval
    counts in its strict mode.
    """
    found: Spans = set()
    begun: tuple[str, int] | None = None
    for place, tag in enumerate([*tags, "O"]):
        if begun is not None and tag != f"I-{begun[0]}":
            found.add((*begun, place))
            begun = None
        if tag.startswith("B-"):
            begun = tag[2:], place
    return found


def token_metrics(labels: Sequence[str]) -> Callable[[Any], dict[str, float]]:
    """For a trainer whose predictions are the likeliest labels, (rows, tokens), -100 behind a row's end.

    Accuracy of the labelled tokens; with tags of IOB2 precision, recall and F1 of entities too.
    """

    def metrics(prediction: Any) -> dict[str, float]:
        import numpy as np

        true, guessed = np.asarray(prediction.label_ids), np.asarray(prediction.predictions)
        learned = true != IGNORED
        found = {"accuracy": float((true == guessed)[learned].mean())}
        if is_iob2(labels):
            rows = zip(true, guessed, learned, strict=True)
            pairs = [([labels[n] for n in t[k]], [labels[n] for n in g[k]]) for t, g, k in rows]
            counts = [_overlap(spans(these), spans(those)) for these, those in pairs]
            found |= {"precision": precision(counts), "recall": recall(counts), "f1": f1_micro(counts)}
        return found

    return metrics


def measure(predictions: Any, training: Encoded, evaluation: Encoded, labels: Sequence[str]) -> Findings:
    """Figures over the evaluation's rows; a word that was cut off counts as not found.

    Args:
        predictions: the likeliest labels, (rows, tokens).
        training, evaluation: from data.tagged.
        labels: names, in the order of their numbers.
    """
    true, guessed = true_tags(evaluation), guessed_tags(predictions, evaluation, labels)
    usual = usual_tags(training, evaluation)
    metrics = [_metric("accuracy of the words", accuracy, right_words(true, guessed), right_words(true, usual))]
    found, base = (counts(true, other, labels) for other in (guessed, usual))
    if not is_iob2(labels):
        metrics.append(_metric("F1, mean of the tags", f1_mean, found, base))
        return Findings(tuple(metrics), _collapsed(guessed), (by_class("By tag", labels, found),))
    for name, of in (("F1", f1_micro), ("precision", precision), ("recall", recall)):
        metrics.append(_metric(f"{name} of the entities", of, found.sum(axis=1), base.sum(axis=1)))
    notes = (*_collapsed(guessed), *_not_iob2(true))
    return Findings(tuple(metrics), notes, (by_class("By type of entity", _kinds(labels), found),))


def _metric(name: str, of: Callable[..., float], rows: Any, base: Any) -> Metric:
    return Metric(name, *over_rows(of, rows), len(rows), of(base), AGAINST)


def _words_and_tags(encoded: Encoded) -> tuple[list[list[str]], Tags]:
    rows = encoded.raw.select([number - 1 for number in encoded.numbers])
    return rows["tokens"][:], [[str(tag) for tag in tags] for tags in rows["tags"]]


def true_tags(encoded: Encoded) -> Tags:
    """Of each row's words."""
    return _words_and_tags(encoded)[1]


def guessed_tags(predictions: Any, encoded: Encoded, labels: Sequence[str]) -> Tags:
    """Of each row's words, "" for those that were cut off. Arguments as measure's."""
    return [
        [labels[row[place]] if place >= 0 else "" for place in theirs]
        for row, theirs in zip(predictions, encoded.rows["places"], strict=True)
    ]


def usual_tags(training: Encoded, encoded: Encoded) -> Tags:
    """For each word of `encoded` its most frequent tag in training; for a word that is not there, that of all words."""
    usual = _by_word(training)
    return [[usual.get(word, usual[""]) for word in row] for row in _words_and_tags(encoded)[0]]


def counts(true: Tags, guessed: Tags, labels: Sequence[str]) -> Any:
    """(rows, types of entities, 3), for tags that are not IOB2 (rows, tags, 3); see metrics.counts."""
    if is_iob2(labels):
        return _counts_of_spans(true, guessed, _kinds(labels))
    return _counts_of_tags(true, guessed, labels)


def _kinds(labels: Sequence[str]) -> list[str]:
    return sorted({label[2:] for label in labels if label != "O"})


def _by_word(training: Encoded) -> dict[str, str]:
    """The most frequent tag of each word, and under "" that of all words."""
    found: dict[str, Counter[str]] = {"": Counter()}
    for words, tags in zip(*_words_and_tags(training), strict=True):
        for word, tag in zip(words, tags, strict=True):
            found.setdefault(word, Counter())[tag] += 1
            found[""][tag] += bool(word)
    return {word: tags.most_common(1)[0][0] for word, tags in found.items()}


def right_words(true: Tags, guessed: Tags) -> Any:
    """(rows, 2): how many words are right, and how many there are."""
    import numpy as np

    return np.asarray([[sum(map(str.__eq__, t, g)), len(t)] for t, g in zip(true, guessed, strict=True)])


def accuracy(words: Any) -> float:
    """Share of the words that are right; `words` are of `right_words`."""
    right, every = words.sum(axis=0)
    return float(right / every)


def _overlap(true: Spans, guessed: Spans) -> tuple[int, int, int]:
    return len(true & guessed), len(guessed), len(true)


def _counts_of_spans(true: Tags, guessed: Tags, kinds: list[str]) -> Any:
    """(rows, types, 3)."""
    import numpy as np

    def of_row(these: Spans, those: Spans) -> list[tuple[int, int, int]]:
        return [_overlap({s for s in these if s[0] == kind}, {s for s in those if s[0] == kind}) for kind in kinds]

    return np.asarray([of_row(spans(t), spans(g)) for t, g in zip(true, guessed, strict=True)])


def _counts_of_tags(true: Tags, guessed: Tags, labels: Sequence[str]) -> Any:
    """(rows, tags, 3)."""
    import numpy as np

    def of_row(these: list[str], those: list[str]) -> list[tuple[int, int, int]]:
        right = Counter(a for a, b in zip(these, those, strict=True) if a == b)
        given, wanted = Counter(those), Counter(these)
        return [(right[label], given[label], wanted[label]) for label in labels]

    return np.asarray([of_row(t, g) for t, g in zip(true, guessed, strict=True)])


def _collapsed(guessed: Tags) -> tuple[str, ...]:
    found = {tag for row in guessed for tag in row if tag}
    if len(found) > 1:
        return ()
    return (
        f"the model predicts {min(found, default='')!r} for every word of the evaluation: it has learned nothing; "
        "another training.learning_rate, more steps, or other lora.target_modules may help",
    )


def _not_iob2(true: Tags) -> tuple[str, ...]:
    inside = sum(tag.startswith("I-") for row in true for tag in row)
    counted = sum(end - start - 1 for row in true for _, start, end in spans(row))
    if inside == counted:
        return ()
    return (
        f"{inside - counted} words of the evaluation have an I- tag that goes on from none of its type, and are of no "
        "entity: tags are read as IOB2, where each entity begins with B-",
    )
