"""A mixed batch as the C++ of native/mixed.h takes it, made once for all groups and steps that are alike."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ..native.extension import group_extension
from .mixed_rows import RowGroups, row_groups, slots_of
from .projection import Group


def rows(group: Group, tokens: int) -> Any | None:
    """`row_groups` of a batch of so many tokens, with its products; None where `_is_there` does not hold."""
    return _rows(row_groups(group, tokens)) if _is_there() else None


def owned(group: Group) -> Any | None:
    """Which slot has each adapter of each projection; None where `_is_there` does not hold."""
    return _owned(group.adapter_index or (), group.numbers()) if _is_there() else None


def _is_there() -> bool:
    """Whether the C++ is compiled, and no compiler has to look into what is called, which a compiled backward has."""
    return not torch.compiler.is_compiling() and group_extension() is not None


@lru_cache(maxsize=256)
def _rows(groups: RowGroups) -> Any:
    extension, tensors = group_extension(), (groups.slots, groups.taken, groups.empty, groups.places)
    assert extension is not None
    return extension.Rows(len(groups.index), len(groups.owners), groups.count, *tensors)


@lru_cache(maxsize=256)
def _owned(index: tuple[int, ...], numbers: tuple[tuple[int, ...], ...]) -> Any:
    extension, slots = group_extension(), slots_of(index)
    assert extension is not None
    slot_of = [slots.get(number, -1) for own in numbers for number in own]
    return extension.Owned(len(slots), [len(own) for own in numbers], slot_of)
