"""Nothing that is printed says who the user is, or holds a secret: such output ends up in bug reports."""

from __future__ import annotations

import getpass
import os
import re
from pathlib import Path
from typing import Any

_SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|_KEY$", re.IGNORECASE)
_SECRETS = re.compile(r"\b(hf_\w{8,}|sk-[\w-]{8,}|gh[a-z]_\w{8,}|github_pat_\w+)|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_HOMES = re.compile(r"((?:/home|/Users|[A-Za-z]:[\\/]+Users)[\\/]+)[^\\/\s:;,'\"]+", re.IGNORECASE)
_SHORTEST = 6  # a shorter value is no secret, and would blot out half the report


def scrubber() -> re.Pattern[str]:
    """What of this user must not be shown: values of secret environment variables, and the name as part of a path."""
    secrets = {value for name, value in os.environ.items() if _SECRET_NAMES.search(name) and len(value) >= _SHORTEST}
    parts = [re.escape(value) for value in sorted(secrets, key=len, reverse=True)]
    if user := _user():
        parts.append(rf"(?<=[\\/]){re.escape(user)}(?=[\\/\s:;,'\"]|$)")
    return re.compile("|".join(parts) or r"(?!)")


def scrub(value: Any) -> Any:
    """A JSON value whose texts hold no home folder, user name or secret; keys stay."""
    return _scrubbed(value, scrubber(), _home())


def _scrubbed(value: Any, personal: re.Pattern[str], home: str) -> Any:
    if isinstance(value, dict):
        return {key: _scrubbed(below, personal, home) for key, below in value.items()}
    if isinstance(value, (list, tuple)):
        return [_scrubbed(below, personal, home) for below in value]
    if not isinstance(value, str):
        return value
    if home:
        value = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", value)
    value = _HOMES.sub(r"\1<user>", _SECRETS.sub("<secret>", value))
    return personal.sub(lambda found: "<user>" if found[0] == _user() else "<secret>", value)


def _home() -> str:
    try:
        home = Path.home()
    except RuntimeError:
        return ""
    return str(home) if len(home.parts) > 1 else ""  # "/" where a container's user has none


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user without a name
        return ""
