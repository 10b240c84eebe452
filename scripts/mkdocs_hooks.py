"""Called by mkdocs for each page: the keys of the configuration are put in, comments for the tests are taken out."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints

from fastpeft.config import FastpeftConfig
from fastpeft.structured import type_name

KEYS = "<!-- keys of the configuration -->"
FOR_TESTS = re.compile(r"^[ ]*<!-- test:.*?-->\n?", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    if KEYS in markdown:
        markdown = markdown.replace(KEYS, keys(FastpeftConfig))
    return FOR_TESTS.sub("", markdown)


def keys(section: type, name: str = "") -> str:
    """The fields of a dataclass as a table, and below it those of the dataclasses in it, under headings."""
    hints = get_type_hints(section)
    rows, below = [], []
    for field in fields(section):
        kind = hints[field.name]
        if is_dataclass(kind):
            below.append(f"### {field.name}\n\n{kind.__doc__}\n\n{keys(kind, field.name)}")  # type: ignore[arg-type]
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        words = f"{type_name(kind)} | `{shown(default)}` | {field.metadata.get('help', '')}"
        rows.append(f"| `{field.name}` | " + words.replace("<", "&lt;") + " |")
    table = "\n".join(["| Key | Type | Default | Meaning |", "|---|---|---|---|", *rows]) if rows else ""
    return "\n\n".join(part for part in (table, *below) if part)


def shown(default: Any) -> str:
    """A default as YAML has it."""
    if default is None:
        return "null"
    return (
        str(default).lower()
        if isinstance(default, bool)
        else default
        if default and isinstance(default, str)
        else repr(default)
    )
