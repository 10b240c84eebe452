"""General rows in a domain's: the share that was asked for; and rows held back."""

from __future__ import annotations

from dataclasses import replace

import datasets
import pytest

from fastpeft.data.encoding import Encoded
from fastpeft.data.mixing import held_back, mixed
from fastpeft.errors import UserError


def encoded(first: int, lengths: list[int]) -> Encoded:
    ids = [[first + number] * length for number, length in enumerate(lengths)]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
    raw = datasets.Dataset.from_dict({"text": [str(first + number) for number in range(len(lengths))]})
    were_cut, numbers = tuple(length > 9 for length in lengths), tuple(range(1, len(lengths) + 1))
    return Encoded(rows, 0, 0, sum(lengths), were_cut, raw, numbers)


DOMAIN, GENERAL = encoded(0, [8] * 40), encoded(1000, [4, 10] * 50)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_the_share_of_tokens_is_as_asked_to_within_a_row(share: float) -> None:
    mix = mixed(DOMAIN, GENERAL, share, seed=0)
    wanted = share / (1 - share) * DOMAIN.tokens
    general = [ids for ids in mix.encoded.rows["input_ids"] if ids[0] >= 1000]
    assert wanted <= sum(map(len, general)) == mix.general_tokens < wanted + 10
    assert len(general) == mix.general_rows == len({ids[0] for ids in general}) and not mix.fell_short
    assert mix.encoded.tokens == sum(map(len, mix.encoded.rows["input_ids"])) == DOMAIN.tokens + mix.general_tokens
    raw = mix.encoded.raw["text"][:]
    rows = zip(mix.encoded.numbers, mix.encoded.rows["input_ids"], strict=True)
    assert all(raw[number - 1] == str(ids[0]) for number, ids in rows)
    assert mix.share == pytest.approx(share, abs=10 / mix.encoded.tokens)


def test_all_of_the_domain_is_there_and_the_two_are_shuffled() -> None:
    mix = mixed(DOMAIN, GENERAL, 0.5, seed=0)
    firsts = [ids[0] for ids in mix.encoded.rows["input_ids"]]
    assert sorted(first for first in firsts if first < 1000) == list(range(40))
    assert any(first >= 1000 for first in firsts[:20]) and any(first < 1000 for first in firsts[-20:])
    lengths = [len(ids) for ids in mix.encoded.rows["input_ids"]]
    assert [length > 9 for length in lengths] == list(mix.encoded.were_cut)


def test_the_seed_draws() -> None:
    firsts = [
        [ids[0] for ids in mixed(DOMAIN, GENERAL, 0.2, seed=seed).encoded.rows["input_ids"]] for seed in (0, 0, 1)
    ]
    assert firsts[0] == firsts[1] != firsts[2]


def test_no_share_takes_nothing_and_too_little_text_is_told() -> None:
    assert mixed(DOMAIN, GENERAL, 0, seed=0).general_rows == 0
    mix = mixed(DOMAIN, encoded(1000, [4, 4]), 0.5, seed=0)
    assert (mix.general_rows, mix.general_tokens, mix.fell_short) == (2, 8, True)


def test_columns_that_only_one_has_are_left_out() -> None:
    rows = GENERAL.rows.add_column("attention_mask", [[1]] * len(GENERAL))
    mix = mixed(DOMAIN, replace(GENERAL, rows=rows), 0.2, seed=0)
    assert set(mix.encoded.rows.column_names) == {"input_ids", "labels"}


def test_whole_rows_are_held_back() -> None:
    rows = datasets.Dataset.from_dict({"text": [str(number) for number in range(20)]})
    kept, held = held_back(rows, True, 0.2, 0, "key")
    assert len(held) == 4 and sorted([*kept["text"], *held["text"]]) == sorted(rows["text"])
    with pytest.raises(UserError, match="key: expected at least one row on either side, got 1 in all"):
        held_back(rows.select([0]), False, 0.2, 0, "key")


def test_a_single_document_is_held_back_from_its_end() -> None:
    rows = datasets.Dataset.from_dict({"text": ["\n\n".join("abcdefghij")]})
    kept, held = held_back(rows, True, 0.2, 0, "key")
    assert (kept["text"][:], held["text"][:]) == (["\n\n".join("abcdefgh")], ["i\n\nj"])
    with pytest.raises(UserError, match="key: expected a document of at least two paragraphs"):
        held_back(datasets.Dataset.from_dict({"text": ["a"]}), True, 0.2, 0, "key")
