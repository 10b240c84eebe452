"""Which token ends an answer, as the encoded chats have it."""

from __future__ import annotations

from typing import Any, NamedTuple

from .chat import IGNORED

ROWS = 50
"""Rows with an end that are looked at."""


class End(NamedTuple):
    """How learned turns end.

    Attributes:
        learned: the special token that ends them; None if none does.
        unlearned: the special token that comes after them but is not learned; None if there is none.
        cut: whether no end is there to be seen, because all rows were cut before it.
    """

    learned: int | None = None
    unlearned: int | None = None
    cut: bool = False


def learned_end(rows: Any, tokenizer: Any, max_length: int) -> End:
    """How the answers of encoded chats end.

    An answer ends with a token that templates put there and people do not type: `<|im_end|>`, `<|eot_id|>`, `</s>`. If
    it is learned, it is what generating must stop at; if the template does not mark it as the assistant's, the model
    never learns to stop. A row of max_length tokens may have been cut within its last answer.
    """
    seen = 0
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        ends = [i for i in range(1, len(ids)) if labels[i - 1] != IGNORED and labels[i] == IGNORED]
        if not ends and len(ids) < max_length:
            ends = [len(ids)] if labels and labels[-1] != IGNORED else []
        for end in ends:
            learned = [token for token in ids[max(0, end - 3) : end] if token in special]
            after = ids[end] if end < len(ids) and ids[end] in special else None
            if learned or after is not None:
                return End(learned[-1]) if learned else End(unlearned=after)
        seen += bool(ends)
        if seen == ROWS:
            break
    return End(cut=not seen)
