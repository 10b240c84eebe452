"""Which tokens of an encoded row are the answer that is generated anew."""

from __future__ import annotations

import pytest

from fastpeft.training.evaluating import exchange

LEFT = -100


@pytest.mark.parametrize(
    ("labels", "prompt", "answer"),
    [
        ([LEFT, LEFT, 3, 4], [1, 2], [3, 4]),
        ([LEFT, 2, LEFT, 4], [1, 2, 3], [4]),  # a chat's last turn
        ([LEFT, 2, 3, LEFT], [1], [2, 3]),  # what a template writes behind it
    ],
)
def test_the_last_answer_and_what_comes_before(labels: list[int], prompt: list[int], answer: list[int]) -> None:
    assert exchange({"input_ids": [1, 2, 3, 4], "labels": labels}, "causal-lm") == (prompt, answer)


def test_a_text_has_none() -> None:
    assert exchange({"input_ids": [1, 2], "labels": [1, 2]}, "causal-lm") is None


def test_an_encoder_decoder_has_both_apart() -> None:
    assert exchange({"input_ids": [1, 2], "labels": [7, 8]}, "seq2seq-lm") == ([1, 2], [7, 8])
