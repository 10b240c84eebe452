from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import markdown as python_markdown
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft.bench.reading import read
from fastpeft.bench.records import Record, append, load
from fastpeft.bench.report.command import main
from fastpeft.bench.report.figures import figures
from fastpeft.bench.report.growth import Fit, fit, growths
from fastpeft.bench.report.page import page
from fastpeft.bench.report.rows import Row, newest, rows
from fastpeft.bench.report.site import SCRIPT, site
from fastpeft.bench.report.text import markdown, markup, number, plain, reason, table
from fastpeft.bench.report.writing import FOLDER, report, stale, write

from .made_records import HOSTILE, environment, record

EXTENSIONS = ["admonition", "tables", "toc", *(f"pymdownx.{name}" for name in ("superfences", "snippets"))]
NAMES = st.text(min_size=1, max_size=12)
NUMBERS = st.floats(1e-6, 1e6)
PLAIN = st.none() | st.booleans() | NUMBERS | st.text(max_size=5)
PLAIN |= st.lists(PLAIN, max_size=3) | st.dictionaries(NAMES, PLAIN, max_size=3)
DRAWN = (HOSTILE[0], HOSTILE[7], HOSTILE[-2])  # pictures take longest


class Parsed(HTMLParser):
    """Tags with attributes, and the text of cells and of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"td": [], "script": []}
        self.open = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open = tag
        if tag in self.texts:
            self.texts[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        if self.open in self.texts:
            self.texts[self.open][-1] += data


def rendered(text: str) -> Parsed:
    return Parsed(python_markdown.markdown(text, extensions=EXTENSIONS))


def one_row(*records: Record) -> Row:
    (row,) = rows({"gpu/a.jsonl": records})
    return row


@given(st.tuples(*[NAMES] * 6), st.lists(NUMBERS, min_size=1, max_size=5), st.dictionaries(NAMES, PLAIN, max_size=3))
@settings(max_examples=20, deadline=None)
def test_any_record_comes_back_from_its_file(
    tmp_path_factory: pytest.TempPathFactory, names: Sequence[str], samples: list[float], more: dict[str, Any]
) -> None:
    words = dict(zip(("suite", "case", "op", "peer", "metric", "unit"), names, strict=True))
    made = record(samples, settings=more, **words)
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.unlink(missing_ok=True)
    append(path, made)
    assert load(path) == [made]


@given(st.text(max_size=40) | st.sampled_from(HOSTILE))
@settings(max_examples=60, deadline=None)
def test_any_text_is_shown_and_means_nothing(text: str) -> None:
    parsed = rendered(table(("a", "b"), [[markdown(text), "end"]]))
    assert [tag for tag, _ in parsed.tags] == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]
    assert parsed.texts["td"] == [plain(text).strip(), "end"]
    cell = Parsed(f'<td title="{markup(text)}">{markup(text)}</td>')
    assert cell.tags == [("td", {"title": plain(text)})] and cell.texts["td"] == [plain(text)]


def hostile_records(text: str) -> list[Record]:
    """Records with the text in every field that holds words, enough for a row, a picture and a line of growth."""
    where = environment(
        device=text, commit=text, driver=text, ptxas=text, versions={"torch": text}, date=text, python=text
    )
    words = {"suite": text, "case": text, "op": text, "metric": text}
    more = {"direction": text, "dtype": text, "model": text, "threads": text, "reason": text}
    peers = ("fastpeft", text, f"{text} again")
    found = [record([2.0, 2.1], where, peer=peer, **words, settings=more) for peer in peers]
    found.append(record([1.0], where, **{**words, "metric": "left out"}, peer=text, unit="1", settings=more))
    scaling = {**words, "suite": "scaling", "peer": text}
    return found + [record([x], where, **scaling, settings={"axis": text, text: x, "a": text}) for x in (1.0, 2.0, 4.0)]


def test_records_cannot_put_anything_into_the_pages() -> None:
    files = {f"gpu/{i}{text}.jsonl": hostile_records(text) for i, text in enumerate(HOSTILE)}
    every, lines = rows(files), growths(files)
    assert len(lines) == len(HOSTILE)
    drawn = figures([row for row in every if row.what.case in DRAWN], [line for line in lines if line.op in DRAWN])
    assert len(drawn) == 2 * len(DRAWN) == len({picture.name for picture in drawn})
    whole, shown = Parsed(site(files, every)), rendered(page(files, every, drawn, lines))
    assert whole.texts["script"] == [SCRIPT]
    assert not {tag for tag, _ in shown.tags} & {"script", "svg", "iframe", "object", "style", "form", "input"}
    both = [*shown.tags, *whole.tags]
    links = {value for _, attrs in both for name, value in attrs.items() if name in ("href", "src")}
    pages = {"measured.md", f"{FOLDER}/index.html", "../../benchmarks.html"}
    assert links == pages | {f"{FOLDER}/{picture.name}" for picture in drawn}
    assert not [(tag, name) for tag, attrs in both for name in attrs if name.startswith("on")]
    for picture in drawn:
        assert re.fullmatch(r"[a-z0-9-]+\.svg", picture.name)
        for element in ElementTree.fromstring(picture.svg()).iter():
            assert element.tag.rpartition("}")[2] not in ("script", "foreignObject", "image", "a")
            assert not [name for name in element.attrib if name.lower().startswith("on")]


def test_the_page_allows_its_own_script_alone() -> None:
    (policy,) = [
        attrs["content"] for tag, attrs in Parsed(site({}, [])).tags if tag == "meta" and "http-equiv" in attrs
    ]
    assert policy and policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy


def made_files() -> dict[str, list[Record]]:
    """Two runs of one case: two rivals, one of them measured twice, a floor, a peer left out, and a figure alone."""
    rates = (("copy", 1000.0, "GB/s"), ("matrix bfloat16", 100.0, "TFLOP/s"))
    ceilings = [record([r], op="ceiling", peer="torch", metric="rate", unit=u, case=case) for case, r, u in rates]
    work = {"flops": 1e11, "bytes": 1e9, "dtype": "torch.bfloat16", "direction": "forward"}
    times = {
        "fastpeft": [2.0, 4.0],
        "peft": [4.0, 4.0],
        "peft again": [4.0, 8.0],
        "liger": [2.0, 2.0],
        "copy": [1.0, 1.0],
    }
    made = [record(samples, peer=peer, settings=work) for peer, samples in times.items()]
    made.append(record([8.0], metric="peak memory", unit="MiB", settings=work))
    made.append(record([9.0], case="lonely", metric="gemm_us"))
    why = {"reason": "no /usr/lib/x/libcuda.so | here"}
    made.append(record([1.0], peer="unsloth", metric="left out", unit="1", settings=why))
    first = environment(date="2026-01-01T00:00:00Z")
    return {"gpu/new.jsonl": [*ceilings, *made], "gpu/old.jsonl": [replace(each, environment=first) for each in made]}


def test_a_row_says_ratios_of_rounds_the_best_and_the_share_of_the_ceiling() -> None:
    every = rows(made_files())
    (row,) = [row for row in newest(every) if row.what.metric == "time"]
    assert row.run.file == "gpu/new.jsonl" and row.rivals == ["peft", "liger"]
    assert (row.ratio("peft"), row.ratio("liger"), row.best()) == (0.75, 1.5, "liger")
    assert row.noise() == {"peft": 1.5}
    assert row.share_of_ceiling("fastpeft") == pytest.approx(1.0 / 3.0)  # 1e11 / 100 TFLOP/s is 1 ms, 1e9 / 1 TB/s too
    assert not [row for row in every if row.run.file == "gpu/old.jsonl" and row.share_of_ceiling("fastpeft")]


def test_of_speeds_the_larger_is_the_better() -> None:
    row = one_row(*(record([s], peer=p, unit="tokens/s") for p, s in (("fastpeft", 2.0), ("a", 1.0), ("b", 4.0))))
    assert (row.best(), row.ratio("b")) == ("b", 0.5)


def test_figures_that_are_not_above_zero_have_no_ratio() -> None:
    row = one_row(record([0.0]), record([1.0], peer="peft"))
    assert row.ratio("peft") is None and row.best() is None and row.share_of_ceiling("fastpeft") is None


def test_the_page_shows_what_the_records_say() -> None:
    files = made_files()
    text = page(files, rows(files), (), ())
    peers = "3.00 | 4.00 (0.75) | 2.00 (1.50) | 1.00 (3.00)"
    assert "| time, ms | fastpeft | peft | liger | copy | fastpeft / best | again | ceiling |" in text
    assert f"| one, forward, bfloat16 | {peers} | **1.50** liger | peft 1.50 | 33% |" in text
    assert "| one, forward, bfloat16 | peak memory 8.00 MiB |" in text
    assert "| lonely | gemm 9.00 ms |" in text
    assert "| lora | unsloth | one | no libcuda.so &#124; here |" in text
    assert "gpu/new.jsonl; medians of 2 rounds; Some GPU; torch 2.11; commit cccccccccc; 2026-01-02" in text
    assert "gpu/old.jsonl" not in text and "gpu/old.jsonl" in site(files, rows(files))


def test_the_same_records_give_the_same_bytes() -> None:
    def made(files: dict[str, list[Record]]) -> object:
        every = rows(files)
        pictures = figures(every, ())
        assert len(pictures) == 1
        return page(files, every, pictures, ()), pictures[0].name, pictures[0].svg(), site(files, every)

    assert made(made_files()) == made(dict(reversed(made_files().items())))


def test_growth_is_the_power_by_least_squares() -> None:
    assert fit([(1, 3.0), (2, 12.0), (8, 192.0)]) == Fit(pytest.approx(2.0), pytest.approx(2.0), pytest.approx(2.0))
    bent = fit([(1, 1.0), (2, 2.0), (4, 16.0)])
    assert (
        bent
        and (bent.least, bent.most) == (pytest.approx(1.0), pytest.approx(3.0))
        and bent.exponent == pytest.approx(2)
    )
    assert fit([(1, 1.0), (2, 2.0)]) is None and fit([(1, 0.0), (2, 2.0), (3, 3.0)]) is None


def test_lines_share_all_settings_but_one() -> None:
    def at(tokens: object, rank: int = 8, peer: str = "fastpeft", time: float = 1.0) -> Record:
        settings = {"axis": "tokens", "tokens": tokens, "rank": rank, "flops": time}
        return record([time], suite="scaling", case=f"{tokens}", peer=peer, settings=settings)

    peers, ranks = ("fastpeft", "peft", "peft again"), (8, 16)
    made = [at(n, rank, peer, float(n)) for peer in peers for rank in ranks for n in (4, 1, 2)]
    lines = growths({"gpu/a.jsonl": [*made, at("many"), at(True), at(float("inf")), at(3, rank=32)]})
    assert [(line.peer, line.rest) for line in lines] == [
        (peer, (("rank", str(rank)),)) for peer in peers[:2] for rank in ranks
    ]
    assert all(line.points == [(1.0, 1.0), (2.0, 2.0), (4.0, 4.0)] for line in lines)


def test_wrong_files_are_named_all_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing: expected a file of records or a folder with some"):
        read(tmp_path / "nothing")
    (folder := tmp_path / "gpu").mkdir()
    with pytest.raises(ValueError, match=r"expected a folder with files of records, \*.jsonl, got none"):
        read(folder)
    append(folder / "good.jsonl", record())
    line = (folder / "good.jsonl").read_bytes()
    huge = line.replace(b'"samples": [2.0]', b'"samples": [1' + b"0" * 400 + b"]")
    bad = {"cut": line[:40], "empty": b"", "binary": b"\xff\xfe\x00", "deep": b"[" * 100_000, "huge": huge}
    for name, data in bad.items():
        (folder / f"{name}.jsonl").write_bytes(data)
    with pytest.raises(ValueError) as raised:
        read(tmp_path)
    said = str(raised.value).splitlines()
    assert [each.partition(".jsonl")[0] for each in said] == [f"gpu/{name}" for name in sorted(bad)]
    assert "gpu/empty.jsonl: expected records, got an empty file" in said
    assert all(", line 1: " in each for each in said if "empty" not in each)


def test_a_wrong_file_beside_us_is_not_at_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"^empty\.jsonl: expected records"):
        read("empty.jsonl")


def test_the_command_writes_checks_and_removes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    for file, records in made_files().items():
        for each in records:
            append(results / file, each)
    arguments = ["report", "--results", str(results), "--docs", str(docs)]
    assert main([*arguments, "--check"]) == 1
    assert main(arguments) == 0 and main([*arguments, "--check"]) == 0
    assert {path.suffix for path in docs.rglob("*.*")} == {".md", ".html", ".svg"}
    (docs / FOLDER / "left.svg").write_text("")
    with open(docs / "benchmarks.md", "a") as file:
        file.write("more")
    capsys.readouterr()
    assert main([*arguments, "--check"]) == 1
    told = capsys.readouterr().out
    assert "benchmarks.md" in told and "left.svg" in told and "index.html" not in told
    write(made := report(results), docs)
    (picture,) = (docs / FOLDER).glob("*.svg")
    picture.write_bytes(picture.read_bytes().replace(b"<dc:title>Matplotlib ", b"<dc:title>Matplotlib 1."))
    assert not stale(made, docs)
    picture.write_bytes(made.pictures[0].svg() + b" ")
    assert stale(made, docs) == [f"{FOLDER}/{picture.name}"] and not stale(made, docs, draw=False)
    picture.unlink()
    assert stale(made, docs, draw=False) == [f"{FOLDER}/{picture.name}"]
    assert main(["report", "--results", str(tmp_path / "none")]) == 2
    assert "expected a file of records" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(1234.5, "1234"), (99.96, "100"), (12.34, "12.3"), (9.996, "10.0"), (1.0, "1.00"), (0.9996, "1.00")],
        *[(0.01234, "0.0123"), (0.5, "0.500"), (0.0, "0"), (None, ""), (-3.21, "-3.21")],
    ],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("given", "shown"),
    [("no /opt/x/y.so", "no y.so"), (r"at C:\Users\me\x.py", "at x.py"), ("a/b and 1/2", "a/b and 1/2"), ("/x", "/x")],
)
def test_reasons_name_no_folders(given: str, shown: str) -> None:
    assert reason(given) == shown


def test_old_records_are_read(tmp_path: Path) -> None:
    data = asdict(record())
    del data["settings"], data["error"], data["budget"], data["schema"]
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(data) + "\n\n")
    assert read(tmp_path) == {"a.jsonl": [record()]}


def test_rounds_of_two_peers_alone_are_rows_of_their_own() -> None:
    def pair(peer: str, time: float, peft: float) -> list[Record]:
        return [record([t], peer=p, settings={"beside": peer}) for p, t in ((peer, time), ("peft", peft))]

    every = rows({"gpu/a.jsonl": [*pair("fastpeft", 1.0, 2.0), *pair("liger", 3.0, 9.0)]})
    assert [(row.what.name, row.ratio("peft")) for row in every] == [
        ("one, beside fastpeft", 0.5),
        ("one, beside liger", None),
    ]


def test_plain_numbers_are_shown_where_several_peers_have_them() -> None:
    loss = [record([x], peer=peer, metric="final loss", unit="1") for peer, x in (("fastpeft", 2.5), ("peft", 2.6))]
    marks = [record([1.0], metric=metric, unit="1") for metric in ("passed", "share_of_budget")]
    (row,) = rows({"gpu/a.jsonl": [*loss, *marks]})
    assert (row.what.metric, row.ratio("peft"), row.best()) == ("final loss", None, None)
    text = page({"gpu/a.jsonl": [*loss, *marks]}, [row], (), ())
    assert "| final loss | fastpeft | peft |\n| --- | --- | --- |\n| one | 2.50 | 2.60 |" in text
