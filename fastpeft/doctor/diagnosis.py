"""All checks, one after the other, each in its own guard."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from . import acceleration, assemblers, gpu, host, libraries, links, packages, quantised
from .findings import Finding, Status, guarded, worst
from .machine import Machine, look
from .private import scrub

LIMIT_S = 30.0  # of one check; a healthy machine needs a second or two for the slowest


@dataclass(frozen=True)
class Diagnosis:
    """What `examine` found; the package's docstring describes `to_dict`.

    Attributes:
        version: fastpeft's own.
        findings: in the order in which they are read best.
    """

    version: str
    findings: tuple[Finding, ...]

    @property
    def status(self) -> Status:
        return worst(self.findings)

    def to_dict(self, quiet: bool = False) -> dict[str, Any]:
        """JSON values; with `quiet` only the findings that are not ok."""
        shown = self.not_ok() if quiet else self.findings
        findings = [asdict(finding) | {"status": finding.status.value} for finding in shown]
        return {"fastpeft": self.version, "status": self.status.value, "findings": findings}

    def not_ok(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.status is not Status.ok)


def examine(machine: Machine | None = None) -> Diagnosis:
    """Look at everything. Changes nothing, but for Triton's cache of compiled kernels on a GPU.

    Args:
        machine: facts to judge instead of this machine's.

    Returns:
        The diagnosis, without user names and secrets. Takes 5 to 15 s, most of them for importing torch and
        bitsandbytes; a check that hangs costs LIMIT_S more.
    """
    from fastpeft import __version__

    found: list[Finding] = []
    with contextlib.redirect_stdout(sys.stderr):  # what an imported library prints must not get into the JSON
        facts = look() if machine is None else machine
        for name, check in _checks(facts, found):
            found += guarded(name, check, LIMIT_S)
    return Diagnosis(__version__, tuple(_without_names(finding) for finding in found))


def _checks(machine: Machine, found: list[Finding]) -> list[tuple[str, Callable[[], Iterable[Finding]]]]:
    """The checks by the name under which one that fails is listed; `found` fills up while they run."""
    return [
        ("system", host.system),
        ("python", host.python),
        ("gpu", lambda: gpu.gpus(machine)),
        ("driver", lambda: gpu.driver(machine)),
        ("torch", lambda: gpu.torch_build(machine)),
        ("cuda libraries", lambda: libraries.cuda_libraries(machine)),
        ("bf16", lambda: gpu.bf16(machine)),
        ("triton", lambda: assemblers.triton(machine)),
        ("ptxas", lambda: assemblers.ptxas(machine)),
        ("bitsandbytes", lambda: quantised.bitsandbytes(machine)),
        ("packages", packages.packages),
        ("compiler", lambda: host.compilers(machine)),
        ("ram", host.ram),
        ("disk", host.disks),
        ("link", lambda: links.links(machine)),
        ("acceleration", lambda: acceleration.acceleration(machine, {finding.name: finding for finding in found})),
    ]


def _without_names(finding: Finding) -> Finding:
    return replace(finding, text=scrub(finding.text), advice=scrub(finding.advice), values=scrub(finding.values))
