"""Chats: their messages, the template that makes text of them, and which tokens are the assistant's."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from fastpeft.errors import UserError

TEMPLATES = {path.stem: path for path in (Path(__file__).parent / "templates").glob("*.jinja")}
"""Shipped ones by name. Both mark the assistant's words and end them with the tokenizer's end-of-sequence token."""
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
"""ShareGPT's names for roles, and ours."""
IGNORED = -100
"""The label of a token that is read but not learned, as PyTorch's cross entropy has it."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def set_template(tokenizer: Any, wanted: str | None, key: str = "data.chat_template") -> str:
    """Give the tokenizer a chat template.

    Args:
        tokenizer: of the model; changed in place.
        wanted: name of a shipped one, a Jinja file, or None for the tokenizer's own, "plain" if it has none.

    Returns:
        What it is called in reports.

    Raises:
        UserError: neither a shipped name nor a file.
    """
    if wanted is None and tokenizer.chat_template:
        return "the tokenizer's own"
    wanted = wanted or "plain"
    path = TEMPLATES.get(wanted) or Path(wanted).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(wanted, TEMPLATES, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{key}: expected {', '.join(sorted(TEMPLATES))} or a Jinja file, got {wanted!r}{hint}")
    if tokenizer.eos_token is None:
        raise UserError(f"{key}: expected a tokenizer with an end-of-sequence token, got one without")
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    return wanted


def messages_of(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """A row's messages, whichever form of chat it has: `messages`, `conversations`, or instruction and output.

    Raises:
        UserError: what is there is no chat; `where` begins the message.
    """
    if "instruction" in row:
        given = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        turns: Any = [{"role": "user", "content": given}, {"role": "assistant", "content": row["output"]}]
    else:
        turns = row["messages"] if "messages" in row else row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: expected a list of messages, got {_short(turns)}")
    return [_message(turn, f"{where}, message {number}") for number, turn in enumerate(turns, 1)]


def _message(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise UserError(f"{where}: expected a mapping with role and content, got {_short(turn)}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str):
        raise UserError(f"{where}: expected a role, got {_short(role)}")
    if isinstance(content, list):  # as parts; those of text only
        content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    others = {name: value for name, value in turn.items() if name not in ("role", "content", "from", "value")}
    others = {name: value for name, value in others.items() if value is not None}  # Arrow fills in what other rows have
    if not isinstance(content, str) and not others:
        raise UserError(f"{where}: expected content as text, got {_short(content)}")
    return {"role": ROLES.get(role.lower(), role), "content": content or "", **others}


class ChatEncoder:
    """Messages to token ids and labels.

    With `assistant_only` the labels of all but the assistant's turns are IGNORED. Which tokens these are is told by
    the template's own `{% generation %}` marks, else by TRL's marked copy of a template that it knows, else by how the
    text grows from turn to turn.
    """

    def __init__(self, tokenizer: Any, assistant_only: bool) -> None:
        self.tokenizer, self.assistant_only = tokenizer, assistant_only
        self.template = tokenizer.chat_template
        self.marked = assistant_only and bool(_GENERATION.search(_text(self.template)))
        if assistant_only and not self.marked:
            marked = _marked_by_trl(tokenizer)
            self.template, self.marked = marked or self.template, marked is not None

    def __call__(self, messages: list[dict[str, Any]], where: str) -> tuple[list[int], list[int]]:
        """(ids, labels).

        Raises:
            UserError: the template refuses the messages, no turn is the assistant's, or it cannot be told which are.
        """
        if not self.assistant_only:
            ids = self._encode(messages, where)["input_ids"]
            return ids, list(ids)
        if all(message["role"] != "assistant" for message in messages):
            raise UserError(f"{where}: expected a turn of the assistant, got {_roles(messages)}")
        if self.marked:
            encoded = self._encode(messages, where, return_assistant_tokens_mask=True)
            ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        else:
            ids, mask = self._by_growth(messages, where)
        return ids, [token if learned else IGNORED for token, learned in zip(ids, mask, strict=True)]

    def _encode(self, messages: list[dict[str, Any]], where: str, **options: Any) -> Any:
        return self._apply(messages, where, tokenize=True, return_dict=True, **options)

    def _apply(self, messages: list[dict[str, Any]], where: str, **options: Any) -> Any:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=self.template, **options)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(f"{where}: the chat template refuses {_roles(messages)}: {error}") from error

    def _by_growth(self, messages: list[dict[str, Any]], where: str) -> tuple[list[int], list[bool]]:
        whole = self._apply(messages, where, tokenize=False)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._apply(messages[:i], where, tokenize=False, add_generation_prompt=True) if i else ""
                after = self._apply(messages[: i + 1], where, tokenize=False)
                if not after.startswith(before) or not whole.startswith(after):
                    raise UserError(
                        "data.assistant_only: the chat template rewrites earlier turns once later ones follow, so the "
                        "assistant's tokens cannot be told; set it to false, or data.chat_template to one with "
                        "{% generation %}"
                    )
                spans.append((len(before), len(after)))
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        mask = [any(a <= start < b for a, b in spans) for start, _ in encoded["offset_mapping"]]
        return encoded["input_ids"], mask


def _marked_by_trl(tokenizer: Any) -> str | None:
    """TRL's copy of the tokenizer's template with the assistant's words marked, for the templates it knows."""
    try:
        from trl.chat_template_utils import get_training_chat_template

        template: str | None = get_training_chat_template(tokenizer)
        return template
    except (ImportError, AttributeError, ValueError, TypeError):
        return None


def _text(template: Any) -> str:
    return template.get("default", "") if isinstance(template, dict) else template or ""


def _roles(messages: list[dict[str, Any]]) -> str:
    return "the roles " + ", ".join(message["role"] for message in messages[:8])


def _short(value: Any) -> str:
    return "null" if value is None else f"{str(value)[:60]!r} ({type(value).__name__})"
