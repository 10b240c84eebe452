"""Chats: their messages, the template that makes text of them, and which tokens are the assistant's."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpeft.errors import UserError
from fastpeft.hints import did_you_mean

TEMPLATES = {path.stem: path for path in (Path(__file__).parent / "templates").glob("*.jinja")}
"""Shipped ones by name. Both mark the assistant's words and end them with the tokenizer's end-of-sequence token."""
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
"""ShareGPT's names for roles, and ours."""
IGNORED = -100
"""The label of a token that is read but not learned, as PyTorch's cross entropy has it."""
OWN = "own"
"""What the tokenizer's own template is called."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def set_template(tokenizer: Any, wanted: str | None) -> str:
    """Give the tokenizer a chat template.

    Args:
        tokenizer: of the model; changed in place.
        wanted: name of a shipped one, a Jinja file, or None or OWN for the tokenizer's own, "plain" if it has none.

    Returns:
        What it is called in reports.

    Raises:
        UserError: neither a shipped name nor a file.
    """
    if wanted in (None, OWN) and tokenizer.chat_template:
        return OWN
    wanted = wanted or "plain"
    path = TEMPLATES.get(wanted) or Path(wanted).expanduser()
    key, known = "data.chat_template", ", ".join(sorted(TEMPLATES))
    if not path.is_file():
        raise UserError(f"{key}: expected {known} or a Jinja file, got {wanted!r}{did_you_mean(wanted, TEMPLATES)}")
    if tokenizer.eos_token is None:
        raise UserError(f"{key}: expected a tokenizer with an end-of-sequence token, got one without")
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{key}: expected {known} or a Jinja file, got {wanted}, which is no text in UTF-8") from None
    return wanted


def messages_of(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """A row's messages, whichever form of chat it has: `messages`, `conversations`, or instruction and output.

    Raises:
        UserError: what is there is no chat; `where` begins the message.
    """
    turns: Any
    if "messages" in row or "conversations" in row:
        turns = row["messages"] if "messages" in row else row["conversations"]
    else:
        given, more = row["instruction"], row.get("input")
        if isinstance(given, str) and more:
            given = f"{given}\n\n{more}" if given else more
        turns = _exchange(given, row["output"])
        for pair in reversed(_history(row, where)):
            if not isinstance(pair, list) or len(pair) != 2:
                raise UserError(f"{where}, column history: expected pairs of question and answer, got {short(pair)}")
            turns = _exchange(*pair) + turns
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: expected a list of messages, got {short(turns)}")
    messages = [_message(turn, f"{where}, message {number}") for number, turn in enumerate(turns, 1)]
    if row.get("system") and messages[0]["role"] != "system":
        messages.insert(0, _message({"role": "system", "content": row["system"]}, f"{where}, column system"))
    return messages


def _history(row: dict[str, Any], where: str) -> list[Any]:
    found = row.get("history") or []
    if not isinstance(found, list):
        raise UserError(f"{where}, column history: expected a list, got {short(found)}")
    return found


def _exchange(question: Any, answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _message(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise UserError(f"{where}: expected a mapping with role and content, got {short(turn)}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str):
        raise UserError(f"{where}: expected a role, got {short(role)}")
    if isinstance(content, list):
        content = "".join(_text_of_part(part, where) for part in content)
    others = {name: value for name, value in turn.items() if name not in ("role", "content", "from", "value")}
    others = {name: value for name, value in others.items() if value is not None}  # Arrow fills in what other rows have
    if not isinstance(content, str) and not others:
        raise UserError(f"{where}: expected content as text, got {short(content)}")
    if role.lower() == "function_call":
        content, others = "", {"tool_calls": _calls(content, where), **others}
    return {"role": ROLES.get(role.lower(), role.lower()), "content": content or "", **others}


def _calls(text: Any, where: str) -> list[dict[str, Any]]:
    """ShareGPT's calls of tools, one or a list of them in JSON, in the form that chat templates take."""
    try:
        calls = json.loads(text)
        calls = calls if isinstance(calls, list) else [calls]
        found = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
    except (TypeError, ValueError, KeyError, RecursionError):
        raise UserError(f"{where}: expected calls in JSON, with name and arguments, got {short(text)}") from None
    return [{"type": "function", "function": function} for function in found]


def _text_of_part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{where}: expected parts of text only, got {short(part)}")
    return text


def variables_of(row: dict[str, Any], where: str) -> dict[str, Any]:
    """What a row gives its template beside the messages: `tools`, as a list or as JSON, and `chat_template_kwargs`.

    Raises:
        UserError: tools that are no JSON, or template variables that are no mapping.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}, column tools: not valid JSON: {error.msg}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}, column tools: not valid JSON: {error}") from error
    others = row.get("chat_template_kwargs") or {}
    if not isinstance(others, dict):
        raise UserError(f"{where}, column chat_template_kwargs: expected a mapping, got {short(others)}")
    return {**others, **({"tools": tools} if tools else {})}


class ChatEncoder:
    """Messages to token ids and labels.

    With `assistant_only` the labels of all but the assistant's turns are IGNORED. Which tokens these are is told by
    the template's own `{% generation %}` marks, else by TRL's marked copy of a template that it knows, else by how the
    text grows from turn to turn.
    """

    def __init__(self, tokenizer: Any, assistant_only: bool) -> None:
        self.tokenizer, self.assistant_only = tokenizer, assistant_only
        self.template = _text(tokenizer.chat_template)
        self.marked = assistant_only and bool(_GENERATION.search(self.template))
        if assistant_only and not self.marked:
            marked = _marked_by_trl(tokenizer)
            self.template, self.marked = marked or self.template, marked is not None

    def __call__(
        self, messages: list[dict[str, Any]], where: str, variables: dict[str, Any] | None = None
    ) -> tuple[list[int], list[int]]:
        """(ids, labels).

        Args:
            messages: of one chat.
            where: how to call it in messages.
            variables: the template's, such as `tools`.

        Raises:
            UserError: the template refuses the messages, no turn is the assistant's, or it cannot be told which are.
        """
        given = variables or {}
        if any(message.get("tool_calls") for message in messages) and "tool_calls" not in self.template:
            raise UserError(f"{where}: expected a chat template that reads tool_calls, got one that does not")
        if not self.assistant_only:
            ids = self.prompt(messages, where, **given)
            return ids, list(ids)
        if all(message["role"] != "assistant" for message in messages):
            raise UserError(f"{where}: expected a turn of the assistant, got {_roles(messages)}")
        text, spans = self._marked(messages, where, given) if self.marked else self._by_growth(messages, where, given)
        ids, mask = tokens_within(self.tokenizer, text, spans, add_special_tokens=False)
        return ids, [token if learned else IGNORED for token, learned in zip(ids, mask, strict=True)]

    def prompt(self, messages: list[dict[str, Any]], where: str, **options: Any) -> list[int]:
        """Ids of messages of which nothing is told apart. Raises UserError if the template refuses them."""
        text, _ = self._render(messages, where, **options)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _render(self, messages: list[dict[str, Any]], where: str, **options: Any) -> tuple[str, list[tuple[int, int]]]:
        """The text, and where in it the template's marks are, if these are asked for.

        transformers' own mask of the assistant's tokens stops at an answer that begins with a space, where tokenizers
        leave spaces out of their offsets.
        """
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        if not messages:
            raise UserError(f"{where}: expected a list of messages, got an empty one")
        try:
            texts, spans = render_jinja_template(
                conversations=[messages], chat_template=self.template, **self.tokenizer.special_tokens_map, **options
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"data.chat_template: not valid Jinja: {error.message} in line {error.lineno}") from error
        except Exception as error:  # a template is a program: what it does may fail in any way
            reason = str(error) or type(error).__name__
            raise UserError(f"{where}: the chat template refuses {_roles(messages)}: {reason}") from error
        return texts[0], spans[0] if spans else []

    def _marked(
        self, messages: list[dict[str, Any]], where: str, given: dict[str, Any]
    ) -> tuple[str, list[tuple[int, int]]]:
        return self._render(messages, where, return_assistant_tokens_mask=True, **given)

    def _by_growth(
        self, messages: list[dict[str, Any]], where: str, given: dict[str, Any]
    ) -> tuple[str, list[tuple[int, int]]]:
        whole, _ = self._render(messages, where, **given)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                after, _ = self._render(messages[: i + 1], where, **given)
                if i:
                    before, _ = self._render(messages[:i], where, add_generation_prompt=True, **given)
                else:  # templates do not begin an answer to nothing: it begins where another would differ
                    other = {**message, "content": "b" if message["content"].strip().startswith("a") else "a"}
                    before = after[: alike(after, self._render([other], where, **given)[0])]
                if not after.startswith(before) or not whole.startswith(after):
                    raise UserError(
                        "data.assistant_only: the chat template rewrites earlier turns once later ones follow, so the "
                        "assistant's tokens cannot be told; set it to false, or data.chat_template to one with "
                        "{% generation %}"
                    )
                spans.append((len(before), len(after)))
        return whole, spans


def tokens_within(
    tokenizer: Any, text: str, spans: list[tuple[int, int]], **options: Any
) -> tuple[list[int], list[bool]]:
    """Token ids of a text, and whether each has a character within one of `spans`.

    Raises:
        UserError: a tokenizer that does not tell which characters its tokens are of.
    """
    if not tokenizer.is_fast:
        raise UserError(f"model.name: expected a fast tokenizer, got {type(tokenizer).__name__}")
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False, **options)

    def within(start: int, end: int) -> bool:
        if start == end:  # spaces, in tokenizers that leave them out of their offsets; or a special token, at 0
            return any(a < end <= b for a, b in spans)
        return any(start < b and end > a for a, b in spans)

    return list(encoded["input_ids"]), [within(start, end) for start, end in encoded["offset_mapping"]]


def alike(first: Sequence[Any], second: Sequence[Any]) -> int:
    """With how many equal ones two sequences begin."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(first), len(second)))


def _marked_by_trl(tokenizer: Any) -> str | None:
    """TRL's copy of the tokenizer's template with the assistant's words marked, for the templates it knows."""
    try:
        from trl.chat_template_utils import get_training_chat_template

        template: str | None = get_training_chat_template(tokenizer)
        return template
    except Exception:  # TRL renders it, and a template is a program; what it does to the rows says what is wrong
        return None


def _text(template: Any) -> str:
    return template.get("default", "") if isinstance(template, dict) else template or ""


def _roles(messages: list[dict[str, Any]]) -> str:
    return "the roles " + ", ".join(message["role"] for message in messages[:8])


def short(value: Any) -> str:
    """A value and its type, for messages."""
    return "null" if value is None else f"{str(value)[:60]!r} ({type(value).__name__})"
