"""Work in a process of its own: what crashes or hangs there costs only itself."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from fastpeft.bench.left_out import reason_of

Make = Callable[[Any, "Line", float], Callable[[Any], Any]]
"""Called in the process with what was given, its `Line`, and when it was started, as `time.time` has it."""


_PARTING_S = 10.0  # a process that notices that it is asked no more ends by itself


class LeftOutError(Exception):
    """A process gave no answer; the message says why in a line."""


class Line:
    """The process's end: `tell` answers, `listen` waits for the next question."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def listen(self) -> Any:
        return self._connection.recv()

    def tell(self, answer: Any) -> None:
        self._connection.send(("answer", answer))


class Worker:
    """A fresh process that answers questions; a context, at whose end it and all that it started are gone.

    Args:
        make: a function of a module, called there; what it returns is asked the questions.
        given: what can be pickled.
        log: a file for all that it prints.
        limit_s: seconds that an answer may take.
        imported: modules that it finds imported already: it is forked from a process that imported them once.
    """

    def __init__(self, make: Make, given: Any, log: Path, limit_s: float, imported: Sequence[str] = ()) -> None:
        self.log, self.limit_s = log, limit_s
        self._answers = True
        log.parent.mkdir(parents=True, exist_ok=True)
        context: Any = multiprocessing.get_context("forkserver" if imported else "spawn")
        if imported:
            context.set_forkserver_preload(list(imported))
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, given, theirs, str(log), time.time()))
        self._process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, question: Any) -> Any:
        """Its answer.

        Raises:
            LeftOutError: it failed, ended, or took too long.
        """
        with suppress(OSError):  # it may have failed before; then its reason is here to be read
            self._connection.send(question)
        try:
            if not self._connection.poll(self.limit_s):
                self._answers = False
                raise LeftOutError(f"no answer in {self.limit_s:.0f} s")
            kind, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(10)
            raise LeftOutError(_ending(self._process.exitcode)) from error
        if kind == "failure":
            raise LeftOutError(answer)
        return answer

    def close(self) -> None:
        self._connection.close()
        if self._answers:
            self._process.join(_PARTING_S)
        pid = self._process.pid
        if pid and hasattr(os, "killpg"):  # children too: compilers, loaders of rows
            with suppress(ProcessLookupError, PermissionError):
                if os.getpgid(pid) == pid:
                    os.killpg(pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()


def _ending(code: int | None) -> str:
    if code == -9:
        return "ended by signal 9; the system ends processes so when memory runs out"
    return f"ended by signal {-code}" if code and code < 0 else f"ended with code {code}"


def _serve(make: Make, given: Any, connection: Connection, log: str, started: float) -> None:
    if hasattr(os, "setsid"):
        os.setsid()
    with open(log, "ab", buffering=0) as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    line = Line(connection)
    try:
        answer = make(given, line, started)
        while True:
            question = line.listen()
            line.tell(answer(question))
    except EOFError:
        return
    except BaseException as error:
        traceback.print_exc()
        with suppress(OSError):
            connection.send(("failure", _why(error)))


def _why(error: BaseException) -> str:
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError"):
        return "out of memory"
    return reason_of(error)
