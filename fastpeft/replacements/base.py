"""The interface of a replacement."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import nn


class Match(NamedTuple):
    """The module can be replaced.

    Attributes:
        op: the name under which the report lists it.
        found: what `match` and `prove` have learned, handed on to `prove` and `install`; its type is each kind's own.
    """

    op: str
    found: Any = None


class Left(NamedTuple):
    """The module is of this replacement's kind, but stays as it is, for this reason; empty: it is not of its kind."""

    reason: str


class Replacement(Protocol):
    """One kind of replacement. `accelerate` asks every replacement about every module and knows no more than this.

    Precedence: the order of `REPLACEMENTS`; the first that matches a module installs itself, later ones see the module
    as it then is.

    Attributes:
        switch: the keyword of `accelerate` that turns it off.
        adapts: whether it replaces what PEFT adapts or, as MLPs, what holds that; without any such `accelerate` warns.
    """

    switch: str
    adapts: bool

    def match(self, module: nn.Module) -> Match | Left | None:
        """Can the module be replaced? None when it is none of this replacement's business. Changes nothing."""

    def prove(self, module: nn.Module, matched: Match) -> Match | Left:
        """What must hold on this very instance beyond its structure, tried out where structure cannot tell."""

    def install(self, module: nn.Module, proved: Match) -> None:
        """Replace, in place, keeping parameters, names and tree; `proved` is of `prove`."""

    def installed(self, module: nn.Module) -> Match | None:
        """What serves the module when it is replaced already."""

    def finish(self, root: nn.Module, modules: dict[str, nn.Module], setting: Any) -> None:
        """Called once after all were installed, with every module of this kind by path, and the switch's value."""

    def undo(self, module: nn.Module) -> bool:
        """Put back what `install` changed; True when there was something to put back."""

    def status(self, module: nn.Module) -> tuple[str, str]:
        """(partners, note) for the report: what the module is computed with, and what happened in its calls so far."""
