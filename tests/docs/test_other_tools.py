"""docs/how-to/from-axolotl-llama-factory.md and the hints for other tools' keys say the same."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from fastpeft.cli.config_options import _unknown
from fastpeft.config import FastpeftConfig
from fastpeft.config_keys import ELSEWHERE, OTHER_NAMES, key_of, nearest_key

from .pages import read

PAGE = "docs/how-to/from-axolotl-llama-factory.md"


def rows() -> Iterator[tuple[str, set[str]]]:
    """A name that another tool has, and the keys and options in the cell beside it."""
    for names, here in re.findall(r"^\| (`[^|]+) \| ([^|]+) \|$", read(PAGE), re.MULTILINE):
        found = {re.sub(r"^(fastpeft train )?(--)?", "", code) for code in re.findall(r"`([^`]+)`", here)}
        found |= {f"--{word}" for code in re.findall(r"`([^`]+)`", here) for word in re.findall(r"--([a-z]+)$", code)}
        keys = {re.match(r"[-a-z_.]*", code).group() for code in found}  # type: ignore[union-attr]
        for code in re.findall(r"`([^`]+)`", names):
            if name := re.fullmatch(r"(?:--)?([a-z_0-9]+)(?:[: ].*)?", code):
                yield name[1], keys | ({f"training.{name[1]}"} if "training." in keys else set())


CELLS: dict[str, set[str]] = {}
for _name, _cell in rows():
    CELLS.setdefault(_name, set()).update(_cell)


def stands(key: str, cell: set[str]) -> bool:
    """Whether a cell has a key, or the section or the `extra` that it is in."""
    return any(key == one or key.startswith(f"{one}.") for one in cell)


def test_the_page_is_read() -> None:
    assert len(CELLS) > 90


@pytest.mark.parametrize("name", CELLS)
def test_the_hint_is_what_the_page_says(name: str) -> None:
    cell = CELLS[name]
    said = {key_of(one) or one for one in cell if one.startswith("--") or key_of(one) is not None}
    if said:
        hint = key_of(name) or ELSEWHERE.get(name)
        assert hint is not None and stands(hint, said | cell), (name, hint, cell)


def test_every_hint_is_on_the_page() -> None:
    only_trainers_know = {"run_name", "torch_dtype"}
    assert set(ELSEWHERE) - set(CELLS) - only_trainers_know == set()


@pytest.mark.parametrize("name", ELSEWHERE)
def test_every_hint_is_given(name: str) -> None:
    assert name not in OTHER_NAMES and key_of(name) is None
    hint = ELSEWHERE[name]
    assert hint in ("--resume", "--overwrite") or key_of(hint) == hint
    assert nearest_key(name) == hint
    for place in ("", "training."):
        with pytest.raises(ValueError, match=f"^{place}{name}: unknown key, did you mean '{re.escape(hint)}'"):
            FastpeftConfig.from_dict({"training": {name: 1}} if place else {name: 1})
    assert _unknown(name, {"--resume"}).endswith(f"did you mean --{hint.removeprefix('--')}?")
