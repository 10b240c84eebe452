"""One input given to one reader, and whether what came of it keeps the promise."""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis.strategies import SearchStrategy

LONGEST_S = 2.0
"""Of processor time that an input of a few KiB may take."""
_WRITTEN = {
    "open": (0,),
    "os.mkdir": (0,),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.truncate": (0,),
    "os.chmod": (0,),
} | {
    "os.rename": (0, 1),
    "os.symlink": (1,),
    "os.link": (1,),
}
"""Of Python's audit events, the places of the paths that are written."""


@dataclass(frozen=True)
class Target:
    """A reader of what comes from outside.

    Attributes:
        name: what is read.
        file: what the file is called that holds the input.
        texts: inputs, valid ones and such as are nearly so.
        read: takes the file's path; reads it as its command does.
        refuses: errors with which it may say no.
        place: what must be found in the message; the file's name by default.
    """

    name: str
    file: str
    texts: SearchStrategy[bytes]
    read: Callable[[Path], Any]
    refuses: tuple[type[Exception], ...]
    place: str = ""


class Finding(NamedTuple):
    """An input that breaks the promise: what came of it, and the innermost function of the project."""

    what: str
    where: str


_LISTENERS: list[Callable[[str, tuple[Any, ...]], None]] = []
"""Of whichever input is read just now."""


class _TooLongError(BaseException):
    """No Exception: what is read must not take it for something wrong with the file."""


class Examiner:
    """Gives inputs to a target, in a folder that nothing may be written outside of.

    Args:
        folder: made before; holds the input, and what the reader writes.
        longest_s: of processor time.
        writable: the folder that may be written into, if not that one.

    Attributes:
        accepted: how many inputs were read and not refused.
    """

    def __init__(
        self, target: Target, folder: Path, longest_s: float = LONGEST_S, writable: Path | None = None
    ) -> None:
        self.target, self.folder, self.longest_s = target, folder.resolve(), longest_s
        self._writable = self.folder if writable is None else writable.resolve()
        self.accepted = 0
        self._outside: list[str] = []
        _listen()

    def __call__(self, data: bytes) -> Finding | None:
        """What is wrong; None where the promise holds."""
        path = self.folder / self.target.file
        path.write_bytes(data)
        self._outside.clear()
        try:
            with self._watched():
                self.target.read(path)
                self.accepted += 1
        except self.target.refuses as error:
            place = self.target.place or re.escape(path.name)
            if not re.search(place, str(error)):
                return Finding(f"{type(error).__name__} that names no place: {_line(error)}", _where(error))
        except (Exception, _TooLongError) as error:
            words = f"more than {LONGEST_S:g} s" if isinstance(error, _TooLongError) else _line(error)
            return Finding(f"{type(error).__name__}: {words}", _where(error))
        if self._outside:
            return Finding(f"written outside: {self._outside[0]}", self.target.name)
        return None

    @contextmanager
    def _watched(self) -> Iterator[None]:
        before = signal.signal(signal.SIGPROF, _too_long)
        signal.setitimer(signal.ITIMER_PROF, self.longest_s)
        _LISTENERS.append(self._heard)
        try:
            yield
        finally:
            _LISTENERS.clear()
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _WRITTEN or (event == "open" and not _writes(*arguments[1:])):
            return
        for name in (arguments[place] for place in _WRITTEN[event]):
            if not isinstance(name, (str, bytes, os.PathLike)):  # a handle of a file that was opened before
                continue
            handle = arguments[-1] if event != "open" and isinstance(arguments[-1], int) else -1
            folder = Path(os.readlink(f"/proc/self/fd/{handle}")) if handle >= 0 else Path.cwd()
            path = folder / os.fsdecode(name)
            if event == "os.mkdir" and path.exists():  # which makes nothing
                continue
            if path != Path("/dev/null") and self._writable not in (path, *path.parents):
                self._outside.append(f"{event} {path}")


def _writes(mode: str | None, flags: int) -> bool:
    """Whether a file is opened for more than reading; os.open has no mode."""
    return bool(set(mode) & set("wax+")) if mode else bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


@cache
def _listen() -> None:
    """Once a process: an audit hook stays."""

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        for listener in _LISTENERS:
            listener(event, arguments)

    sys.addaudithook(heard)


def _too_long(number: int, frame: Any) -> None:
    raise _TooLongError


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _where(error: BaseException) -> str:
    """The innermost function of the project."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/fastpeft" in frame.filename]
    frames = [frame for frame in frames if "site-packages" not in frame.filename]
    if not frames:
        return "outside of the project"
    return f"{Path(frames[-1].filename).name}: {frames[-1].name}"
