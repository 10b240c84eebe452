"""Training data and prompts: files to rows, and rows to token ids."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from benchmarks.fuzz.making import ODD, as_json, as_lines, broken
from benchmarks.fuzz.watching import Target
from fastpeft.config import DataSection
from fastpeft.data.chat import set_template
from fastpeft.data.encoding import encode
from fastpeft.data.kinds import KINDS, kind_of
from fastpeft.data.labels import resolve_labels
from fastpeft.data.rows import is_document, load_rows
from fastpeft.errors import UserError
from fastpeft.generation import PromptEncoder, read_prompts

MODEL = Path(__file__).parents[3] / "fastpeft/quickstart/assets/model"
LENGTH = 64
WORDS = st.text("ab 1<|>{%\n\u00e9", max_size=8)
TOOL_CALL = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
TURN = {"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
ROWS = st.sampled_from(
    [
        *({"messages": list(TURN)}, {"messages": list(TURN), "tools": '[{"type": "function"}]', "system": "be"}),
        {"messages": list(TURN), "tools": [{"type": "function"}], "chat_template_kwargs": {"a": 1}},
        {"conversations": [{"from": "human", "value": "hi"}, TOOL_CALL, {"from": "gpt", "value": "yes"}]},
        {"instruction": "do", "input": "this", "output": "done", "history": [["a", "b"]], "system": "be"},
        *({"prompt": "one", "completion": " two"}, {"prompt": [TURN[0]], "completion": [TURN[1]]}),
        *({"text": "one two", "label": 1}, {"text": "a", "label": 0.5}),
        {"text": "one", "text_pair": "two", "label": ["a", "b"]},
        {"tokens": ["one", "two"], "tags": ["B-X", "O"]},
        {"question": "who", "context": "it was me", "answers": {"text": ["me"], "answer_start": [7]}},
        *({"text": "one two three"}, {"chosen": "a", "rejected": "b"}, {"words": ["a"], "ner": [1]}),
    ]
)  # fmt: skip
ALIKE = ROWS.flatmap(lambda row: st.lists(st.just(row), min_size=2, max_size=3))


@cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    set_template(tokenizer, "plain")
    return tokenizer


def read(path: Path) -> None:
    """What `fastpeft train` does with a file of rows, for the first task that they serve."""
    rows = load_rows(str(path), split="train")
    kind = kind_of(rows.column_names, "auto")
    task, data = kind.tasks[0], DataSection(max_length=LENGTH)
    data, rows, _ = resolve_labels(task, data, rows, None)
    encoded = encode(rows, kind, task, _tokenizer(), data, document=is_document(str(path)))
    assert all(0 < len(ids) <= LENGTH for ids in encoded.rows["input_ids"]), "a row of another length"


def read_for_an_answer(path: Path) -> None:
    """What `fastpeft generate --file` does before a model is loaded."""
    from transformers import AutoConfig

    encoder = PromptEncoder(_tokenizer(), AutoConfig.from_pretrained(MODEL))
    for prompt in read_prompts(path):
        encoder(prompt)


def read_template(path: Path) -> None:
    """A chat template, and a chat for it."""
    from transformers import AutoTokenizer

    from fastpeft.data.chat import ChatEncoder, messages_of

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    set_template(tokenizer, str(path))
    ChatEncoder(tokenizer, assistant_only=True)(messages_of({"messages": list(TURN)}, "data: row 1"), "data: row 1")


def _table(separator: str) -> Callable[[list[list[Any]]], bytes]:
    def written(rows: list[list[Any]]) -> bytes:
        text = io.StringIO()
        try:
            csv.writer(text, delimiter=separator).writerows(rows)
        except (ValueError, csv.Error):
            return b"text,label\n1,2"
        return text.getvalue().encode("utf-8", "surrogatepass")

    return written


HEAD = st.sampled_from(
    [*(list(kind.columns) for kind in KINDS), ["text", "label", "text_pair"], ["text", "text"], [""]]
)
CELLS = WORDS | ODD | st.sampled_from(["1", "0", "-1", "0.5", "NA", "null", '"', "a,b", "a\tb"])
TABLE = HEAD.flatmap(
    lambda head: st.lists(st.lists(CELLS, min_size=len(head), max_size=len(head)), min_size=1, max_size=5).map(
        lambda rows: [head, *rows]
    )
)


def _parquet(rows: list[Any]) -> bytes:
    import pyarrow.parquet

    file = io.BytesIO()
    try:
        table = pyarrow.Table.from_pylist(rows)
    except pyarrow.ArrowInvalid:  # values of several types in a column
        table = pyarrow.Table.from_pylist([{"text": "one two"}])
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


PARTS = st.sampled_from(
    [
        *("{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['role'] }}", "{% endif %}"),
        *("{% if add_generation_prompt %}", "{% generation %}", "{% endgeneration %}", "{{ eos_token }}", "{# x #}"),
        *("{{ 1 / 0 }}", "{{ messages[9].a.b }}", "{{ m.content.format(1) }}", "{{ [][0] }}", "{%", "}}", "text"),
        *("{{ messages | tojson }}", "{{ strftime_now('%Y') }}", "{{ x() }}", "{{ ''.__class__.__mro__ }}"),
        *("{% include 'x' %}", "{% import 'x' as y %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
        *("{{ 1 | round('x') }}", "{{ raise_exception('no') }}"),
    ]
)  # fmt: skip
TEMPLATES = st.lists(PARTS, max_size=6).map(lambda parts: "".join(parts).encode())
ONE_KIND = ALIKE.flatmap(lambda rows: as_lines(st.sampled_from(rows)))
REFUSES = (UserError,)
PLACE = r"rows\.|data: (row|document) \d+|data\.|data: expected (columns|.*column |texts)"
TARGETS = (
    Target("rows.jsonl", "rows.jsonl", as_lines(ROWS) | ONE_KIND, read, REFUSES, PLACE),
    Target("rows.json", "rows.json", as_json(ALIKE), read, REFUSES, PLACE),
    Target("rows.csv", "rows.csv", broken(TABLE.map(_table(","))), read, REFUSES, PLACE),
    Target("rows.tsv", "rows.tsv", broken(TABLE.map(_table("\t"))), read, REFUSES, PLACE),
    Target("rows.parquet", "rows.parquet", broken(ALIKE.map(_parquet)), read, REFUSES, PLACE),
    Target("rows.txt", "rows.txt", broken(WORDS.map(lambda text: text.encode() * 9)), read, REFUSES, PLACE),
    Target("prompts", "prompts.jsonl", as_lines(ROWS), read_for_an_answer, REFUSES),
    Target(
        "chat template", "chat.jinja", broken(TEMPLATES), read_template, REFUSES, r"chat\.jinja|data\.|chat template"
    ),
)
