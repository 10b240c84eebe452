"""The built site: complete, without broken links, and of use without a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from fastpeft.bench.records import load
from fastpeft.bench.report.writing import report, stale
from fastpeft.bench.tables import TABLES, cases, insert
from tests.fresh import ROOT

from .pages import DOCS, PAGES, read

MACHINE_PATHS = re.compile(r"(?<![\w.~/:-])/(root|home|work|workspace|tmp|usr|opt|var|srv|Users)/|\b[A-Z]:\\")


class Page(HTMLParser):
    """What a page defines, refers to, and has its reader's browser fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in ("link", "script", "img", "iframe", "source"):
            self.fetched += [given[name] for name in ("href", "src") if name in given]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """The pages of a strict build, by file."""
    folder = tmp_path_factory.mktemp("site")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {path: Page(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html") if path.name != "404.html"}


def test_every_page_is_there(site: dict[Path, Page]) -> None:
    folder = min((path.parent for path in site), key=lambda path: len(path.parts))
    built = {path.relative_to(folder).with_suffix(".md").as_posix() for path in site}
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert built == written | {"assets/benchmarks/index.md"}


def test_no_link_leads_nowhere(site: dict[Path, Page]) -> None:
    broken = []
    for path, page in site.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            known = target in site and (not parts.fragment or unquote(parts.fragment) in site[target].anchors)
            if not known and (target in site or not target.exists()):
                broken.append(f"{path.name}: {link}")
    assert not broken


def test_nothing_is_fetched_from_elsewhere(site: dict[Path, Page]) -> None:
    fetched = {address for page in site.values() for address in page.fetched}
    assert fetched and not {address for address in fetched if urlsplit(address).netloc}
    for path, page in site.items():
        assert all((path.parent / urlsplit(address).path).exists() for address in page.fetched)


def test_readers_see_no_comments_of_the_tests(site: dict[Path, Page]) -> None:
    assert not [path.name for path in site if "<!-- test:" in path.read_text(encoding="utf-8")]


def test_the_configuration_lists_every_key(site: dict[Path, Page]) -> None:
    (path,) = [path for path in site if path.name == "configuration.html"]
    text = path.read_text(encoding="utf-8")
    assert all(f"<code>{key}</code>" in text for key in ("method", "quantization", "max_length", "target_modules"))


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_no_path_of_a_machine_in(page: str) -> None:
    assert not MACHINE_PATHS.findall(read(page))


def test_no_path_of_a_machine_in_the_site(site: dict[Path, Page]) -> None:
    assert not [path.name for path in site if str(ROOT) in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize(
    ("text", "found"),
    [("see /home/me/x", True), (r"C:\x", True), ("`/tmp/x`", True), ("docs/tmp/x", False), ("~/tmp/x", False)],
)
def test_what_a_path_of_a_machine_is(text: str, found: bool) -> None:
    assert bool(MACHINE_PATHS.search(text)) == found


NOT_AGAIN = "checkpointing|dora|^moe | float16|qlora float32"
"""The cases of the earlier steps that a later run did not measure."""


@pytest.mark.parametrize(
    "name", ["", "layer", "decode", "steps", "earlier steps", "combinations", "losses", "trainings"]
)
def test_the_measurements_are_those_of_the_records(name: str) -> None:
    named = {
        "": "cpu/steps",
        "steps": "nvidia-h200/steps",
        "earlier steps": "nvidia-h200/steps-before-launchers",
        "combinations": "cpu/combinations",
        "losses": "cpu/losses",
        "trainings": "nvidia-h200/finetune",
    }
    records = named.get(name, "nvidia-h200/layer")
    only = NOT_AGAIN if name == "earlier steps" else ""
    table = TABLES[name](cases(load(ROOT / "benchmarks" / "results" / f"{records}.jsonl"), only))
    assert insert(read("docs/measured.md"), table, name) == read("docs/measured.md")


@pytest.mark.parametrize(
    ("name", "records", "only"),
    [
        ("", "cpu/steps", ""),
        ("layer", "nvidia-h200/layer", "^layer.*r=16 fp32"),
        ("limits", "nvidia-h200/limits", ""),
        ("trainings", "nvidia-h200/finetune", ""),
    ],
)
def test_the_readme_s_measurements_are_those_of_the_records(name: str, records: str, only: str) -> None:
    found = cases(load(ROOT / "benchmarks" / "results" / f"{records}.jsonl"), only)
    readme = (ROOT / "README.md").read_text()
    assert insert(readme, TABLES[name](found), name) == readme


@pytest.mark.parametrize("draw", [False, pytest.param(True, marks=pytest.mark.full)])
def test_the_benchmarks_are_those_of_the_records(draw: bool) -> None:
    assert not stale(report(ROOT / "benchmarks" / "results"), DOCS, draw=draw)


def test_the_figures_in_words_are_those_of_the_table() -> None:
    on_a_cpu = read("docs/measured.md").partition("## Training steps on a CPU")[2]
    cells = [line.split(" | ") for line in on_a_cpu.splitlines() if " r=16" in line]
    times = {row[0]: float(row[3]) for row in cells}
    kept = sorted(float(row[5].rstrip(" |")) for row in cells)
    others = sorted(time for case, time in times.items() if "dropout" not in case)
    (dropout,) = (time for case, time in times.items() if "dropout" in case)
    less = [ratio for ratio in kept if ratio < 1]
    home = read("docs/index.md")
    assert f"{dropout} of it with dropout; {others[0]} to {others[-1]} otherwise" in home
    assert f"{less[0]:.1f} to {less[-1]:.1f} of it" in home
    assert f"most steps take {others[0]} to {others[-1]} of PEFT's time" in read("docs/limits.md")


@pytest.mark.parametrize("page", PAGES)
def test_marked_lines_are_those_of_fastpeft(page: str) -> None:
    for numbers, body in re.findall(r'```python[^\n]*hl_lines="([\d ]+)"\n(.*?)```', read(page), re.DOTALL):
        lines = body.splitlines()
        assert all("fastpeft" in lines[int(number) - 1] for number in numbers.split())
