"""Span corruption: what is taken out can be put back, and the same spans are drawn for the same rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft.errors import UserError
from fastpeft.training.spans import RepeatableSpans, corrupted, sentinels_of
from tests.checkpoints import T5_SENTINELS, characters, with_sentinels

END, SENTINELS = 1, list(range(1000, 1100))


def restored(read: list[int], learned: list[int]) -> list[int]:
    """The text: each sentinel of what the encoder reads, replaced by what the decoder learns behind the same one."""
    spans: dict[int, list[int]] = {}
    for token in learned[:-1]:
        if token in SENTINELS:
            last = spans.setdefault(token, [])
        else:
            last.append(token)
    return [token for one in read[:-1] for token in (spans[one] if one in SENTINELS else [one])]


@settings(max_examples=40)
@given(st.lists(st.integers(2, 999), min_size=2, max_size=150), st.integers(0, 2**32), st.integers(1, 100))
def test_spans_put_back_give_the_text(ids: list[int], seed: int, sentinels: int) -> None:
    read, learned = corrupted(ids, SENTINELS[:sentinels], END, np.random.default_rng(seed))
    assert read[-1] == learned[-1] == END and restored(read, learned) == ids
    used = [token for token in read if token in SENTINELS]
    assert used == SENTINELS[: len(used)] == [token for token in learned if token in SENTINELS]
    taken = len(learned) - len(used) - 1
    assert taken == min(max(round(len(ids) * 0.15), 1), len(ids) - 1)
    assert read[0] not in SENTINELS and len(read) <= len(ids) + 1


def test_spans_are_three_tokens_long_on_average() -> None:
    _, learned = corrupted(list(range(2, 802)), SENTINELS, END, np.random.default_rng(0))
    spans = sum(token in SENTINELS for token in learned)
    assert (len(learned) - 1 - spans, spans) == (120, 40)


def batch(collator: RepeatableSpans, *texts: str) -> dict[str, list[Any]]:
    tokenizer = with_sentinels(characters(ends=True))
    rows = [{"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in texts]
    return {name: values.tolist() for name, values in collator(rows).items()}


def collator(seed: int = 3, epoch: int = 0) -> RepeatableSpans:
    made = RepeatableSpans(with_sentinels(characters(ends=True)), seed, None)
    made.epoch = epoch
    return made


TEXTS = ("the sky is blue and the grass is green", "coal is black as the night is")


def test_rows_get_the_same_spans_whatever_is_beside_them_and_was_drawn_before() -> None:
    alone, state = batch(collator(), TEXTS[0])["labels"][0], torch.get_rng_state()
    both = batch(collator(), *TEXTS)["labels"][0]
    assert both[: len(alone)] == alone and set(both[len(alone) :]) <= {-100}
    assert torch.equal(torch.get_rng_state(), state)


def test_other_epochs_and_seeds_draw_others() -> None:
    found = [batch(made, *TEXTS)["labels"] for made in (collator(), collator(epoch=1), collator(seed=4))]
    assert found[0] != found[1] and found[0] != found[2] and found[1] != found[2]


def test_sentinels_in_their_order_and_a_tokenizer_without() -> None:
    tokenizer = with_sentinels(characters(ends=True))
    assert tokenizer.convert_ids_to_tokens(sentinels_of(tokenizer)) == list(T5_SENTINELS)
    with pytest.raises(UserError, match=r"model\.name: expected a tokenizer with sentinels \(<extra_id_0>, \.\.\.\)"):
        sentinels_of(characters(ends=True))
