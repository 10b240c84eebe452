"""Chats: which messages a row holds, and which tokens are the assistant's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastpeft.data.chat import IGNORED, TEMPLATES, ChatEncoder, messages_of, set_template, variables_of
from fastpeft.errors import UserError
from tests.checkpoints import SHIPPED, characters

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
CHAT = [(SYSTEM, "Be brief."), (USER, "Two and two?"), (ASSISTANT, "Four."), (USER, "Thanks"), (ASSISTANT, "Welcome.")]
OPEN = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
CLOSE = "{% endgeneration %}{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
BRACKETS = (
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def chat(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def learned(tokenizer: Any, messages: list[dict[str, Any]]) -> list[str]:
    """The stretches of text that are learned."""
    ids, labels = ChatEncoder(tokenizer, assistant_only=True)(messages, "row 1")
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    stretches: list[list[int]] = [[]]
    for label in labels:
        if label == IGNORED:
            stretches.append([])
        else:
            stretches[-1].append(label)
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


def with_template(template: str, **options: bool) -> Any:
    tokenizer = characters(**options)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def shipped() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHIPPED)


class TestTemplates:
    """Whose words are learned, with each way to tell."""

    @pytest.mark.parametrize(
        ("name", "text", "answers"),
        [
            (
                "plain",
                "<|bos|>### System:\nBe brief.\n\n### User:\nTwo and two?\n\n### Assistant:\nFour.<|eos|>\n\n"
                "### User:\nThanks\n\n### Assistant:\nWelcome.<|eos|>\n\n",
                ["Four.<|eos|>", "Welcome.<|eos|>"],
            ),
            (
                "chatml",
                "<|bos|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTwo and two?<|im_end|>\n"
                "<|im_start|>assistant\nFour.<|im_end|><|eos|>\n<|im_start|>user\nThanks<|im_end|>\n"
                "<|im_start|>assistant\nWelcome.<|im_end|><|eos|>\n",
                ["Four.<|im_end|><|eos|>", "Welcome.<|im_end|><|eos|>"],
            ),
        ],
    )
    def test_shipped_ones(self, name: str, text: str, answers: list[str], shipped: Any) -> None:
        assert set_template(shipped, name) == name
        ids, _ = ChatEncoder(shipped, assistant_only=True)(chat(*CHAT), "row 1")
        assert shipped.decode(ids) == text
        assert learned(shipped, chat(*CHAT)) == answers

    def test_shipped_ones_end_where_generation_begins(self, shipped: Any) -> None:
        for name in TEMPLATES:
            set_template(shipped, name)
            asked = shipped.apply_chat_template(chat(*CHAT[:2]), add_generation_prompt=True, tokenize=False)
            whole = shipped.apply_chat_template(chat(*CHAT), tokenize=False)
            assert whole.startswith(asked + "Four.")

    def test_ones_own_with_marks(self, tmp_path: Path) -> None:
        tokenizer = characters()
        (tmp_path / "my.jinja").write_text(OPEN + "{{ m.content }}</s>" + CLOSE)
        assert set_template(tokenizer, str(tmp_path / "my.jinja")) == str(tmp_path / "my.jinja")
        assert learned(tokenizer, chat(*CHAT)) == ["Four.</s>", "Welcome.</s>"]

    def test_the_tokenizers_own_is_kept(self) -> None:
        tokenizer = with_template(BRACKETS)
        assert set_template(tokenizer, None) == "own"
        assert tokenizer.chat_template == BRACKETS
        assert set_template(tokenizer, "plain") == "plain" and "###" in tokenizer.chat_template

    def test_one_that_is_unknown_is_told_by_its_growth(self) -> None:
        assert learned(with_template(BRACKETS), chat(*CHAT)) == ["Four.</s>\n", "Welcome.</s>\n"]

    @pytest.mark.parametrize("first", ["Hello.", "  a greeting", "b", ""])
    def test_a_chat_that_begins_with_the_assistant(self, first: str) -> None:
        template = "{% if messages[0].role != 'system' %}[system]\nBe good.</s>\n{% endif %}" + BRACKETS
        turns = [(ASSISTANT, first), (USER, "Two and two?"), (ASSISTANT, "Four.")]
        assert learned(with_template(template), chat(*turns)) == [f"{first}</s>\n", "Four.</s>\n"]

    def test_one_that_trl_knows_is_told_by_its_marks(self) -> None:
        from trl.chat_template_utils import qwen3_chat_template

        tokenizer = with_template(qwen3_chat_template)
        encoder = ChatEncoder(tokenizer, assistant_only=True)
        assert encoder.marked and "{% generation %}" in encoder.template
        answers = [f"<think>\n\n</think>\n\n{words}<|im_end|>\n" for words in ("Four.", "Welcome.")]
        assert learned(tokenizer, chat(*CHAT)) == answers

    def test_one_of_several_by_name(self) -> None:
        tokenizer = characters()
        tokenizer.chat_template = {"default": BRACKETS, "tool_use": "{{ 1 / 0 }}"}
        assert learned(tokenizer, chat(*CHAT)) == ["Four.</s>\n", "Welcome.</s>\n"]

    def test_calls_that_a_template_would_leave_out_are_refused(self, shipped: Any) -> None:
        call = {"role": ASSISTANT, "content": "", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
        set_template(shipped, "plain")
        with pytest.raises(UserError, match=r"^row 1: expected a chat template that reads tool_calls, got one that "):
            learned(shipped, [*chat((USER, "b")), call])
        reads = BRACKETS.replace("</s>", "{{ m.tool_calls[0].function.name if m.tool_calls else '' }}</s>")
        assert learned(with_template(reads), [*chat((USER, "b")), call]) == ["add</s>\n"]

    def test_one_that_rewrites_earlier_turns_is_refused(self) -> None:
        tokenizer = with_template("{% for m in messages %}{{ m.content if loop.last else '…' }}\n{% endfor %}")
        with pytest.raises(UserError, match=r"^data.assistant_only: the chat template rewrites earlier turns"):
            learned(tokenizer, chat(*CHAT))
        ids, labels = ChatEncoder(tokenizer, assistant_only=False)(chat(*CHAT), "row 1")
        assert ids == labels and tokenizer.decode(ids) == "…\n…\n…\n…\nWelcome.\n"

    def test_one_that_cuts_words_off_is_told_all_the_same(self) -> None:
        tokenizer = with_template(BRACKETS.replace("m.content", "m.content | trim"))
        assert learned(tokenizer, chat((USER, " a "), (ASSISTANT, " b "))) == ["b</s>\n"]


@pytest.mark.parametrize("trim_offsets", [False, True])
class TestSpaces:
    """Some tokenizers leave spaces out of their tokens' offsets; they are learned all the same, and no others."""

    def test_by_marks(self, trim_offsets: bool) -> None:
        answers = ["    in code", " a", "\n\nlate", "in: ", "  ", "a"]
        tokenizer = with_template(OPEN + "{{ m.content }}" + CLOSE.replace("\n", "|"), trim_offsets=trim_offsets)
        turns = [turn for answer in answers for turn in ((USER, "  a "), (ASSISTANT, answer))]
        assert learned(tokenizer, chat(*turns, (USER, " a"))) == answers

    def test_by_growth(self, trim_offsets: bool) -> None:
        answers = ["in code", "in  ", "x\n\n", "in"]
        tokenizer = with_template(BRACKETS.replace("]\n", "]  "), trim_offsets=trim_offsets)
        turns = [turn for answer in answers for turn in ((USER, "  a "), (ASSISTANT, answer))]
        assert learned(tokenizer, chat(*turns)) == [f"{answer}</s>\n" for answer in answers]

    def test_a_token_across_the_beginning_is_learned(self, trim_offsets: bool) -> None:
        tokenizer = with_template(BRACKETS.replace("]\n", "]  "), trim_offsets=trim_offsets)
        assert learned(tokenizer, chat((USER, "b"), (ASSISTANT, "a"))) == [" a</s>\n"]


class TestMessages:
    """The same chat in each of its forms."""

    WANTED = chat((USER, "Hello"), (ASSISTANT, "Hi"))

    @pytest.mark.parametrize(
        "row",
        [
            {"messages": WANTED},
            {"messages": WANTED, "instruction": "not this", "output": "one"},
            {"messages": [{"role": "User", "content": "Hello"}, {"role": "Assistant", "content": "Hi"}]},
            {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
            {"conversations": WANTED},
            {"instruction": "Hello", "output": "Hi"},
            {"instruction": "Hello", "input": "", "output": "Hi"},
            {"instruction": "Hello", "input": None, "output": "Hi"},
            {"instruction": "", "input": "Hello", "output": "Hi"},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"text": "lo"}]}, WANTED[1]]},
            {"messages": [WANTED[0] | {"tool_calls": None, "name": None}, WANTED[1]]},
        ],
    )
    def test_forms(self, row: dict[str, Any]) -> None:
        assert messages_of(row, "row 1") == self.WANTED

    def test_an_instructions_input_follows_it(self) -> None:
        found = messages_of({"instruction": "Translate.", "input": "Hallo", "output": "Hello"}, "row 1")
        assert found == chat((USER, "Translate.\n\nHallo"), (ASSISTANT, "Hello"))

    def test_a_system_column(self) -> None:
        turns = [{"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}]
        system, wanted = "Be brief.", chat((SYSTEM, "Be brief."), (USER, "b"), (ASSISTANT, "c"))
        assert messages_of({"conversations": turns, "system": system}, "row 1") == wanted
        assert messages_of({"messages": wanted, "system": "Be long."}, "row 1") == wanted
        assert messages_of({"messages": turns, "system": None}, "row 1") == wanted[1:]
        assert messages_of({"instruction": "b", "output": "c", "system": system}, "row 1") == wanted
        with pytest.raises(UserError, match=r"^row 1, column system: expected content as text, got '3' \(int\)$"):
            messages_of({"messages": turns, "system": 3}, "row 1")

    def test_a_history(self) -> None:
        row = {"instruction": "d", "output": "e", "history": [["a", "b"], ["c", ""]]}
        turns = [(USER, "a"), (ASSISTANT, "b"), (USER, "c"), (ASSISTANT, ""), (USER, "d"), (ASSISTANT, "e")]
        assert messages_of(row, "row 1") == chat(*turns)
        assert messages_of(row | {"history": None}, "row 1") == chat(*turns[4:])
        with pytest.raises(UserError, match=r"^row 1, column history: expected pairs of question and answer, got 'a'"):
            messages_of(row | {"history": ["a"]}, "row 1")

    def test_calls_and_answers_of_tools(self) -> None:
        call = {"name": "add", "arguments": {"a": 1}}
        turns = [
            {"from": "human", "value": "b"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "Two."},
        ]
        found = messages_of({"conversations": turns}, "row 1")
        assert [message["role"] for message in found] == [USER, ASSISTANT, "tool", ASSISTANT]
        assert found[1] == {
            "role": ASSISTANT,
            "content": "",
            "tool_calls": [{"type": "function", "function": call}],
        }
        turns[1]["value"] = "add 1"
        message = "^row 1, message 2: expected calls in JSON, with name and arguments, got 'add 1'"
        with pytest.raises(UserError, match=message):
            messages_of({"conversations": turns}, "row 1")

    def test_calls_of_tools_are_kept(self) -> None:
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
        turns = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "1"}]
        found = messages_of({"messages": turns}, "row 1")
        assert found == [{"role": "assistant", "content": "", "tool_calls": [call]}, turns[1]]


def test_without_assistant_only_all_is_learned(shipped: Any) -> None:
    set_template(shipped, "plain")
    ids, labels = ChatEncoder(shipped, assistant_only=False)(chat((USER, "a")), "row 1")
    assert ids == labels and shipped.decode(ids) == "<|bos|>### User:\na\n\n"


def test_a_tokenizer_that_does_not_tell_where_its_tokens_are() -> None:
    class Slow:
        is_fast, chat_template, special_tokens_map = False, BRACKETS, {"eos_token": "</s>"}

    with pytest.raises(UserError, match=r"^model.name: expected a fast tokenizer, got Slow$"):
        ChatEncoder(Slow(), assistant_only=True)(chat(*CHAT), "row 1")


@pytest.mark.parametrize("assistant_only", [True, False])
@pytest.mark.parametrize("tools", [[{"name": "lamp"}], '[{"name": "lamp"}]'])
def test_tools_of_a_row_reach_the_template(tools: object, assistant_only: bool) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    tokenizer.chat_template = (
        "{% for t in tools or [] %}{{ t.name }} {% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    turns = [{"role": "user", "content": "Light!"}, {"role": "assistant", "content": "On."}]
    given = variables_of({"tools": tools}, "data: row 1")
    ids, _ = ChatEncoder(tokenizer, assistant_only)(turns, "data: row 1", given)
    assert tokenizer.decode(ids).startswith("lamp Light!")
