"""Which versions of other packages are supported: the oldest of each, and one sentence about an older one.

The only file that compares versions; `fastpeft.bench.versions` tests the oldest, middle and newest ones. Imports none
of the packages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib import metadata

MINIMUM = {"torch": "2.11", "transformers": "5.17", "peft": "0.19.1", "accelerate": "1.10", "bitsandbytes": "0.49"}
"""As in pyproject.toml, which a tree that is used without being installed does not bring."""
MINIMUM_OF_EXTRAS = {"trl": "1.10", "datasets": "4"}
"""Before 4 `datasets` ran code that came with data."""
_TAKEN_OUT = "_prepare_encoder_decoder_kwargs_for_generation"
"""What PEFT before 0.21 reads of an encoder-decoder; transformers 5.17 has it, 5.21 has not."""
CORE = ("torch", "transformers", "peft")
"""What accelerating a model cannot do without."""


def check_versions(packages: Iterable[str] = MINIMUM) -> str | None:
    """One sentence about packages that are missing or older than MINIMUM; None when all is well.

    Args:
        packages: names, as pip has them; those of MINIMUM.
    """
    found = [(f"{name}>={MINIMUM[name]}", too_old(name)) for name in packages]
    wrong = {wanted: have for wanted, have in found if have}
    if not wrong:
        return None
    needs = ", ".join(f"{wanted} ({have})" for wanted, have in wrong.items())
    command = " ".join(["pip install --upgrade", *(f'"{wanted}"' for wanted in wrong)])
    return f"fastpeft needs {needs}: {command}"


@cache
def require_core() -> None:
    """Raise ImportError, in one sentence, unless CORE is installed and new enough."""
    if problem := check_versions(CORE):
        raise ImportError(problem)


def told_by(error: Exception) -> str | None:
    """One sentence, if PEFT failed at an encoder-decoder for being older than what transformers took out of it."""
    if isinstance(error, AttributeError) and _TAKEN_OUT in str(error):
        have = " and ".join(f"{name} {metadata.version(name)}" for name in ("peft", "transformers"))
        return (
            f"encoder-decoders of transformers above 5.17 need peft>=0.21, got {have}: "
            'pip install --upgrade "peft>=0.21"'
        )
    return None


def too_old(package: str) -> str | None:
    """What is installed in place of a supported version: "0.17.1 is installed", "not installed"; None if all is well.

    Packages of which any version will do need only be there.
    """
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
    least = (MINIMUM | MINIMUM_OF_EXTRAS).get(package, "0")
    return f"{installed} is installed" if _release(installed) < _release(least) else None


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers: (2, 13) of "2.13.0+cpu"; zeros at the end and parts such as rc1 and dev0 are left out."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    parts = list(map(int, numbers[0].split("."))) if numbers else []
    while parts and not parts[-1]:
        parts.pop()
    return tuple(parts)
