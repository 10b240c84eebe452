"""Rows to token ids and labels: what is learned, what is cut, what is left out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from fastpeft.config import DataSection
from fastpeft.data.chat import IGNORED, set_template
from fastpeft.data.encoding import Encoded, encode
from fastpeft.data.kinds import CHAT, COMPLETION, LABELLED, TEXT, Kind
from fastpeft.errors import UserError
from tests.checkpoints import characters, wordpieces

END = 1  # </s> of characters()
OPEN = (
    "{% for m in messages %}{{ m.content if m.role == 'user' else '=' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)
"""An answer is between = and </s>."""


def encoded(
    kind: Kind, task: str, tokenizer: Any, *rows: dict[str, Any], document: bool = False, **settings: Any
) -> Encoded:
    data = DataSection(**{"max_length": 32, **settings})
    return encode(datasets.Dataset.from_list(list(rows)), kind, task, tokenizer, data, document=document)


def words(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode([token for token in ids if token != IGNORED]))


class TestText:
    def test_a_text_and_its_end(self) -> None:
        tokenizer = characters()
        found = encoded(TEXT, "causal-lm", tokenizer, {"text": "  in a box", "other": 1})
        [row] = found.rows
        assert row == {"input_ids": row["input_ids"], "labels": row["input_ids"]}
        assert words(tokenizer, row["input_ids"]) == "  in a box</s>"
        assert (found.cut, found.dropped, found.tokens) == (0, 0, len(row["input_ids"]))

    def test_a_tokenizer_that_adds_the_end_itself(self) -> None:
        [row] = encoded(TEXT, "causal-lm", characters(ends=True), {"text": "abc"}).rows
        assert row["input_ids"].count(END) == 1 and row["input_ids"][-1] == END

    def test_longer_rows_are_cut_and_counted(self) -> None:
        found = encoded(TEXT, "causal-lm", characters(), {"text": "b" * 31}, {"text": "c" * 32}, {"text": "d" * 90})
        assert [len(ids) for ids in found.rows["input_ids"]] == [32, 32, 32]
        assert (found.cut, found.dropped, found.tokens) == (2, 0, 96)


class TestDocuments:
    @pytest.mark.parametrize("length", [2, 7, 31, 32, 62, 63, 64, 500])
    def test_they_are_divided_and_nothing_that_can_be_learned_is_lost(self, length: int) -> None:
        tokenizer, text = characters(), "bcdfg" * 25
        whole = [*tokenizer(text)["input_ids"], END]
        found = encoded(TEXT, "causal-lm", tokenizer, {"text": text}, document=True, max_length=length)
        blocks = found.rows["input_ids"][:]
        together = [token for block in blocks for token in block]
        assert together == (whole if len(whole) % length != 1 else whole[:-1])  # one alone has nothing before it
        assert all(len(block) == length for block in blocks[:-1]) and 2 <= len(blocks[-1]) <= length
        assert found.rows["labels"][:] == blocks and (found.cut, found.tokens) == (0, len(together))

    def test_several(self) -> None:
        tokenizer = characters()
        found = encoded(TEXT, "causal-lm", tokenizer, {"text": "bbbb"}, {"text": "cc"}, document=True, max_length=3)
        assert [words(tokenizer, ids) for ids in found.rows["input_ids"]] == ["bbb", "b</s>", "cc</s>"]

    def test_for_a_masked_model_each_block_has_special_tokens(self) -> None:
        tokenizer = wordpieces()
        found = encoded(TEXT, "masked-lm", tokenizer, {"text": "abcdefg " * 9}, document=True, max_length=16)
        rows = found.rows.to_list()
        assert {tuple(row) for row in rows} == {("input_ids", "attention_mask")}
        assert all((row["input_ids"][0], row["input_ids"][-1]) == (2, 3) for row in rows)
        inner = [token for row in rows for token in row["input_ids"][1:-1]]
        assert inner == tokenizer("abcdefg " * 9, add_special_tokens=False)["input_ids"]


class TestCompletion:
    @pytest.mark.parametrize("trim_offsets", [False, True])
    @pytest.mark.parametrize(
        ("prompt", "completion", "learned"),
        [
            ("Two and two?", " Four.", " Four.</s>"),
            ("def f():\n", "    return 1\n\n", "    return 1\n\n</s>"),
            ("Q ", "b", "b</s>"),
            ("s", "ing", "ing</s>"),
            ("si", "ng", "ing</s>"),  # one token holds both: it is learned
            ("Q:", " é😀", " é😀</s>"),
        ],
    )
    def test_the_completion_is_learned(self, prompt: str, completion: str, learned: str, trim_offsets: bool) -> None:
        tokenizer = characters(trim_offsets=trim_offsets)
        [found] = encoded(COMPLETION, "causal-lm", tokenizer, {"prompt": prompt, "completion": completion}).rows
        assert words(tokenizer, found["input_ids"]) == f"{prompt}{completion}</s>"
        assert words(tokenizer, found["labels"]) == learned
        assert all(label in (IGNORED, token) for label, token in zip(found["labels"], found["input_ids"], strict=True))

    def test_a_tokenizer_that_adds_the_end_itself(self) -> None:
        tokenizer = characters(ends=True)
        [row] = encoded(COMPLETION, "causal-lm", tokenizer, {"prompt": "bb", "completion": "c"}).rows
        assert (words(tokenizer, row["input_ids"]), words(tokenizer, row["labels"])) == ("bbc</s>", "c</s>")

    @pytest.mark.parametrize("prompt", ["b", "<s>b"])
    @pytest.mark.parametrize("completion", ["c", "c</s>", "c</s>\n"])
    def test_no_start_and_no_end_comes_twice(self, prompt: str, completion: str) -> None:
        tokenizer = characters(begins=True)
        [row] = encoded(COMPLETION, "causal-lm", tokenizer, {"prompt": prompt, "completion": completion}).rows
        assert (words(tokenizer, row["input_ids"]), words(tokenizer, row["labels"])) == ("<s>bc</s>", "c</s>")
        [text] = encoded(TEXT, "causal-lm", tokenizer, {"text": prompt + completion}).rows
        assert text["input_ids"] == row["input_ids"]

    def test_tools_reach_the_template_of_chats(self) -> None:
        tokenizer = characters()
        tokenizer.chat_template = "{{ tools[0].name if tools else '' }}>" + OPEN
        chat = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
        row = {"prompt": chat[:1], "completion": chat[1:], "tools": [{"name": "add"}]}
        [found] = encoded(COMPLETION, "causal-lm", tokenizer, row).rows
        assert (words(tokenizer, found["input_ids"]), words(tokenizer, found["labels"])) == ("add>b=c</s>", "c</s>")

    def test_of_chats(self) -> None:
        tokenizer = characters()
        set_template(tokenizer, "plain")
        asked = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
        row = {"prompt": [*asked, asked[0]], "completion": [{"role": "assistant", "content": "d"}]}
        [found] = encoded(COMPLETION, "causal-lm", tokenizer, row, max_length=500).rows
        assert words(tokenizer, found["labels"]) == "d</s>"  # the assistant's turn of the prompt is not learned
        assert words(tokenizer, found["input_ids"]).endswith("### User:\nb\n\n### Assistant:\nd</s>\n\n")

    def test_a_prompt_of_messages_needs_a_completion_of_messages(self) -> None:
        row = {"prompt": [{"role": "user", "content": "b"}], "completion": "c"}
        with pytest.raises(UserError, match=r"^data: row 1, column prompt: expected text, got .* \(list\)$"):
            encoded(COMPLETION, "causal-lm", characters(), row)

    def test_rows_that_have_nothing_left_to_learn_are_left_out_and_counted(self) -> None:
        rows = [{"prompt": "b" * length, "completion": "c"} for length in (5, 30, 31, 32, 50)]
        found = encoded(COMPLETION, "causal-lm", characters(), *rows)
        assert [len(ids) for ids in found.rows["input_ids"]] == [7, 32, 32]
        assert (found.cut, found.dropped) == (3, 2)

    @pytest.mark.parametrize(("prompt", "completion", "empty"), [("", "c", "prompt"), ("b", "  ", "completion")])
    def test_neither_is_empty(self, prompt: str, completion: str, empty: str) -> None:
        with pytest.raises(UserError, match=f"^data: row 1, column {empty}: expected text, got an empty one$"):
            encoded(COMPLETION, "causal-lm", characters(), {"prompt": prompt, "completion": completion})


def test_chats_are_cut_at_the_end() -> None:
    tokenizer = characters()
    tokenizer.chat_template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    rows = [{"messages": [{"role": "assistant", "content": "b" * length}]} for length in (10, 40)]
    found = encoded(CHAT, "causal-lm", tokenizer, *rows)
    assert [words(tokenizer, labels) for labels in found.rows["labels"]] == ["b" * 10, "b" * 32]
    assert (found.cut, found.dropped) == (1, 0)


class TestClasses:
    def test_text_and_number_of_the_class(self) -> None:
        tokenizer = wordpieces()
        rows = [{"text": "a b", "label": "no"}, {"text": "c", "label": "yes"}]
        found = encoded(LABELLED, "sequence-classification", tokenizer, *rows, labels=["yes", "no"])
        assert found.rows["labels"][:] == [1, 0]
        assert [tokenizer.decode(ids) for ids in found.rows["input_ids"]] == ["[CLS] a b [SEP]", "[CLS] c [SEP]"]
        assert set(found.rows.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels"}

    def test_pairs(self) -> None:
        rows = [{"text": "a", "text_pair": "b", "label": 0}, {"text": "c", "text_pair": None, "label": 1}]
        found = encoded(LABELLED, "sequence-classification", wordpieces(), *rows, labels=["0", "1"])
        assert found.rows["input_ids"][:] == [[2, 5, 3, 6, 3], [2, 7, 3]]
        assert found.rows["token_type_ids"][:] == [[0, 0, 0, 1, 1], [0, 0, 0]]

    def test_a_longer_text_keeps_its_last_special_token(self) -> None:
        rows = [{"text": "a" * 50, "text_pair": pair, "label": 0} for pair in (None, "b" * 50)]
        found = encoded(LABELLED, "sequence-classification", wordpieces(), *rows, labels=["0", "1"], max_length=12)
        assert [(len(ids), ids[-1]) for ids in found.rows["input_ids"]] == [(12, 3), (12, 3)]
        assert found.rows["token_type_ids"][1].count(1) == 6 and found.cut == 2


class TestSourceAndTarget:
    def test_both_end(self) -> None:
        tokenizer = characters(ends=True)
        found = encoded(COMPLETION, "seq2seq-lm", tokenizer, {"prompt": "bb", "completion": "c"})
        [row] = found.rows
        assert (words(tokenizer, row["input_ids"]), words(tokenizer, row["labels"])) == ("bb</s>", "c</s>")
        assert row["attention_mask"] == [1, 1, 1] and found.tokens == 3

    @pytest.mark.parametrize(("prompt", "completion", "cut"), [("b" * 40, "c", 1), ("b", "c" * 40, 1), ("b", "c", 0)])
    def test_each_is_cut(self, prompt: str, completion: str, cut: int) -> None:
        tokenizer = characters(ends=True)
        row = {"prompt": prompt, "completion": completion}
        found = encoded(COMPLETION, "seq2seq-lm", tokenizer, row, max_length=8)
        [row] = found.rows
        assert len(row["input_ids"]) <= 8 and len(row["labels"]) <= 8 and found.cut == cut
        assert row["input_ids"][-1] == row["labels"][-1] == END


def test_masked_rows_without_a_known_word_are_left_out() -> None:
    found = encoded(TEXT, "masked-lm", wordpieces(), {"text": "☃ ☃"}, {"text": "a ☃"})
    assert (len(found), found.dropped) == (1, 1)
    assert found.rows.column_names == ["input_ids", "token_type_ids", "attention_mask"]


@pytest.mark.parametrize(("count", "told"), [(3, [0, 1, 2]), (250, [*range(0, 250, 2)])])
def test_how_far_it_is(count: int, told: list[int]) -> None:
    rows, seen = datasets.Dataset.from_list([{"text": "some"}] * count), list[int]()
    encode(rows, TEXT, "causal-lm", characters(), DataSection(max_length=8), seen=seen.append)
    assert seen == told


def test_nothing_is_left_beside_the_data(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": "some"}] * 10).save_to_disk(tmp_path / "saved")
    before = sorted(os.listdir(tmp_path / "saved"))
    rows = datasets.load_from_disk(tmp_path / "saved")
    found = encode(rows, TEXT, "causal-lm", characters(), DataSection(max_length=8))
    found.rows.train_test_split(test_size=2)
    assert len(found) == 10 and sorted(os.listdir(tmp_path / "saved")) == before
    assert datasets.is_caching_enabled()
