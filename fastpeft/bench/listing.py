"""A dry run of checks that only a GPU can run: they are imported and listed as on an H100, and called by none."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

from .recorder import Check, Recorder

_PROPERTIES = {
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "total_memory": 80 * 2**30,
    "L2_cache_size": 50 * 2**20,
}


def list_checks(recorder: Recorder, suites: Mapping[str, Callable[[], Iterable[Check]]]) -> None:
    """Record how many checks each op has.

    Args:
        suites: by op, what gives its checks.

    Raises:
        AssertionError: an op's cannot be imported or listed, or there are none; two of an op share their name, by which
            a run that is resumed knows what it did; or one cannot be called without arguments.
    """
    recorder.run_suites({op: [(f"list of {op}", partial(_listed, checks))] for op, checks in suites.items()})


def _listed(checks: Callable[[], Iterable[Check]]) -> dict[str, int]:
    with _hopper():
        found = list(checks())
    assert found, "no checks"
    twice = [name for name, count in Counter(name for name, _ in found).items() if count > 1]
    assert not twice, f"more than one check of a name: {', '.join(twice)}"
    for _, check in found:
        inspect.signature(check).bind()
    return {"checks": len(found)}


def _hopper() -> Any:
    """Torch says of its GPU what an H100 would."""
    import torch

    properties = SimpleNamespace(name="NVIDIA H100", **_PROPERTIES)
    return mock.patch.multiple(
        torch.cuda,
        is_available=lambda: True,
        current_device=lambda: 0,
        get_device_capability=lambda *_: (9, 0),
        get_device_properties=lambda *_: properties,
    )
