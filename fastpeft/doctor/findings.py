"""What a check says, and checks that can neither bring each other down nor hang."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

T = TypeVar("T")


class Status(str, Enum):
    """From harmless to bad, in this order; the package's docstring says what each means."""

    ok = "ok"
    note = "note"
    warning = "warning"
    problem = "problem"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what was looked at; unique in a diagnosis.
        status: how it is.
        text: what was found, in a line or two.
        advice: what to do about it, one sentence; empty exactly where the status is ok.
        values: the same for programs: JSON values, units in the keys' endings.
    """

    name: str
    status: Status
    text: str
    advice: str = ""
    values: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.status is Status.ok) == bool(self.advice):
            expected = "none with status ok" if self.status is Status.ok else f"some with status {self.status.value}"
            raise ValueError(f"advice: expected {expected}, got {self.advice!r}")


def ok(name: str, text: str, /, **values: Any) -> Finding:
    return Finding(name, Status.ok, text, values=values)


def note(name: str, text: str, advice: str, /, **values: Any) -> Finding:
    return Finding(name, Status.note, text, advice, values)


def warning(name: str, text: str, advice: str, /, **values: Any) -> Finding:
    return Finding(name, Status.warning, text, advice, values)


def problem(name: str, text: str, advice: str, /, **values: Any) -> Finding:
    return Finding(name, Status.problem, text, advice, values)


def worst(findings: Iterable[Finding]) -> Status:
    """The worst status among them; ok when there are none."""
    order = list(Status)
    return max((finding.status for finding in findings), key=order.index, default=Status.ok)


def attempt(ask: Callable[[], T], limit_s: float) -> T:
    """What `ask` returns, asked in a thread, because a call into a stuck driver or file system never comes back.

    Raises:
        TimeoutError: it took longer than `limit_s` seconds; it goes on, and the process can end without it.
        RuntimeError: it tried to end the process.
        Exception: its own.
    """
    answers: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            answers.append(ask())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(limit_s)
    if errors:
        raise errors[0] if isinstance(errors[0], Exception) else RuntimeError(f"stopped by {errors[0]!r}")
    if not answers:
        raise TimeoutError(f"no answer in {limit_s:g} s")
    return answers[0]


def guarded(name: str, check: Callable[[], Iterable[Finding]], limit_s: float) -> list[Finding]:
    """What a check finds. One that raises or hangs becomes a warning of this name, after what it had found by then."""
    found: list[Finding] = []
    try:
        attempt(lambda: found.extend(check()), limit_s)
    except TimeoutError as error:
        name = _unused(name, found)
        advice = "Look for a stuck driver or file system; restarting the machine mostly helps."
        return [*found, warning(name, f"this check hangs: {error}", advice, error=str(error))]
    except Exception as error:
        name, said = _unused(name, found), in_short(error)
        advice = "Please report this as a bug of fastpeft, with what `fastpeft doctor --json` prints."
        return [*found, warning(name, f"this check failed: {said}", advice, error=said)]
    return found


def _unused(name: str, found: list[Finding]) -> str:
    return f"{name}, rest" if any(finding.name == name for finding in found) else name


def in_short(error: BaseException | str, length: int = 200) -> str:
    """An error in one line: its class, and the first line of its message that says anything."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else ""
    if isinstance(error, BaseException):
        said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return said if len(said) <= length else f"{said[: length - 3]}..."


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.1f} GiB"
