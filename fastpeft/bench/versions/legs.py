"""Which versions are tested together: a leg is one environment."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fastpeft.integrations.versions import MINIMUM, MINIMUM_OF_EXTRAS

FLOORS = {name: least for name, least in (MINIMUM | MINIMUM_OF_EXTRAS).items() if name not in ("torch", "datasets")}
"""The oldest supported version of each package that legs install; the others are those of the environment they borrow
from."""
TORCH = MINIMUM["torch"]
"""The oldest supported torch, which only legs of its own install, with the Triton that it asks for."""
TOGETHER = ("all at their oldest", "all at their newest")


@dataclass(frozen=True)
class Leg:
    """One environment.

    Attributes:
        name: such as "peft at its oldest".
        versions: of each package of FLOORS; of torch too where the leg borrows nothing.
    """

    name: str
    versions: dict[str, str]

    @property
    def whole(self) -> bool:
        """Whether it borrows nothing, being of another torch, for which all that is compiled is another."""
        return "torch" in self.versions

    @property
    def folder(self) -> str:
        return self.name.replace(" at its ", "-").replace("all at their ", "all-")


def names() -> list[str]:
    """Of all legs, in their order; a package with fewer than three minor releases has no middle one."""
    middle = [f"{name} at its {age}" for name in FLOORS for age in ("oldest", "middle")]
    return [*TOGETHER, *middle, "torch at its oldest", "torch at its newest"]


def legs(releases: Mapping[str, list[str]]) -> Iterator[Leg]:
    """All at their oldest; all at their newest; then one at its oldest or middle version, the others at their newest;
    then torch at its oldest and newest, likewise.

    Args:
        releases: of each package of FLOORS and of torch, in any order. Of each minor release the last one counts, but
            the declared floor itself of the oldest.

    Raises:
        ValueError: a package without a supported release.
    """
    steps = {name: _steps(name, least, releases[name]) for name, least in FLOORS.items()}
    newest = {name: all_of[-1] for name, all_of in steps.items()}
    yield Leg(TOGETHER[0], {name: all_of[0] for name, all_of in steps.items()})
    yield Leg(TOGETHER[1], newest)
    for name, all_of in steps.items():
        yield Leg(f"{name} at its oldest", newest | {name: all_of[0]})
        if len(all_of) > 2:
            yield Leg(f"{name} at its middle", newest | {name: all_of[len(all_of) // 2]})
    torches = _steps("torch", TORCH, releases["torch"])
    yield Leg("torch at its oldest", newest | {"torch": torches[0]})
    yield Leg("torch at its newest", newest | {"torch": torches[-1]})


def _steps(name: str, least: str, releases: list[str]) -> list[str]:
    """The floor, then the last release of each later minor one."""
    floor = _numbers(least)
    known = sorted((numbers, release) for release in releases if (numbers := _numbers(release)) >= floor)
    if not known:
        raise ValueError(f"releases: expected some of {name}>={least}, got {', '.join(releases) or 'none'}")
    last = {numbers[:2]: release for numbers, release in known}
    return list(dict.fromkeys([known[0][1], *(release for minor, release in last.items() if minor > floor[:2])]))


def _numbers(release: str) -> tuple[int, int, int]:
    """(5, 17, 0) of "5.17" and of "5.17.0.post1"."""
    major, minor, patch = [*re.findall(r"\d+", release), "0", "0"][:3]
    return int(major), int(minor), int(patch)
