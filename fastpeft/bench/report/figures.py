"""Pictures as SVG: peers beside fastpeft, a row a case; time and memory against one setting.

Text stays text, colours are those of Okabe and Ito, told apart by shape too, on a light ground of their own, so that
they can be read on a dark page. The same records give the same bytes with the same version of Matplotlib.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from fastpeft.requirements import require

from ..records import SCHEMA
from .growth import SUITE, Growth
from .rows import OURS, Row, newest
from .text import markdown, number, plain, short, slug

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PEERS = ("peft", "torch", "torch.compile", "peft + liger", "unsloth", "trl", "bitsandbytes")
"""Have the first colours, in this order, in every picture."""
GREY = {"color": "#CCCCCC", "zorder": 1}
MOST_ROWS = 80
WIDTH = 12.0  # inches of 72 units: 1200 pixels make 11 units 15 pixels high
TEXT = 11


@dataclass(frozen=True)
class Figure:
    """A picture: `place` is its device, suite and op; `name` that of its file, `words` what it shows."""

    place: tuple[str, str, str]
    name: str
    words: str
    make: Callable[[], Any]

    def svg(self) -> bytes:
        """Draw it.

        Raises:
            MissingExtraError: Matplotlib is not installed.
        """
        with _style():
            return _svg(self.make())

    def as_markdown(self) -> str:
        return f"![{markdown(self.words)}](assets/benchmarks/{self.name})"


def figures(every: Sequence[Row], growths: Sequence[Growth]) -> list[Figure]:
    """A picture for each device, suite and op in which fastpeft has a rival, and one for each axis of growth."""
    made: list[Figure] = []

    def add(place: tuple[str, str, str], words: str, make: Callable[[], Any], *names: str) -> None:
        name, taken = slug(*names), {each.name for each in made}
        name = next(n for i in range(len(made) + 1) if (n := f"{name}{f'-{i + 1}' * bool(i)}.svg") not in taken)
        made.append(Figure(place, name, words, make))

    def where(row: Row) -> tuple[str, str, str]:
        return (row.what.device, row.what.suite, row.what.op)

    told = [row for row in newest(every) if row.kind in ("time", "rate") and row.best() and row.what.suite != SUITE]
    for place, rows in groupby(sorted(told, key=where), key=where):
        device, suite, op = place
        words = f"{device}, {op}{f' ({suite})' * (op != suite)}: figures of other peers beside fastpeft's"
        add(place, words, partial(beside, list(rows), words), device, suite, op)
    for (device, op, axis), lines in groupby(sorted(growths, key=_axis), key=_axis):
        words = f"{device}, {op}: time and memory against {axis}"
        add((device, SUITE, op), words, partial(growing, list(lines), words), device, SUITE, op, axis)
    return made


def beside(rows: Sequence[Row], title: str) -> Any:
    """Each rival's time over fastpeft's (of rates, fastpeft's over theirs), a row a case; grey is noise."""
    left_out, rows = max(0, len(rows) - MOST_ROWS), rows[:MOST_ROWS]
    height = 1.3 + 0.3 * len(rows)
    figure, axes = _axes(height)
    style = _styles({name for row in rows for name in row.rivals})
    away = [math.exp(max((abs(math.log(value)) for value in row.noise().values()), default=0.0)) for row in rows]
    axes.barh(range(len(rows)), [far - 1 / far for far in away], left=[1 / far for far in away], height=0.7, **GREY)
    seen: dict[str, Any] = {}
    for name, look in style.items():
        points = [(y, row.kind, ratio) for y, row in enumerate(rows) if (ratio := row.ratio(name)) is not None]
        times = [ratio if kind == "rate" else 1 / ratio for _, kind, ratio in points]
        if times:
            seen[name] = axes.plot(times, [y for y, *_ in points], linestyle="", markersize=8, zorder=3, **look)[0]
    for y, row in enumerate(rows):
        ours = f"{number(row.peers[OURS].median)} {plain(row.unit, 12)}"
        axes.text(1.01, y, ours, transform=axes.get_yaxis_transform(), va="center", fontsize=TEXT)
    axes.axvline(1.0, color="#333333", linewidth=1.2, zorder=2)
    axes.set_yticks(range(len(rows)), [short(row.what.label, 62) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    _logarithmic(axes, "x")
    axes.tick_params(axis="x", labeltop=len(rows) > 24, length=3)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8, zorder=0)
    kinds = {row.kind for row in rows}
    words = " or ".join(
        words
        for kind, words in (("time", "time over fastpeft's"), ("rate", "fastpeft's rate over theirs"))
        if kind in kinds
    )
    words += ": right of 1 fastpeft is ahead" + "; grey: a peer beside itself" * any(row.noise() for row in rows)
    axes.set_xlabel(words + f"; {left_out} more rows not shown" * bool(left_out))
    axes.text(1.01, -0.62, OURS, transform=axes.get_yaxis_transform(), va="bottom", fontsize=TEXT, fontweight="bold")
    _finish(figure, title, height, seen)
    return figure


def growing(lines: Sequence[Growth], title: str) -> Any:
    """One panel for time and one for memory; in the legend the power with which each line grows."""
    kinds = [kind for kind in ("time", "rate", "memory") if any(line.kind == kind for line in lines)]
    height = 0.8 + 4.2 * len(kinds)
    figure, every = _axes(height, len(kinds))
    style = _styles({line.peer for line in lines}, ours=True)
    for axes, kind in zip(every if len(kinds) > 1 else [every], kinds, strict=True):
        here = [line for line in lines if line.kind == kind]
        varied = _varied(here)
        for line in here:
            power = f", power {line.fit.exponent:.2f}" if line.fit else ""
            words = plain(", ".join([line.peer, *(text for text in varied(line) if text)]), 60)
            axes.plot(*zip(*line.points, strict=True), label=f"{words}{power}", markersize=7, **style[line.peer])
        positive = all(min(point) > 0 for line in here for point in line.points)
        axes.grid(color="#DDDDDD", linewidth=0.8)
        if positive:
            _logarithmic(axes, "x")
            _logarithmic(axes, "y")
        axes.set_xlabel(plain(here[0].axis, 40))
        units = dict.fromkeys(plain(line.unit, 12) for line in here)
        axes.set_ylabel(f"{kind}, {', '.join(units)}")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=TEXT)
    figure.suptitle(plain(title, 110), x=0.01, y=1 - 0.12 / height, ha="left", va="top", fontsize=TEXT + 1)
    figure.subplots_adjust(left=0.09, right=0.64, top=1 - 0.6 / height, bottom=0.6 / height, hspace=0.3)
    return figure


def _varied(lines: Sequence[Growth]) -> Any:
    """The settings, metric and unit that tell these lines apart beside their peer."""
    shared = set.intersection(*(set(line.rest) for line in lines))
    several = len({line.metric for line in lines}) > 1
    return lambda line: [line.metric * several, *(f"{a} {b}" for a, b in line.rest if (a, b) not in shared)]


def _axis(line: Growth) -> tuple[str, str, str]:
    return (line.run.environment.device, line.op, line.axis)


def _styles(peers: Iterable[str], ours: bool = False) -> dict[str, dict[str, Any]]:
    names = [*([OURS] if ours else []), *PEERS, *sorted(set(peers) - {*PEERS, OURS})]
    order = [name for name in names if name in set(peers)]
    return {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]}
        for i, name in enumerate(order)
    }


def _axes(height: float, panels: int = 1) -> tuple[Any, Any]:
    figure = require("bench", "matplotlib.figure", "the report").Figure(figsize=(WIDTH, height), facecolor="#FCFCFC")
    axes = figure.subplots(panels, 1)
    for each in axes if panels > 1 else [axes]:
        each.set_facecolor("#FCFCFC")
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _logarithmic(axes: Any, which: str) -> None:
    """A logarithmic axis with few ticks in plain numbers."""
    ticker = require("bench", "matplotlib.ticker", "the report")
    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    fine = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.7, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)
    wide = high / max(low, 1e-300)
    widths = ((3, fine), (20, (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)), (300, (1.0, 2.0, 5.0)), (math.inf, (1.0,)))
    steps = next(steps for width, steps in widths if wide <= width)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    axis.set_major_locator(ticker.FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.10g}"))


def _finish(figure: Any, title: str, height: float, seen: dict[str, Any]) -> None:
    figure.subplots_adjust(left=0.46, right=0.9, top=1 - 0.85 / height, bottom=0.5 / height)
    figure.suptitle(plain(title, 110), x=0.01, y=1 - 0.1 / height, ha="left", va="top", fontsize=TEXT + 1)
    names = [name for name in _styles(seen)]
    where = {"loc": "upper right", "bbox_to_anchor": (0.91, 1 - 0.28 / height), "ncols": 6, "frameon": False}
    figure.legend([seen[n] for n in names], [plain(n, 24) for n in names], fontsize=TEXT, handletextpad=0.1, **where)


@contextmanager
def _style() -> Iterator[None]:
    rc = {
        **{"svg.hashsalt": f"fastpeft {SCHEMA}", "svg.fonttype": "none", "text.parse_math": False},
        **{"font.family": ["DejaVu Sans", "sans-serif"], "font.size": TEXT, "axes.labelsize": TEXT},
    }
    with require("bench", "matplotlib.style", "the report").context(["default", rc]):
        yield


def _svg(figure: Any) -> bytes:
    version = require("bench", "matplotlib", "the report").__version__
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": f"Matplotlib {version}"})
    return file.getvalue()
