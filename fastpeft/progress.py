"""How far something is: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Listener = Callable[[dict[str, Any]], None]
"""Takes events: {"event": "step", "step", "steps", "loss" (None: not known)} or {"event": "status", "text"}."""
LINES_A_TRAINING = 10


@contextmanager
def stage(console: Console, title: str, steps: int | None = None) -> Iterator[Listener]:
    """Shows one stage while the body runs.

    Args:
        console: its terminal decides between bar and lines.
        title: of the stage.
        steps: how many are trained; None for stages without.

    Yields:
        What takes the events.
    """
    shown: Any = _bar if console.is_terminal else _lines
    with shown(console, title, steps) as listener:
        yield listener


@contextmanager
def count(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar that is gone when the body ends; the title alone on a line where there is no terminal.

    Yields:
        What takes how many are done.
    """
    if not console.is_terminal or console.quiet:
        console.print(title, highlight=False)
        yield lambda done: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeRemainingColumn())
    with Progress(*columns, console=console, refresh_per_second=4, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.update(task, completed=done)


@contextmanager
def _bar(console: Console, title: str, steps: int | None) -> Iterator[Listener]:
    columns: list[Any] = [SpinnerColumn(finished_text="✓"), TextColumn("{task.description:<12}")]
    if steps is not None:
        columns += [BarColumn(bar_width=24), TextColumn("{task.completed:>4.0f}/{task.total:.0f}")]
    columns += [TimeElapsedColumn()]
    if steps is not None:
        columns += [TextColumn("left"), TimeRemainingColumn()]
    columns += [TextColumn("{task.fields[note]}")]
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        task = progress.add_task(title, total=steps, note="")

        def listen(event: dict[str, Any]) -> None:
            if event["event"] == "step":
                progress.update(task, completed=event["step"])
                if event["loss"] is not None:
                    progress.update(task, note=f"loss {event['loss']:.3f}")
            else:
                progress.update(task, note=event["text"])

        yield listen
        if steps is None:
            progress.update(task, total=1, completed=1, note="")


@contextmanager
def _lines(console: Console, title: str, steps: int | None) -> Iterator[Listener]:
    start = time.monotonic()
    every = max(1, (steps or 0) // LINES_A_TRAINING)
    due = every

    def listen(event: dict[str, Any]) -> None:
        nonlocal due
        if event["event"] == "status":
            console.print(f"{title}: {event['text']}", highlight=False)
        elif event["loss"] is not None and event["step"] >= min(due, event["steps"]):
            due = event["step"] // every * every + every
            line = f"{title}: step {event['step']}/{event['steps']}, loss {event['loss']:.3f}"
            console.print(f"{line}, {time.monotonic() - start:.0f} s", highlight=False)

    yield listen
