"""A measured choice, and the text of a file of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

FORMAT = 1
_LONGEST_US = 1e12


class UnusableError(ValueError):
    """A file of choices that cannot be used; the message says why."""


@dataclass(frozen=True)
class Winner:
    """What was fastest in one case.

    Attributes:
        op: name of the choice, such as "decode_4bit".
        key: the case, by the names of the fields of the op's key; strings, integers, switches and lists of those.
        choice: the candidate that won.
        us: median microseconds of every candidate that gave right results.
    """

    op: str
    key: dict[str, Any]
    choice: str
    us: dict[str, float]

    @property
    def case(self) -> tuple[Any, ...]:
        """The key as the op has it: a tuple."""
        return tuple(tuple(value) if isinstance(value, list) else value for value in self.key.values())


def stamp() -> dict[str, Any]:
    """What a file must share with this process to be used: format and versions, those of others to the minor one."""
    from importlib import metadata

    from .. import __version__

    found: dict[str, Any] = {"format": FORMAT, "fastpeft_kernels": __version__}
    for package in ("torch", "triton"):
        try:
            found[package] = ".".join(metadata.version(package).split(".")[:2])
        except metadata.PackageNotFoundError:
            found[package] = ""
    return found


def to_text(device: str, winners: Iterable[Winner]) -> str:
    """A file for `device`: JSON, a line a winner."""
    head = json.dumps({**stamp(), "device": device})
    lines = ",\n".join(json.dumps(asdict(winner), allow_nan=False) for winner in winners)
    return f'{head[:-1]}, "winners": [\n{lines}\n]}}\n'


def from_text(text: str, device: str, any_versions: bool = False) -> list[Winner]:
    """What `to_text` was given.

    Args:
        text: of the file.
        device: the name that must be in it.
        any_versions: use it whatever versions wrote it, of the same format.

    Raises:
        UnusableError: it is not such a file, or one for another device, or other versions wrote it.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnusableError(f"not JSON: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("winners"), list):
        raise UnusableError("expected an object with a list of winners")
    if data.get("device") != device:
        raise UnusableError(f"expected device {device!r}, got {str(data.get('device'))[:80]!r}")
    wanted = {"format": FORMAT} if any_versions else stamp()
    for name, value in wanted.items():
        if data.get(name) != value:
            raise UnusableError(f"measured with {name} {str(data.get(name))[:40]}, here is {value}")
    return [_winner(number, row) for number, row in enumerate(data["winners"])]


def _winner(number: int, row: Any) -> Winner:
    if not isinstance(row, dict) or row.keys() != {"op", "key", "choice", "us"}:
        raise UnusableError(f"winners[{number}]: expected op, key, choice and us")
    op, key, choice, us = row["op"], row["key"], row["choice"], row["us"]
    if not isinstance(op, str) or not isinstance(choice, str):
        raise UnusableError(f"winners[{number}]: expected names for op and choice")
    if not isinstance(key, dict) or not all(_is_value(value) for value in key.values()):
        raise UnusableError(f"winners[{number}].key: expected strings, integers, switches, or lists of those")
    if not isinstance(us, dict) or not all(_is_time(value) for value in us.values()):
        raise UnusableError(f"winners[{number}].us: expected positive numbers below {_LONGEST_US:.0e}")
    return Winner(op, key, choice, us)


def _is_value(value: Any) -> bool:
    return all(isinstance(one, (str, int)) for one in (value if isinstance(value, list) else [value]))


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < _LONGEST_US
