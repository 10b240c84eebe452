"""The hub: whether it answers. Its libraries try for half a minute where there is no network."""

from __future__ import annotations

from functools import cache

WAIT_S = 3.0


def unreachable() -> str | None:
    """Why the hub cannot be asked; None if it can. Once it has answered it is not asked again."""
    try:
        _ask()
    except ConnectionError as error:
        return str(error)
    return None


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
