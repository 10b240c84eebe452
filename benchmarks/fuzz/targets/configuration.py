"""`fastpeft train run.yaml`, as far as nothing is loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from benchmarks.fuzz.making import LEAVES, ODD, as_json, broken, damaged, part_of
from benchmarks.fuzz.watching import Target
from fastpeft.cli.train import read_config
from fastpeft.config import FastpeftConfig
from fastpeft.config_keys import ELSEWHERE, OTHER_NAMES, keys
from fastpeft.errors import UserError
from fastpeft.requirements import MissingExtraError
from fastpeft.training.arguments import check

KEY = st.sampled_from([*keys(), *OTHER_NAMES, *ELSEWHERE]) | st.text(max_size=8)
FRAGMENTS = st.sampled_from(
    [
        *("&a [*a]", "&a {b: *a}", "*a", "!!int ''", "!!float x", "!!bool maybe", "!!timestamp x", "!!binary x"),
        *("!!set {a}", "!!python/object:os.system [x]", "!!omap [a: 1]", "!!pairs [a]", "!!null x", "!!str", "!x y"),
        *("!!merge x", "1e-4", "1:30:00", "0x1F", "0o7", "1_000", ".nan", "-.inf", "2024-01-01", "~", "yes", "? [a]"),
        *("? {a: b}", "<<: *a", "<<: [1]", "|\n    text", ">-\n    text", "'", '"\\x', "[", "{", "%YAML 9.9\n---"),
        *("---\n---", "# x", "{a: 1, a: 2}", "[[[[[[[[", "- ", "\t", "\x07", "\ufeff", "\u2028", "9" * 5000),
        "0x" + "f" * 5000,
    ]
)  # fmt: skip
WHOLE = FastpeftConfig().to_dict() | {"model": "tiny", "data": "rows.jsonl"}
LINE = st.builds(
    "{}: {}".format, KEY, FRAGMENTS | st.builds(str, LEAVES | ODD) | st.text("[]{}:,&*!|>'\"-? \nab1", max_size=12)
)


def _nested(lines: list[str], indent: list[int]) -> bytes:
    text = "\n".join(" " * (2 * depth) + line for line, depth in zip(lines, indent, strict=False))
    return text.encode("utf-8", "surrogatepass")


def _dumped(value: Any) -> bytes:
    try:
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    except ValueError:  # more digits than Python writes
        return b"training: {seed: " + b"9" * 5000 + b"}"


TEXTS = (
    broken(st.builds(_dumped, damaged(part_of(WHOLE))))
    | as_json(part_of(WHOLE))
    | broken(st.builds(_nested, st.lists(LINE, max_size=6), st.lists(st.integers(0, 2), min_size=6, max_size=6)))
)
SETTING = st.builds("{}={}".format, KEY, FRAGMENTS | st.builds(str, LEAVES | ODD)) | st.text(max_size=12)


def read(path: Path) -> None:
    """As the command does; what is accepted must come back from its own text."""
    _check(read_config(path, [], resume=False))


def read_settings(path: Path) -> None:
    """What is written after the command: a setting a line."""
    lines = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    _check(read_config(None, [line for line in lines if line], resume=False))


def _check(config: FastpeftConfig) -> None:
    check(config)
    again = FastpeftConfig.from_dict(config.to_dict())
    assert repr(dataclasses.asdict(again)) == repr(dataclasses.asdict(config)), "another configuration comes back"


REFUSES = (UserError, MissingExtraError)
KEYED = r": |needs "
SETTINGS = st.lists(SETTING, max_size=4).map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass"))
TARGETS = (
    Target("configuration", "run.yaml", TEXTS, read, REFUSES, KEYED),
    Target("settings", "settings.txt", SETTINGS, read_settings, REFUSES, r": "),
)
