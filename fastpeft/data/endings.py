"""Which token ends an answer, as the encoded chats have it."""

from __future__ import annotations

from typing import Any

from .chat import IGNORED

ROWS = 50
"""Rows that are looked at."""


def learned_end(rows: Any, tokenizer: Any) -> tuple[int | None, int | None]:
    """(the special token that ends learned turns, the special token that comes after them but is not learned).

    Either is None where there is none. An answer ends with a token that templates put there and people do not type:
    `<|im_end|>`, `<|eot_id|>`, `</s>`. If it is learned, it is what generating must stop at; if the template does not
    mark it as the assistant's, the model never learns to stop.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    for row in rows.select(range(min(ROWS, len(rows)))):
        ids, labels = row["input_ids"], row["labels"]
        ends = [i for i in range(1, len(ids)) if labels[i - 1] != IGNORED and labels[i] == IGNORED]
        if not ends:
            ends = [len(ids)] if labels and labels[-1] != IGNORED else []
        for end in ends:
            learned = [token for token in ids[max(0, end - 3) : end] if token in special]
            after = ids[end] if end < len(ids) and ids[end] in special else None
            if learned or after is not None:
                return (learned[-1] if learned else None), (None if learned else after)
    return None, None
