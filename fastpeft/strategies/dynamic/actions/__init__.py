"""Actions by name; a rule is one with its options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError
from fastpeft.hints import did_you_mean
from fastpeft.structured import build

from .base import Action, Run
from .dylora import Dylora
from .freeze import Freeze
from .pace import Pace
from .ranks import Ranks
from .rate import Rate
from .reweight import Reweight
from .sample import Sample
from .schedule import Schedule
from .stop import Stop

ACTIONS: dict[str, type[Action]] = {
    kind.name: kind for kind in (Freeze, Schedule, Sample, Ranks, Dylora, Reweight, Pace, Rate, Stop)
}

__all__ = ["ACTIONS", "Action", "Run", "rules_of"]


def rules_of(given: Sequence[dict[str, Any]], config: FastpeftConfig) -> list[Action]:
    """The rules of a configuration, checked as far as that alone can be.

    Args:
        given: `strategy.options.rules`.

    Raises:
        UserError: an unknown action, signal or option, one out of range, or rules that do not go together.
    """
    rules = []
    for number, rule in enumerate(given):
        key = f"strategy.options.rules[{number}]"
        name = rule.get("action")
        if name not in ACTIONS:
            hint = did_you_mean(name, ACTIONS) if isinstance(name, str) else ""
            raise UserError(f"{key}.action: expected one of {', '.join(ACTIONS)}, got {name!r}{hint}")
        kind = ACTIONS[name]
        try:
            options: Any = build(kind.Options, {key: value for key, value in rule.items() if key != "action"}, key)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
        rules.append(kind(options, number, config.training.seed))
        rules[-1].check(config)
    choosing = [rule for rule in rules if rule.chooses_layers]
    if len(choosing) > 1:
        raise UserError(
            f"{choosing[1].key}.action: expected one rule that chooses layers, got {choosing[1].name} beside "
            f"{choosing[0].name}"
        )
    changing = [rule for rule in rules if rule.name in ("ranks", "dylora")]
    if len({rule.name for rule in changing}) > 1:
        raise UserError(f"{changing[1].key}.action: expected ranks or dylora, got both")
    for name in ("ranks", "dylora", "reweight", "pace", "stop"):
        if len(same := [rule for rule in rules if rule.name == name]) > 1:
            raise UserError(f"{same[1].key}.action: expected one rule of {name}, got another")
    return rules
