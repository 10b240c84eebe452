"""Which layers are siblings, written down by their paths, and made such again without watching.

Which they are may depend on the first batch: on the experts that it reached, on the layers that were dropped by chance.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .frozen import can_join, join
from .lora import FastLoraLayer
from .siblings import Sibling, SiblingGroup


@dataclass(frozen=True)
class Grouping:
    """What was found out of a model.

    Attributes:
        groups: each one's members in calling order, by path.
        alone: adapted layers without siblings. Those of neither are still waited for.
    """

    groups: list[list[str]]
    alone: list[str]


def grouping_of(root: nn.Module) -> Grouping:
    """What was found out so far."""
    siblings = {module: path for path, module in root.named_modules() if isinstance(module, Sibling)}
    groups = {id(group): group for one in siblings if one.is_member() and (group := one.fastpeft_group) is not None}
    whole = [group for group in groups.values() if siblings.keys() >= set(group.members)]
    adapted = {one: path for one, path in siblings.items() if isinstance(one, FastLoraLayer)}
    return Grouping(
        [[siblings[one] for one in group.members] for group in whole],
        [path for one, path in adapted.items() if not one.is_member() and one.fastpeft_watch is None],
    )


def group_again(root: nn.Module, found: Grouping) -> None:
    """Nothing of it is looked for any more. A group that cannot be, in this model, is left to watching.

    Call it before the first forward: `root` is accelerated, and nothing in it has been found out yet.
    """
    modules = dict(root.named_modules())
    decided = [modules[path] for path in found.alone if path in modules]
    for paths in found.groups:
        members, parents = [modules.get(path) for path in paths], {path.rpartition(".")[0] for path in paths}
        adapted = [one for one in members if isinstance(one, FastLoraLayer)]
        if adapted and len(parents) == 1 and len(set(paths)) == len(paths) > 1 and all(map(_may_join, members)):
            siblings = [one if isinstance(one, Sibling) else join(one) for one in members if one is not None]
            SiblingGroup().form(modules[parents.pop()], siblings)
            decided += adapted
    for layer in decided:
        if isinstance(layer, FastLoraLayer) and layer.fastpeft_watch is not None:
            layer.fastpeft_watch.forget([layer])


def _may_join(module: nn.Module | None) -> bool:
    if isinstance(module, FastLoraLayer):
        return module.fastpeft_group is None
    return module is not None and can_join(module)
