"""The longest context, and the largest batch, that fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastpeft.models.bases import checked_length, is_rotary

from ..policy import LayerPolicy, MemoryPolicy
from .choosing import LEAST, OFFLOAD, RECOMPUTE, STREAMED, Need, need, tiled
from .predicting import Model, Setting
from .timing import Rates

EXTREMES = (LEAST, OFFLOAD, STREAMED, RECOMPUTE)
"""The last three for where the host's memory ends first. Each is tried in tiles, too."""
STEP = 64
STRAIGHT = 16384
"""Tokens of a forward pass from which on bytes grow in a straight line: the loss's blocks do not grow any more."""
TRIES = 8
MOST_TOKENS = 1 << 24


def largest_of(model: Model, policies: Sequence[LayerPolicy], capacity: int, host: int | None) -> tuple[int, int]:
    """(tokens a row at the setting's batch, rows at the setting's tokens) with the best of these policies everywhere.

    Tokens are a multiple of STEP, as many as the model has positions for at the most, unless the setting goes beyond
    them. Rows are told from tokens, where a step takes as much as their product says: not where rows have pictures or
    are recordings. Of the host's memory streamed weights that may wait on the disk take nothing.
    """
    rows, tokens = model.setting.rows, model.setting.tokens
    positions = None if beyond(model.setting) else _positions(model.setting)
    best, most = 0, 0
    for policy in policies:
        whole = MemoryPolicy(policy, host_memory=None if host is None else 0)

        def long(size: int, whole: MemoryPolicy = whole) -> Need:
            return need(model, whole, rows, size, capacity, Rates())

        def wide(size: int, whole: MemoryPolicy = whole) -> Need:
            return need(model, whole, size, tokens, capacity, Rates())

        most_tokens, least = positions or MOST_TOKENS, model.batches.least
        found = _within(long, tokens, capacity, host, rows, most_tokens, least)
        best = max(best, found)
        if model.batches.count(1) or found > most_tokens:
            most = max(most, _within(wide, rows, capacity, host, tokens, MOST_TOKENS, 1))
        else:
            most = max(most, found * rows // tokens)
    longest = best // STEP * STEP
    longest = longest if positions is None else min(longest, positions)
    if longest < model.batches.least:
        longest = 0
    return longest, most


def _within(
    asked: Callable[[int], Need], at: int, capacity: int, host: int | None, others: int, most: int, least: int
) -> int:
    found = largest(lambda size: asked(size).total, at, capacity, others, most, least)
    return found if host is None else min(found, _within_host(asked, at, host, least))


def check_tokens(tokens: int, config: Any) -> None:
    """Raises UserError for rows that are longer than a table of positions, which does not go on."""
    if not is_rotary(config):
        checked_length(max(tokens, 2), config, "seq")


def beyond(setting: Setting) -> tuple[str, ...]:
    """What a plan says of rows that are longer than the model has positions for; nothing where they are not."""
    last = _positions(setting)
    if last is None or setting.tokens <= last:
        return ()
    return (f"beyond the model's last position, {last}: extend its rope first",)


def most_of(model: Model, capacity: int, host: int | None) -> tuple[int, int]:
    """The same with the best of any policies."""
    extremes = EXTREMES if host is not None else EXTREMES[:1]
    found = (0, 0)
    if any(work.gates for work in model.work):
        found = largest_of(model, list(map(tiled, extremes)), capacity, host)
    if model.setting.rows * found[0] >= STRAIGHT:  # of so many tokens a tile takes less than all at once
        return found
    return max(found, largest_of(model, extremes, capacity, host))


def largest(
    total: Callable[[int], int], at: int, capacity: int, rows: int, most: int = MOST_TOKENS, least: int = 1
) -> int:
    """The most tokens whose bytes fit: where a straight line through two sizes says, which are nearer each time.

    `total` is not asked for more than `most` tokens, nor for less than `least`; 0 where not even these fit.
    """
    first, second = _two(at, least)
    points = {first: total(first), second: total(second)}
    best = first
    for _ in range(TRIES):
        low, high = sorted(sorted(points, key=lambda size: abs(size - best))[:2])
        slope = (points[high] - points[low]) / (high - low)
        if slope > 0:
            best = int(low + (capacity - points[low]) / slope)
        else:  # something else takes more than any of these tokens
            best = 2 * high if points[high] <= capacity else 0
        if best < least:
            return 0
        if (slope > 0 and rows * min(low, best) >= STRAIGHT) or best in points or best > most:
            break
        points[best] = total(best)
    return best


def _positions(setting: Setting) -> int | None:
    text = setting.config.get_text_config()
    found: int | None = getattr(text, "max_position_embeddings", None) or getattr(text, "max_target_positions", None)
    return found


def _within_host(asked: Callable[[int], Need], at: int, host: int, least: int) -> int:
    """The most tokens whose pinned memory is within the host's."""
    first, second = _two(at, least)
    each = (asked(second).host - asked(first).host) / (second - first)
    fixed = asked(first).host - each * first
    if fixed > host:
        return 0
    return int((host - fixed) / each) if each else MOST_TOKENS


def _two(at: int, least: int) -> tuple[int, int]:
    return (at // 2, at) if at > 1 and at // 2 >= least else (at, 2 * at)
