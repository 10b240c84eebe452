"""The hub: whether it answers, and what it is not told. Its libraries try for long where there is no network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

WAIT_S = 3.0


def unreachable() -> str | None:
    """Why the hub cannot be asked; None if it can. Once it has answered it is not asked again."""
    try:
        _ask()
    except ConnectionError as error:
        return str(error)
    return None


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Meanwhile the hub's client tells nobody what is used: TRL has it do so for every trainer that is made."""
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_TELEMETRY
    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = before


@cache
def _ask() -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set")
    try:
        get_session().head(constants.ENDPOINT, timeout=WAIT_S)
    except Exception as error:  # the HTTP library's own; which one that is has changed
        raise ConnectionError(f"{constants.ENDPOINT} cannot be reached: {error}") from error
