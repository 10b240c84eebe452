"""The page about the commands names each of them, and each of their options."""

from __future__ import annotations

import re

import pytest
import typer

from fastpeft.cli.app import app
from fastpeft.config_keys import keys
from scripts.mkdocs_hooks import on_page_markdown

from .pages import read

PAGE = read("docs/reference/commands.md")
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def section(name: str) -> str:
    found = re.search(rf"^## {name}$(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert found, f"no section for {name}"
    return found[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_named(name: str) -> None:
    options = {o for p in COMMANDS[name].params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")}
    options -= {f"--{key}" for key in keys()} | {"--quiet", "--verbose", "--help"}
    assert not [option for option in sorted(options) if f"`{option}" not in section(name)]


def test_what_all_commands_have_is_named() -> None:
    options = {o for p in typer.main.get_command(app).params for o in p.opts} | {"--quiet", "--verbose", "--help"}
    first = PAGE.partition("## train")[0]
    assert not [option for option in sorted(options) if option not in first]


def test_the_keys_are_on_the_page_about_the_configuration() -> None:
    page = on_page_markdown(read("docs/reference/configuration.md"))
    sections = {heading: text for heading, text in re.findall(r"^### (\w+)$(.*?)(?=^### |\Z)", page, re.M | re.S)}
    for key in keys():
        name, _, last = key.rpartition(".")
        assert f"| `{last}` |" in (sections[name] if name else page), key


def test_no_section_names_a_command_that_there_is_not() -> None:
    assert set(re.findall(r"^## ([a-z]+)$", PAGE, re.M)) == set(COMMANDS)
