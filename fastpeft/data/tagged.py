"""Words with a tag each, to token ids and labels."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from fastpeft.config import DataSection
from fastpeft.errors import UserError

from .chat import IGNORED
from .columns import Row, class_of, list_of


def tagged_words(tokenizer: Any, data: DataSection) -> Callable[[Row, str], Row]:
    """Encodes `tokens` (list of words) and `tags` (a name each).

    The words are joined by spaces, as a tokenizer would meet them in a text. The first token of a word has its label;
    its others are IGNORED, or have it too with `data.label_all_pieces`. A row has `places` too: the position of each
    word's first token, -1 for a word that was cut off or has no token.
    """
    if not tokenizer.is_fast:
        raise UserError(f"model.name: expected a fast tokenizer, got {type(tokenizer).__name__}")
    numbers = {name: number for number, name in enumerate(data.labels or ())}
    # Further tokens of a word that begins an entity are inside it.
    further = {n: numbers.get(f"I-{name[2:]}", n) if name.startswith("B-") else n for name, n in numbers.items()}

    def encode_words(row: Row, where: str) -> Row:
        words = list_of(row["tokens"], "tokens", str, "words", where)
        tags = row["tags"]
        if not isinstance(tags, list) or len(tags) != len(words):
            got = len(tags) if isinstance(tags, list) else repr(tags)
            raise UserError(f"{where}, column tags: expected as many as tokens, {len(words)}, got {got}")
        classes = [class_of(tag, numbers, "tags", where) for tag in tags]
        encoded, places, cut = placed(tokenizer, words, data.max_length)
        labels = [IGNORED] * len(encoded["input_ids"])
        first = [-1] * len(words)
        for position, word in enumerate(places):
            if word is not None:
                begins = first[word] < 0
                first[word] = position if begins else first[word]
                if begins or data.label_all_pieces:
                    labels[position] = classes[word] if begins else further[classes[word]]
        return encoded | {"labels": labels, "places": first, "cut": cut}

    return encode_words


def placed(tokenizer: Any, words: list[str], max_length: int | None) -> tuple[Row, list[int | None], bool]:
    """(what the model reads, the number of each token's word or None, whether words were cut off)."""
    ends = [*accumulate(len(word) + 1 for word in words)]
    text = " ".join(words)
    options = {"return_offsets_mapping": True, "return_special_tokens_mask": True, "verbose": False}
    encoded = dict(tokenizer(text, **options))
    cut = max_length is not None and len(encoded["input_ids"]) > max_length
    if cut:
        encoded = dict(tokenizer(text, truncation=True, max_length=max_length, **options))
    spans, special = encoded.pop("offset_mapping"), encoded.pop("special_tokens_mask")
    places: list[int | None] = []
    word = 0
    for (start, end), is_special in zip(spans, special, strict=True):
        start += len(text[start:end]) - len(text[start:end].lstrip())  # the space before a word may belong to its token
        if is_special or start >= end:
            places.append(None)
            continue
        while start >= ends[word]:
            word += 1
        places.append(word)
    return {name: list(values) for name, values in encoded.items()}, places, cut
