"""What a documentation page holds that can be run, and running it.

A page is read from top to bottom: fenced blocks, and comments for this test, which no reader sees.

    <!-- test: setup CODE -->                  Python to run here; may span lines; what it prints counts as printed
    <!-- test: replace "NAME" by "OTHER" -->   in every block from here on; `by shipped`: the shipped model's folder
    <!-- test: skip REASON -->                 do not run the next block
    <!-- test: output -->                      the next block, of text, is what the block before it printed
    <!-- test: output, details vary -->        the same but for numbers, dotted names and the spaces around them
    <!-- test: exit 2 -->                      the next block's commands end with this code (or `exit 0 or 1`); what
                                               they say on stderr counts as printed

The Python blocks of a page share one namespace, in which `printed` is what the last block that ran printed, and `shown`
the text of the last JSON block. A shell block holds commands that begin with `fastpeft`, or is skipped; a YAML block is
a configuration of `fastpeft.config`; a JSON block is one value, or one a line. A block with a title is also written to
a file of that name, for the blocks after it.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fastpeft
from tests.fresh import ROOT

SHIPPED_MODEL = Path(fastpeft.__file__).parent / "quickstart" / "assets" / "model"
LANGUAGES = ("python", "bash", "console", "yaml", "json", "text")

_FENCE = re.compile(r"(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>.*)")
_COMMENT = re.compile(r"<!--\s*test:(?P<words>.*?)-->", re.DOTALL)
_REPLACE = re.compile(r'replace "(?P<old>[^"]+)" by (?:"(?P<new>[^"]*)"|(?P<shipped>shipped))')
_EXIT = re.compile(r"exit (?P<codes>\d+( or \d+)*)")
_TITLE = re.compile(r'title="(?P<name>[^"]+)"')
_DETAIL = re.compile(r"\s*([-+]?\d[\d.,]*(e[-+]?\d+)?|[A-Za-z_]\w*(\.\w+)+)\s*")


class PageError(Exception):
    """Something is wrong with a page; names the page and the line."""


@dataclass(frozen=True)
class Setup:
    """Hidden Python."""

    line: int
    code: str


@dataclass(frozen=True)
class Replace:
    """In all blocks from here on."""

    old: str
    new: str


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: of its first line of text.
        language: one of LANGUAGES, or "" in pages that may hold blocks without one.
        text: what stands between the fences.
        title: a file's name, or "".
        skip: why it is not run; None when it is.
        output: None, "exact" or "details vary": how it agrees with what the block before printed.
        codes: with which its commands may end.
    """

    line: int
    language: str
    text: str
    title: str = ""
    skip: str | None = None
    output: str | None = None
    codes: tuple[int, ...] = (0,)


Step = Setup | Replace | Block


def read_page(text: str, page: str, unnamed: bool = False) -> list[Step]:
    """The steps of a page, in order.

    Args:
        text: of the page.
        page: its name, for messages.
        unnamed: whether blocks without a language may occur; they are not run.

    Raises:
        PageError: a comment that is not one of those above, a `skip` without a reason, one that no block follows, a
            fence that does not end, or a language that is not one of LANGUAGES.
    """
    steps: list[Step] = []
    pending: dict[str, Any] = {}
    lines = text.split("\n")
    at = 0
    while at < len(lines):
        line, number = lines[at], at + 1
        where = f"{page}:{number}"
        if "<!-- test:" in line or "<!--test:" in line:
            comment = _COMMENT.match("\n".join(lines[at:]).lstrip())
            if comment is None:
                raise PageError(f"{where}: a comment for the test that does not end, or that other text stands before")
            _read_comment(comment["words"], where, number, steps, pending)
            at += comment[0].count("\n") + 1
            continue
        opening = _FENCE.fullmatch(line)
        if opening is not None:
            end = next((i for i in range(at + 1, len(lines)) if lines[i].strip() == opening["fence"]), None)
            if end is None:
                raise PageError(f"{where}: a block that does not end")
            language = (opening["info"].split() or [""])[0]
            if language not in LANGUAGES and not (unnamed and language == ""):
                raise PageError(f"{where}: expected a block of one of {', '.join(LANGUAGES)}, got {language!r}")
            body = textwrap.dedent("\n".join(lines[at + 1 : end]))
            title = _TITLE.search(opening["info"])
            steps.append(Block(number + 1, language, body, title["name"] if title else "", **pending))
            pending.clear()
            at = end
        elif line.strip() and pending:
            raise PageError(f"{where}: expected a block after the comment before, got {line.strip()[:40]!r}")
        at += 1
    if pending:
        raise PageError(f"{page}: expected a block after the last comment, got the end of the page")
    return steps


def _read_comment(words: str, where: str, number: int, steps: list[Step], pending: dict[str, Any]) -> None:
    words = words.strip()
    verb = (words.split() or [""])[0]
    rest = words.removeprefix(verb)
    if verb == "setup" and rest:
        steps.append(Setup(number, textwrap.dedent(rest.strip("\n"))))
    elif verb == "replace" and (found := _REPLACE.fullmatch(words)):
        steps.append(Replace(found["old"], str(SHIPPED_MODEL) if found["shipped"] else found["new"]))
    elif verb == "skip":
        if len(rest.split()) < 2:
            raise PageError(f"{where}: skip: expected a reason in words, got {rest.strip()!r}")
        pending["skip"] = rest.strip()
    elif verb == "exit" and (found := _EXIT.fullmatch(words)):
        pending["codes"] = tuple(int(code) for code in found["codes"].split(" or "))
    elif words in ("output", "output, details vary"):
        pending["output"] = "exact" if words == "output" else "details vary"
    else:
        raise PageError(f"{where}: not a comment that the test knows: {' '.join(words.split())!r}")


@dataclass
class Runner:
    """Runs the steps of one page in the current folder.

    Attributes:
        page: its name, for messages and tracebacks.
        namespace: what the page's Python sees.
        printed: by the last block that ran, or the last hidden code that printed.
    """

    page: str
    namespace: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    replacements: list[Replace] = field(default_factory=list)
    printed: str = ""

    def run(self, steps: list[Step]) -> None:
        for step in steps:
            if isinstance(step, Replace):
                self.replacements.append(step)
            elif isinstance(step, Setup):
                self.printed = self._python(step.code, step.line) or self.printed
            elif step.output is not None:
                self._compare(step)
            elif step.skip is None:
                self._block(step)

    def text_of(self, block: Block) -> str:
        """A block's text with the replacements so far."""
        text = block.text
        for one in self.replacements:
            text = text.replace(one.old, one.new)
        return text

    def _block(self, block: Block) -> None:
        text = self.text_of(block)
        if block.title:
            Path(block.title).write_text(text + "\n")
        if block.language == "python":
            self.printed = self._python(text, block.line)
        elif block.language in ("bash", "console"):
            self.printed = "".join(self._command(one, block) for one in commands(text, block.language))
        elif block.language == "yaml":
            from fastpeft.config import FastpeftConfig

            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, block.title or self.page)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
                FastpeftConfig.from_yaml(path)
        elif block.language == "json":
            read_json(text)
            self.namespace["shown"] = text
        self.namespace["printed"] = self.printed

    def _python(self, code: str, line: int) -> str:
        compiled = compile("\n" * (line - 1) + code, str(ROOT / self.page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compiled, self.namespace)
        return out.getvalue()

    def _command(self, command: str, block: Block) -> str:
        from fastpeft.cli.app import run

        where = f"{self.page}:{block.line}"
        words = shlex.split(command, comments=True)
        if words[:1] != ["fastpeft"]:
            raise PageError(f"{where}: expected `fastpeft ...` or a skip with its reason, got {command!r}")
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.ExitStack() as stack:
            if block.codes != (0,):
                stack.enter_context(contextlib.redirect_stderr(out))
            code = run(words[1:])
        if code not in block.codes:
            raise PageError(f"{where}: exit code {code} of {command!r}\n{out.getvalue()}")
        return out.getvalue()

    def _compare(self, block: Block) -> None:
        simplify = without_details if block.output == "details vary" else without_trailing_spaces
        if simplify(block.text) != simplify(self.printed):
            raise PageError(
                f"{self.page}:{block.line}: the page shows\n{block.text}\nbut this was printed:\n{self.printed}"
            )


def commands(text: str, language: str) -> Iterator[str]:
    """The commands of a shell block; lines that end in a backslash are joined. In a console they follow `$ `."""
    for line in text.replace("\\\n", " ").splitlines():
        if language == "console" and not line.startswith("$ "):
            continue
        command = line.removeprefix("$ ").strip()
        if command and not command.startswith("#"):
            yield command


def read_json(text: str) -> Any:
    """One value, or a list of the values of all lines."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines()]


def without_trailing_spaces(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def without_details(text: str) -> str:
    """Numbers, dotted names and the spaces around them replaced by a sign."""
    return "\n".join(_DETAIL.sub("#", line.rstrip()) for line in text.strip().splitlines())
