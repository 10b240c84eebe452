"""A mixed batch as the C++ of native/mixed.h takes it, made once for all groups and steps that are alike."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ..native.extension import group_extension
from .mixed_rows import RowGroups, row_groups, slots_of
from .projection import Group


def rows(group: Group, tokens: int) -> Any:
    """`row_groups` of a batch of so many tokens; the C++ must be there."""
    return _rows(row_groups(group, tokens))


def owned(group: Group) -> Any | None:
    """Which slot has each adapter of each projection; None where the C++ is not there."""
    if group_extension() is None:
        return None
    slots = slots_of(group.adapter_index or ())
    counts = tuple([len(projection.adapters) for projection in group.projections])
    slot_of = tuple([slots.get(adapter.index, -1) for p in group.projections for adapter in p.adapters])
    return _owned(len(slots), counts, slot_of)


@lru_cache(maxsize=256)
def _rows(groups: RowGroups) -> Any:
    extension, tensors = group_extension(), (groups.slots, groups.taken, groups.empty, groups.places)
    assert extension is not None
    return extension.Rows(len(groups.index), len(groups.owners), groups.count, *tensors)


@lru_cache(maxsize=256)
def _owned(slots: int, counts: tuple[int, ...], slot_of: tuple[int, ...]) -> Any:
    extension = group_extension()
    assert extension is not None
    return extension.Owned(slots, counts, slot_of)
