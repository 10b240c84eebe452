"""The configuration's keys as options of a command: `--lora.r 8`, `--r 8` and `--lora.r=8` are the same."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fastpeft.config_keys import ELSEWHERE, key_of, keys, nearest_key
from fastpeft.hints import nearest
from fastpeft.structured import type_name

SWITCHED = ("true", "false", "yes", "no", "on", "off")
"""What YAML takes for true and false."""


WIDE = 110
"""Columns in which a table of all options has room for their names."""


class ConfigCommand(TyperCommand):
    """A command whose unknown options are keys of the configuration; they come to it as `settings`."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        if shutil.get_terminal_size().columns < WIDE:
            super(TyperCommand, self).format_help(ctx, formatter)  # a list: tables would cut the longest names
        else:
            super().format_help(ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # a shell completes: no time to complain
            return super().parse_args(ctx, args)
        own = {name for parameter in self.params for name in (*parameter.opts, *parameter.secondary_opts)} - _declared()
        own |= set(ctx.help_option_names)
        rest: list[str] = []
        settings: list[str] = []
        waiting = list(args)
        while waiting:
            given = waiting.pop(0)
            name, equals, value = given.removeprefix("--").partition("=")
            if not given.startswith("--") or given == "--" or f"--{name}" in own:
                rest.append(given)
                continue
            key = key_of(name) or ctx.fail(_unknown(name, own))
            text = value if equals else _value(key, waiting, ctx, given)
            if "list" in str(keys()[key].kind if key in keys() else "") and _goes_on(waiting):
                ctx.fail(
                    f"{given}: expected one value, got {text} {waiting[0]}; write several as [{text}, {waiting[0]}]"
                )
            settings.append(f"{key}={_quoted(text) if _is_text(key) and text != 'null' else text}")
        ctx.obj = settings
        return super().parse_args(ctx, rest)


def _goes_on(waiting: list[str]) -> bool:
    """Whether the next word is one more value, as other tools have lists, and no configuration file."""
    return (
        bool(waiting)
        and not waiting[0].startswith("-")
        and not Path(waiting[0]).suffix
        and not Path(waiting[0]).exists()
    )


def _is_text(key: str) -> bool:
    """Whether nothing but text (or null) will do: 2024 and [x].txt are names then."""
    return key in keys() and keys()[key][0] in (str, str | None)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _value(key: str, waiting: list[str], ctx: Any, given: str) -> str:
    """The next word; "true" for a switch without."""
    switch = keys()[key][0] is bool if key in keys() else False
    if waiting and not waiting[0].startswith("--") and not (switch and waiting[0].lower() not in SWITCHED):
        return waiting.pop(0)
    if not switch:
        ctx.fail(f"{given}: expected a value, got none")
    return "true"


def _unknown(name: str, own: set[str]) -> str:
    name = name.replace("-", "_")
    ending = [key for key in keys() if key.rpartition(".")[2] == name]
    if ending:
        return f"--{name}: expected one of {', '.join(f'--{key}' for key in ending)}, got their last part alone"
    words = [option.removeprefix("--") for option in own]
    if name in ELSEWHERE:
        return f"--{name}: no such option, did you mean --{ELSEWHERE[name].removeprefix('--')}?"
    likely = nearest(name, words) or nearest_key(name)
    return f"--{name}: no such option" + (f", did you mean --{likely}?" if likely else "; --help lists all")


@cache
def _declared() -> set[str]:
    return {f"--{key}" for key in keys()}


def with_config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Declare an option for every key, for --help and for completion; ConfigCommand reads their values."""
    parameters = list(inspect.signature(command, eval_str=True).parameters.values())
    for key, (kind, default, text) in keys().items():
        section = key.rpartition(".")[0] or "run"
        option = typer.Option(
            f"--{key}",
            help=f"{text} (default {_default_text(default)})",
            metavar=_metavar(kind),
            rich_help_panel=f"{section}: keys of the configuration",
            show_default=False,
        )
        name = key.replace(".", "__")
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option]
            )
        )

    def called(**given: Any) -> Any:
        return command(**{name: given[name] for name in inspect.signature(command).parameters})

    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def _metavar(kind: Any) -> str:
    name = type_name(kind).replace(" or null", "").replace("one of ", "").replace("'", "")
    return {"dict[str, Any]": "MAPPING", "dict[str, str]": "MAPPING", "bool": "true|false"}.get(
        name, name.replace(", ", "|").upper() if "," not in name else name.replace(", ", "|")
    )


def _default_text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value) if value not in ("", [], {}) else "none"
