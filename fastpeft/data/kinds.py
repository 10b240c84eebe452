"""Which kind of data the columns make, and which tasks it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastpeft.errors import UserError
from fastpeft.hints import did_you_mean, nearest


@dataclass(frozen=True)
class Kind:
    """One kind of row.

    Attributes:
        name: what it is called.
        columns: that a row must have.
        optional: that it may have.
        tasks: it can be used for; the first fits decoders and plain texts.
    """

    name: str
    columns: tuple[str, ...]
    tasks: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " + ".join(self.columns)


CHAT = Kind("chat", ("messages",), ("causal-lm",), ("system",))
SHAREGPT = Kind("chat", ("conversations",), ("causal-lm",), ("system",))
COMPLETION = Kind("completion", ("prompt", "completion"), ("causal-lm", "seq2seq-lm"))
ALPACA = Kind("chat", ("instruction", "output"), ("causal-lm",), ("input", "system", "history"))
LABELLED = Kind("labelled", ("text", "label"), ("sequence-classification",), ("text_pair",))
TAGGED = Kind("tagged", ("tokens", "tags"), ("token-classification",))
QUESTIONS = Kind("questions", ("question", "context", "answers"), ("question-answering",))
TEXT = Kind("text", ("text",), ("causal-lm", "masked-lm", "seq2seq-lm"))
KINDS = (CHAT, SHAREGPT, COMPLETION, ALPACA, LABELLED, TAGGED, QUESTIONS, TEXT)
"""In order of precedence; a text with labels is also a text where the task says so."""
USUAL = {
    "messages": ("chat", "dialog", "dialogue"),
    "prompt": ("source", "question", "query"),
    "completion": ("target", "answer", "response", "summary", "translation"),
    "text": ("sentence", "content", "review", "document", "body", "article"),
    "label": ("labels", "class", "category", "sentiment", "topic", "stars", "rating", "score"),
    "tokens": ("words",),
    "tags": ("ner_tags", "pos_tags", "chunk_tags", "ner", "labels"),
    "context": ("paragraph", "passage"),
}
"""Other names of columns, for hints."""
KNOWN = tuple(dict.fromkeys(column for kind in KINDS for column in (*kind.columns, *kind.optional)))


def rename(rows: Any, columns: dict[str, str]) -> Any:
    """Rows with the user's columns under the names that are expected.

    Raises:
        UserError: a name that nothing expects, or a column that is not there.
    """
    for expected, given in columns.items():
        if expected not in KNOWN:
            raise UserError(
                f"data.columns.{expected}: expected one of {', '.join(KNOWN)}{did_you_mean(expected.lower(), KNOWN)}"
            )
        if given not in rows.column_names:
            raise UserError(
                f"data.columns.{expected}: expected one of {', '.join(rows.column_names)}, got {given!r}"
                f"{did_you_mean(given.lower(), rows.column_names)}"
            )
        first = next(name for name, column in columns.items() if column == given)
        if first != expected:
            raise UserError(
                f"data.columns.{expected}: expected another column than data.columns.{first}, got {given!r} twice"
            )
    taken = [name for name in columns if name in rows.column_names and name not in columns.values()]
    return rows.remove_columns(taken).rename_columns(
        {given: expected for expected, given in columns.items() if given != expected}
    )


def kind_of(names: Sequence[str], task: str) -> Kind:
    """The kind of data that columns make.

    Args:
        names: of the columns.
        task: "auto" or what the model is to be trained to do.

    Raises:
        UserError: none that serves the task.
    """
    found = [kind for kind in KINDS if set(kind.columns) <= set(names)]
    fitting = [kind for kind in found if task == "auto" or task in kind.tasks]
    if fitting:
        return fitting[0]
    if found:
        wanted = " or ".join(str(kind) for kind in KINDS if task in kind.tasks)
        if not wanted:
            raise UserError(f"model.task: {task} is for strategy.name few-shot, which learns from labelled texts")
        raise UserError(f"data: expected columns {wanted} for task {task}, got {', '.join(names)}")
    if {"chosen", "rejected"} <= set(names):
        raise UserError(
            "data: expected texts to learn from, got preferences (chosen, rejected): "
            "those are for TRL's DPOTrainer, after fastpeft.accelerate(model)"
        )
    wanted = ", ".join(str(kind) for kind in KINDS)
    likely = _likely_columns(names)
    hint = f"did you mean data.columns {likely}?" if likely else "data.columns gives yours their names"
    raise UserError(f"data: expected columns {wanted}; got {', '.join(names)}; {hint}")


def _likely_columns(names: Sequence[str]) -> str:
    """The mapping that makes one of KINDS of all its columns, by what people call them; empty if none does."""
    for kind in KINDS:
        found: dict[str, str] = {}
        for column in kind.columns:
            free = [name for name in names if name not in found.values()]
            usual = [name for name in free if name == column or name.lower() in USUAL.get(column, ())]
            near = usual[0] if usual else nearest(column, free, cutoff=0.7)
            if near is None:
                break
            found[column] = near
        else:
            return "{" + ", ".join(f"{column}: {name}" for column, name in found.items() if column != name) + "}"
    return ""


def check_columns(names: Sequence[str], kind: Kind, key: str) -> None:
    """Raise UserError unless the rows to evaluate on have the columns that are trained on."""
    if not set(kind.columns) <= set(names):
        raise UserError(f"{key}: expected columns {kind}, as data.path has them, got {', '.join(names)}")
