"""The soak's table and figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .flatness import ALLOWED, growth

WORDS = {
    "resident_kib": "resident memory, KiB",
    "heap_kib": "C heap in use, KiB",
    "blocks": "blocks of Python's allocator",
    "objects": "objects of Python's collector",
    "tensors": "tensors",
    "hooks": "hooks",
    "registered": "entries of our registries and caches",
    "descriptors": "file descriptors",
    "threads": "threads",
    "cache_kib": "cache and temporary files, KiB",
}
"""What each figure is called."""
_PANELS = (("resident_kib",), ("heap_kib",), ("objects",), ("tensors", "hooks", "registered", "descriptors", "threads"))


def table(record: dict[str, Any]) -> str:
    """What each figure grew by over the second half of each work; what is not flat is bold."""
    heads = [f"{name}: {work['units'][-1]:,}" for name, work in record.items()]
    lines = [f"| growth in the second half | allowed | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for name, words in WORDS.items():
        cells = [_cell(name, work["figures"][name]) for work in record.values()]
        lines.append(f"| {words} | {ALLOWED[name]:g} | {' | '.join(cells)} |")
    work = next(iter(record.values()))
    where = work["environment"]
    most = max(max(each["figures"]["resident_kib"]) for each in record.values()) / 2**10
    minutes = sum(each["cpu_s"] for each in record.values()) / 60
    lines += [
        "",
        f"Resident memory at the most: {most:.0f} MiB; {minutes:.0f} minutes of "
        f"processor time. {where['device']}, torch {where['versions']['torch']}, transformers "
        f"{where['versions']['transformers']}, peft {where['versions']['peft']}; `python -m benchmarks.soak`.",
    ]
    return "\n".join(lines)


def _cell(name: str, values: list[float]) -> str:
    value, low, high = growth(name, values).interval
    said = "0" if low == high == 0 else f"{value:+.0f} ({low:+.0f} to {high:+.0f})"
    return said if growth(name, values).flat else f"**{said}**"


def figure(record: dict[str, Any], path: Path) -> None:
    """Every figure above what it was at the first look, over the units of each work."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(3 * len(record), 7.5), layout="constrained")
    axes = drawn.subplots(len(_PANELS), len(record), squeeze=False, sharex="col")
    for column, (name, work) in enumerate(record.items()):
        axes[0][column].set_title(name, fontsize=9)
        axes[-1][column].set_xlabel("units done")
        for row, figures in enumerate(_PANELS):
            panel = axes[row][column]
            for one in figures:
                values = work["figures"][one]
                label = one if len(figures) > 1 else None
                panel.plot(work["units"], [value - values[0] for value in values], linewidth=1, label=label)
            panel.axvline(work["units"][len(work["units"]) // 2], color="0.8", linewidth=0.8, zorder=0)
            panel.tick_params(labelsize=7)
            panel.grid(axis="y", alpha=0.3)
    for row, figures in enumerate(_PANELS):
        axes[row][0].set_ylabel(WORDS[figures[0]] if len(figures) == 1 else "others", fontsize=8)
    axes[-1][-1].legend(fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, metadata={"Date": None})
