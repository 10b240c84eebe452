"""What is fuzzed, by what it reads."""

from __future__ import annotations

from importlib import import_module

from benchmarks.fuzz.watching import Target

GROUPS = {
    "adapters": ("adapters' configurations", "stored tensors"),
    "configuration": ("configuration", "settings"),
    "rows": ("rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.parquet", "rows.txt", "prompts", "chat template"),
    "records": ("records", "two files of records", "pictures of records"),
    "models": ("models' configurations",),
    "notes": ("notes of runs",),
    "saved": ("tuning", "seals of checkpoints", "states of checkpoints"),
}
"""The file here that has each target, which imports what it needs."""


def target_of(name: str) -> Target:
    """Raises ValueError for a name that is none."""
    for group, names in GROUPS.items():
        if name in names:
            found: tuple[Target, ...] = import_module(f"{__name__}.{group}").TARGETS
            return next(target for target in found if target.name == name)
    raise ValueError(
        f"target: expected one of {', '.join(n for names in GROUPS.values() for n in names)}, got {name!r}"
    )
