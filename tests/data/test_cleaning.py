"""Duplicates and overlaps that were planted are found, and nothing else."""

from __future__ import annotations

import random
import shlex
from collections.abc import Callable

import datasets
import pytest

from fastpeft.data import cleaning
from fastpeft.data.cleaning import overlaps, paragraphs, repeats, without
from fastpeft.errors import UserError

WORDS = shlex.split("river stone grey old walks slowly under seven lamps and bright rain falls")


def sentence(number: int, words: int = 40) -> str:
    """Of drawn words; two numbers give texts that share hardly any five in a row."""
    draw = random.Random(number)
    return " ".join(draw.choice(WORDS) for _ in range(words))


def rows(*texts: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": list(texts)})


def found(seen: Callable[[str], bool], *texts: str) -> list[bool]:
    return [seen(text) for text in texts]


DIFFERENT = [sentence(number) for number in range(30)]


class TestExact:
    def test_the_same_words_are_found_whatever_their_case_and_punctuation(self) -> None:
        seen = repeats("exact", 0.8, "key")
        assert found(seen, "Call me Ishmael.", "call me,\n ISHMAEL", "Call me.") == [False, True, False]

    def test_nothing_else_is(self) -> None:
        assert not any(found(repeats("exact", 0.8, "key"), *DIFFERENT, *(text + " too" for text in DIFFERENT)))


class TestNear:
    def test_texts_with_a_word_changed_are_found_and_different_ones_are_not(self) -> None:
        seen = repeats("near", 0.7, "key")
        assert not any(found(seen, *DIFFERENT))
        changed = [" ".join([*text.split()[:38], "changed", text.split()[39]]) for text in DIFFERENT]
        assert sum(found(seen, *changed)) >= 28  # what MinHash estimates may be a little low

    def test_half_of_a_text_is_another_text(self) -> None:
        seen = repeats("near", 0.8, "key")
        assert not any(found(seen, DIFFERENT[0], " ".join([*DIFFERENT[0].split()[:20], sentence(99, 20)])))

    def test_texts_shorter_than_a_shingle_are_compared_word_by_word(self) -> None:
        assert found(repeats("near", 0.8, "key"), "a b", "a c", "A b.") == [False, False, True]

    def test_memory_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cleaning, "MOST_NEAR", 3)
        seen = repeats("near", 0.8, "strategy.options.deduplicate")
        found(seen, *DIFFERENT[:3], DIFFERENT[0])
        with pytest.raises(UserError, match=r"strategy\.options\.deduplicate: expected at most 3 texts"):
            seen(DIFFERENT[3])


class TestOverlaps:
    def test_thirteen_words_in_a_row_are_one_and_twelve_are_not(self) -> None:
        overlap = overlaps(["zero " + sentence(0)])
        words = sentence(0).split()
        assert overlap(f"before {' '.join(words[5:18])} after")
        assert not overlap(f"before {' '.join(words[5:17])} after")

    def test_short_texts_overlap_with_the_same_text_alone(self) -> None:
        overlap = overlaps(["The sky is blue."])
        assert overlap("the sky is blue") and not overlap("the sky is") and not overlap("the sky is blue today")

    def test_different_texts_do_not(self) -> None:
        overlap = overlaps(DIFFERENT[:15])
        assert not any(map(overlap, DIFFERENT[15:]))


class TestWithout:
    def test_rows_that_repeat_go(self) -> None:
        left, removed = without(rows("a b", "c d", "A b!", "e"), False, repeats("exact", 0.8, "key"))
        assert left["text"][:] == ["a b", "c d", "e"] and removed == (1, 4)

    def test_documents_lose_paragraphs_but_no_short_ones(self) -> None:
        long, other = sentence(1), sentence(2)
        first, second = f"Chapter I\n\n{long}\n\nYes.", f"Chapter I\n \n\n{long}\n\nYes.\n\n{other}"
        left, removed = without(rows(first, second, long), True, repeats("exact", 0.8, "key"))
        assert left["text"][:] == [first, f"Chapter I\n\nYes.\n\n{other}"]
        assert removed == (2, 8)

    def test_what_stays_is_not_touched(self) -> None:
        text = "a\n\n \n\nb\r\n"
        assert without(rows(text, ""), True, lambda unit: False)[0]["text"][:] == [text, ""]

    def test_other_columns_and_rows_without_text(self) -> None:
        given = datasets.Dataset.from_dict({"text": ["a", None, "a"], "label": [1, 2, 3]})
        left, _ = without(given, False, repeats("exact", 0.8, "key"))
        assert left.column_names == ["text"] and left["text"][:] == ["a", None]


def test_paragraphs_stand_between_blank_lines() -> None:
    assert paragraphs("a\nb\n\nc\n \t\nd") == ["a\nb", "c", "d"]
