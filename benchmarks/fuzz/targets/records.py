"""Records of benchmarks, the pages made of them, and what `compare` says of two files."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from statistics import median
from typing import Any

from hypothesis import strategies as st

from benchmarks.fuzz.making import as_lines, broken, in_lines
from benchmarks.fuzz.watching import Target
from fastpeft.bench.reading import read as read_records
from fastpeft.bench.report.command import lines
from fastpeft.bench.report.compare import compare
from fastpeft.bench.report.writing import report, write

TAGS = (
    "<script>alert(1)</script>",
    '" onload="x',
    "a | b",
    "](javascript:x)",
    "\x00\u202e",
    "../../x",
    "&lt;",
    "]]><svg onload=x>",
)
NAMES = st.sampled_from(("fastpeft", "peft", "peft again", "torch", "fastpeft, tuned", *TAGS)) | st.text(
    min_size=1, max_size=6
)
SAMPLES = st.lists(st.floats(1e-6, 1e6) | st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=4)
PLACE = {"device": "CPU", "device_type": "cpu", "commit": None, "dirty": False, "date": "2026-01-02T03:04:05Z"}
PLACE |= {"python": "3.11", "system": "Linux", "versions": {"torch": "2.13"}}
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "direction": st.sampled_from(("forward", "both", *TAGS)),
        "dtype": st.sampled_from(("float32", "torch.bfloat16", 3)),
        "axis": st.sampled_from(("tokens", "rank", "axis", 1)),
        "tokens": st.integers(-1, 4096) | st.floats(),
        "flops": st.floats() | st.integers(),
        "bytes": st.floats(),
        "beside": NAMES,
        "reason": NAMES,
        "threads": st.integers(),
    },
)


def _record(
    samples: list[float], settings: dict[str, Any], peer: str, words: tuple[str, ...], case: str
) -> dict[str, Any]:
    suite, op, metric, unit = words
    found = {"suite": suite, "case": case, "op": op, "peer": peer, "metric": metric, "unit": unit, "samples": samples}
    return {**found, "median": median(samples), "environment": PLACE, "settings": settings}


WORDS = st.tuples(
    st.sampled_from(("ops", "scaling", "check", *TAGS[:2])),
    st.sampled_from(("lora", "ceiling", "quant", *TAGS[:2])),
    st.sampled_from(("time", "rate", "speed", "left out", "passed", "peak memory", "step_ms")),
    st.sampled_from(("ms", "us", "MiB", "tokens/s", "1", "")),
)
RECORDS = st.builds(_record, SAMPLES, SETTINGS, NAMES, WORDS, st.sampled_from(("copy", "matrix float32", "one", *TAGS)))
TEXTS = as_lines(RECORDS, most=8)


def read(path: Path) -> None:
    """`python -m benchmarks report`, without pictures: the page runs no script but its own."""
    made = report(path.parent)
    for name, text in made.texts.items():
        assert text.encode(), f"{name} is empty"
    page = _Page()
    page.feed(made.texts["assets/benchmarks/index.html"])
    assert (page.scripts, page.styles, page.others) == (1, 1, []), f"the page holds {page.others or 'another script'}"


def draw(path: Path) -> None:
    """The same, with its pictures, which hold no script."""
    made = report(path.parent)
    write(made, path.parent / "docs")
    for picture in made.pictures:
        for element in ET.fromstring(picture.svg()).iter():
            assert not element.tag.endswith(("script", "foreignObject")), f"{picture.name} holds {element.tag}"
            assert not any(name.startswith("on") for name in element.attrib), f"{picture.name} runs a script"


def read_two(path: Path) -> None:
    """`python -m benchmarks compare`: the first half of the lines, and the second."""
    found = path.read_bytes().split(b"\n")
    halves = path.with_name("a.jsonl"), path.with_name("b.jsonl")
    for half, some in zip(halves, (found[::2], found[1::2]), strict=True):
        half.write_bytes(b"\n".join(some))
    result = compare(*map(read_records, halves))
    assert lines(result, 1.1) and result.to_dict(1.1)


class _Page(HTMLParser):
    """Counts what could run, beside what the page has of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts = self.styles = 0
        self.others: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.styles += tag == "style"
        if tag in ("iframe", "img", "object", "embed", "svg", "form", "base"):
            self.others.append(tag)
        self.others += [name for name, _ in attrs if name.startswith("on")]


REFUSES = (ValueError,)


def _twice(record: dict[str, Any], samples: list[float]) -> list[dict[str, Any]]:
    return [record, {**record, "samples": samples, "median": median(samples)}]


PAIRS = st.lists(st.builds(_twice, RECORDS, SAMPLES), min_size=1, max_size=3).map(
    lambda pairs: [r for pair in pairs for r in pair]
)
TWO = PAIRS.flatmap(in_lines) | TEXTS
TARGETS = (
    Target("records", "records.jsonl", TEXTS, read, REFUSES),
    Target("pictures of records", "records.jsonl", broken(TEXTS), draw, REFUSES),
    Target("two files of records", "both.jsonl", TWO, read_two, REFUSES, r"[ab]\.jsonl|records: expected"),
)
