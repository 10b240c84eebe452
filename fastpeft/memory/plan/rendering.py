"""A plan for people."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from ..sizes import gib

if TYPE_CHECKING:
    from .planning import Plan


def render(plan: Plan) -> str:
    """Every component, the peak, each layer's policy, and what would fit."""
    settings = ", ".join(f"{key} {value}" for key, value in plan.settings.items())
    lines = [f"fastpeft plan: {plan.model}; {settings}", ""]
    for name, size in plan.bytes.items():
        lines += [""] if name == "total" else []
        label = {"total": "predicted peak", "host": "pinned host memory"}.get(name, name)
        lines += [f"{label:26}{gib(size):>14}"]
        lines += [f"{'GPU memory':26}{gib(plan.gpu_memory):>14}", ""] if name == "total" else []
    lines += ["", f"peak in: {plan.need.when}", f"policy: {policy_text(plan.policy.layers)}"]
    lines += [
        f"time of a step beside keeping all: {plan.need.slowdown:.2f} (told from FLOPs and the link, not measured)"
    ]
    if plan.need.hidden_from is not None:
        tokens = plan.settings["seq"] * plan.settings["batch"]
        hide = "hide" if tokens >= plan.need.hidden_from else "do not hide"
        lines += [
            f"copies of streamed weights {hide} behind computing: {tokens} tokens a step, "
            f"they do from {plan.need.hidden_from} on (told from the same)"
        ]
    for what, tokens, rows in (
        ("with every layer recomputed", plan.largest_sequence, plan.largest_batch),
        ("with any policy", plan.most_sequence, plan.most_batch),
    ):
        if tokens is not None:
            lines += [f"{what}: at most seq {tokens} at this batch, batch {rows} at this seq"]
    lines += [f"note: {note}" for note in plan.notes]
    if plan.fits:
        return "\n".join([*lines, "it fits"])
    return "\n".join([*lines, "it does not fit; what would:", *(f"  {change}" for change in plan.changes)])


def policy_text(layers: Any) -> str:
    """Runs of layers that do the same, "0-15 recompute, 16-31 keep"; tiles that all have are said once."""
    if not isinstance(layers, tuple):
        return f"every layer {_one(layers)}{_tiles(layers.tile)}"
    alike = len({layer.tile for layer in layers}) == 1
    parts, first = [], 0
    for layer, run in groupby(layers):
        count = len(list(run))
        span = f"{first}" if count == 1 else f"{first}-{first + count - 1}"
        parts.append(f"{span} {_one(layer)}{'' if alike else _tiles(layer.tile)}")
        first += count
    return (", ".join(parts) or "no layers") + (_tiles(layers[0].tile) if alike else "")


def _one(layer: Any) -> str:
    return str(layer.activations) + " and streamed" * layer.streamed


def _tiles(tile: int) -> str:
    return f"; MLPs in tiles of {tile} tokens" if tile else ""
