"""A plan for people."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from ..sizes import gib

if TYPE_CHECKING:
    from .planning import Plan


LABELS = {"total": "predicted peak", "host": "pinned host memory", "disk": "weights on the disk"}


def render(plan: Plan) -> str:
    """Every component, the peak, each layer's policy, and what would fit."""
    settings = ", ".join(f"{key} {value}" for key, value in plan.settings.items())
    lines = [f"fastpeft plan: {plan.model}; {settings}", ""]
    for name, size in plan.bytes.items():
        lines += [""] if name == "total" else []
        label = LABELS.get(name, name)
        lines += [f"{label:26}{gib(size):>14}"]
        lines += [f"{'GPU memory':26}{gib(plan.gpu_memory):>14}", ""] if name == "total" else []
    lines += ["", f"peak in: {plan.need.when}", f"policy: {policy_text(plan.policy.layers)}"]
    lines += [
        f"time of a step beside keeping all: {plan.need.slowdown:.2f} (told from FLOPs and the link, not measured)"
    ]
    tokens = plan.settings["seq"] * plan.settings["batch"]
    if plan.need.hidden_from is not None:
        lines += [_hides("copies of streamed weights", tokens, plan.need.hidden_from, "told from the same")]
    if plan.need.read_hidden_from is not None:
        disk, read = plan.rates.disk, 2 * plan.need.disk
        told = f"told from {disk / 1e9:g} GB/s, not measured"
        lines += [
            _hides("reads from the disk", tokens, plan.need.read_hidden_from, told),
            f"a step reads {gib(read)} from the disk, which takes {read / disk:.1f} s at least",
        ]
    for what, longest, most in (
        ("with every layer recomputed", plan.largest_sequence, plan.largest_batch),
        ("with any policy", plan.most_sequence, plan.most_batch),
    ):
        if longest is not None:
            lines += [f"{what}: at most seq {longest} at this batch, batch {most} at this seq"]
    lines += [f"note: {note}" for note in plan.notes]
    if plan.fits:
        return "\n".join([*lines, "it fits"])
    return "\n".join([*lines, "it does not fit; what would:", *(f"  {change}" for change in plan.changes)])


def _hides(what: str, tokens: int, least: int, told: str) -> str:
    hide = "hide" if tokens >= least else "do not hide"
    return f"{what} {hide} behind computing: {tokens} tokens a step, they do from {least} on ({told})"


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
