"""The interface of a replacement."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import nn


class Match(NamedTuple):
    """The module can be replaced; `op` is the name under which the report lists it."""

    op: str


class Left(NamedTuple):
    """The module is of this replacement's kind, but stays as it is, for this reason; empty: it is not of its kind."""

    reason: str


class Replacement(Protocol):
    """One kind of replacement. `accelerate` asks every replacement about every module and knows no more than this.

    Precedence: the order of `REPLACEMENTS`; the first that matches a module installs itself, later ones see the module
    as it then is.

    Attributes:
        switch: the keyword of `accelerate` that turns it off.
    """

    switch: str

    def match(self, module: nn.Module) -> Match | Left | None:
        """Can the module be replaced? None when it is none of this replacement's business. Changes nothing."""

    def prove(self, module: nn.Module) -> Left | None:
        """What must hold on this very instance beyond its structure, tried out where structure cannot tell."""

    def install(self, module: nn.Module) -> None:
        """Replace, in place, keeping parameters, names and tree."""

    def installed(self, module: nn.Module) -> Match | None:
        """What serves the module when it is replaced already."""

    def finish(self, root: nn.Module, modules: dict[str, nn.Module]) -> None:
        """Called once after all were installed, with every module of this kind by path."""

    def undo(self, module: nn.Module) -> bool:
        """Put back what `install` changed; True when there was something to put back."""

    def status(self, module: nn.Module) -> tuple[str, str]:
        """(partners, note) for the report: what the module is computed with, and what happened in its calls so far."""
