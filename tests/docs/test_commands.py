"""The page about the commands names each of them, and each of their options."""

from __future__ import annotations

import re

import pytest
import typer

from fastpeft.cli.app import app
from fastpeft.config_keys import keys
from tests.fresh import ROOT

PAGE = (ROOT / "docs/reference/commands.md").read_text()
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def section(name: str) -> str:
    found = re.search(rf"^## {name}$(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert found, f"no section for {name}"
    return found[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_named(name: str) -> None:
    options = {o for parameter in COMMANDS[name].params for o in parameter.opts if o.startswith("--")}
    options -= {f"--{key}" for key in keys()} | {"--quiet", "--verbose", "--help"}
    assert not [option for option in sorted(options) if f"`{option}" not in section(name)]


def test_no_section_names_a_command_that_there_is_not() -> None:
    assert set(re.findall(r"^## ([a-z]+)$", PAGE, re.M)) == set(COMMANDS)
