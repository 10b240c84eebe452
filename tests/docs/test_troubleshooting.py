"""docs/troubleshooting.md quotes messages as the source has them, and leaves none out that a user can meet."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from tests.fresh import ROOT

from .pages import read

PAGE = "docs/troubleshooting.md"
COVERED = (
    "fastpeft/applying.py",
    "fastpeft/config.py",
    "fastpeft/fp8_reporting.py",
    "fastpeft/generation.py",
    "fastpeft/hub.py",
    "fastpeft/merging.py",
    "fastpeft/reporting.py",
    "fastpeft/requirements.py",
    "fastpeft/structured.py",
    "fastpeft/tuning.py",
    "fastpeft/verification.py",
    "fastpeft/yaml_loading.py",
    "fastpeft/cli/*.py",
    "fastpeft/data/*.py",
    "fastpeft/integrations/*.py",
    "fastpeft/layers/*.py",
    "fastpeft/memory/**/*.py",
    "fastpeft/models/*.py",
    "fastpeft/noticing/*.py",
    "fastpeft/replacements/*.py",
    "fastpeft/responsible/*.py",
    "fastpeft/strategies/compare/*.py",
    "fastpeft/strategies/few_shot/*.py",
    "fastpeft/strategies/dynamic/**/*.py",
    "fastpeft/training/*.py",
    "kernels/fastpeft_kernels/native/*.py",
    "kernels/fastpeft_kernels/weights/base.py",
)
"""Where every message must be on the page; the ops' own checks of arguments are described there as a whole."""

NOT_FOR_USERS = {
    "extra: expected one of …, got …",  # from our own code only
    "not installed",  # parts of another message
    "… is installed",
    "kind: expected one of …, got …",
    "FrozenWeight kind … is taken by …",
    "out: expected shape …, got …",
    "out: expected a tensor on …, got …",
    "could not be built here",
    "parameter …",
    "buffer …",
    "takes CPU tensors, got tensors on …",
    "takes fp32, fp16 and bf16, got …",
    "guessed: expected … labels and more than none, got …",
}


def template(node: ast.AST | None) -> str:
    """A string's text, with `…` for what varies; empty for anything but a string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[srd]", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return ""


def templates(node: ast.AST | None) -> list[str]:
    """A string's template, or those of both ends of an if-else."""
    if isinstance(node, ast.IfExp):
        return templates(node.body) + templates(node.orelse)
    return [template(node)]


def trees(*patterns: str) -> Iterator[ast.Module]:
    """One at a time: millions of nodes that stay would be searched for garbage by all later tests."""
    for path in sorted({path for pattern in patterns for path in ROOT.glob(pattern)}):
        yield ast.parse(path.read_text(encoding="utf-8"), str(path))


def messages(tree: ast.Module) -> Iterator[str]:
    """What a module raises, warns of, or gives as a reason to a user."""
    reasons = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and tells(f) for node in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            if getattr(node.exc.func, "id", "") != "AttributeError":
                yield from templates(node.exc.args[0])
        elif isinstance(node, ast.Return) and id(node) in reasons:
            yield from templates(node.value)
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "id", "") or getattr(node.func, "attr", "")
            if name in ("Left", "warning"):
                yield from templates(node.args[0])


def tells(function: ast.FunctionDef) -> bool:
    """Does it return a reason? By its annotation: `str | None`, or something `| str`."""
    returns = ast.unparse(function.returns) if function.returns else ""
    return "str" in re.findall(r"\w+", returns) and "|" in returns


def quoted() -> list[str]:
    """The messages on the page: in headings, and in the first cells of tables, where several stand one a line."""
    cells = re.findall(r"^(?:### |\| )(`[^`]+`(?:<br>`[^`]+`)*)", read(PAGE), re.MULTILINE)
    found = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(found) > 150
    return found


@cache
def covered() -> frozenset[str]:
    """All messages of COVERED that have a word."""
    every = {message for tree in trees(*COVERED) for message in messages(tree)}
    return frozenset(message for message in every if re.search(r"\w", message))


@cache
def every_text() -> set[str]:
    return {template(node) for tree in trees("fastpeft/**/*.py", "kernels/**/*.py") for node in ast.walk(tree)}


@pytest.mark.parametrize("message", quoted())
def test_the_source_has(message: str) -> None:
    assert message in every_text()


def test_the_notes_shown_elsewhere() -> None:
    shown = re.findall(r"^\| `([^`]+)`", read("docs/how-to/from-peft.md"), re.MULTILINE)
    assert len(shown) > 4
    for note in shown:
        assert any(re.fullmatch(re.escape(message).replace("…", ".+"), note) for message in covered()), note


def test_no_message_is_quoted_twice() -> None:
    assert sorted(quoted()) == sorted(set(quoted()))


def test_no_message_is_left_out() -> None:
    assert covered() - NOT_FOR_USERS - set(quoted()) == set()


def test_what_is_not_for_users_exists() -> None:
    assert covered() >= NOT_FOR_USERS
