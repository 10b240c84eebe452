"""How generated texts are held against references."""

from __future__ import annotations

import pytest

from fastpeft.metrics.generated import chrf, chrf_counts, exact, word_f1


def corpus_chrf(*pairs: tuple[str, str]) -> float:
    return chrf([chrf_counts(guessed, true) for guessed, true in pairs])


def test_white_space_alone_is_no_mistake() -> None:
    assert exact("a  b\n", "a b") == 1
    assert exact("A b", "a b") == 0


def test_words_count_as_often_as_both_have_them() -> None:
    assert word_f1("the the cat", "The cat sat down") == pytest.approx(2 * 2 / 7)
    assert word_f1("dog", "cat") == 0
    assert word_f1("", "cat") == 0
    assert word_f1("", "") == 1


def test_chrf_of_one_pair_by_hand() -> None:
    # "abc" for "abd": 2 of 3 characters, 1 of 2 pairs, 0 of 1 triple on either side; longer runs are nowhere
    assert corpus_chrf(("abc", "abd")) == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)
    assert corpus_chrf(("a b c", "abc")) == pytest.approx(100)
    assert corpus_chrf(("", "abc")) == 0


def test_chrf_of_all_texts_together_is_sacrebleus() -> None:
    pairs = [("the cat sat on the mat", "the cat is on a mat"), ("a big house", "the large house")]
    assert corpus_chrf(*pairs) == pytest.approx(SACREBLEU, abs=1e-9)


SACREBLEU = 34.00850970645632
"""CHRF().corpus_score of sacrebleu 2.6.0."""
