"""docs/assets/benchmarks/index.html: every figure in one table to sort and filter; one file that asks for nothing.

The rows are in the page as text, not as data for a script: without the script the table is there all the same. The
policy in the head allows this page's own script and style, by their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence

from ..records import Record
from .rows import ABSENT, RAW, Row, newest, runs, what_of
from .text import markup, number, ratio, reason

COLUMNS = (
    *("case", "device", "op", "suite", "direction", "dtype", "peer", "metric", "median", "unit", "least to most"),
    *("rounds", "fastpeft / peer", "ceiling", "newest", "date", "commit", "file"),
)
NUMBERS = ("median", "rounds", "fastpeft / peer", "ceiling")
FILTERS = ("device", "op", "peer", "metric", "newest")

STYLE = """
:root { color-scheme: light dark; --line: #8885; --head: #8882; }
body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; }
.filters { display: flex; flex-wrap: wrap; gap: .75rem 1.25rem; margin: 1rem 0; }
label { display: flex; gap: .4rem; align-items: center; }
select, input { font: inherit; max-width: 18rem; }
.wide { overflow: auto; max-height: 80vh; border: 1px solid var(--line); }
table { border-collapse: collapse; font-size: 13px; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
td:nth-child(1), td:nth-child(8) { white-space: normal; min-width: 14rem; }
td:nth-child(1), th:nth-child(1) { position: sticky; left: 0; background: Canvas; }
th:nth-child(1) { z-index: 1; }
td:nth-child(9), td:nth-child(n+11):nth-child(-n+14) { text-align: right; font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; background: Canvas; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
"""

SCRIPT = """
"use strict";
const body = document.querySelector("tbody"), rows = [...body.rows], heads = [...document.querySelectorAll("th")];
const texts = rows.map(row => [...row.cells].map(cell => cell.textContent));
const place = new Map(rows.map((row, i) => [row, i]));
const selects = [...document.querySelectorAll("select")], words = document.querySelector("input");
const columns = selects.map(select => heads.findIndex(head => head.textContent === select.name));
selects.forEach((select, i) => {
  const values = [...new Set(texts.map(text => text[columns[i]]))].sort();
  for (const value of values) select.add(new Option(value || "none", value));
});
function show() {
  const asked = words.value.toLowerCase().split(/\\s+/);
  let count = 0;
  rows.forEach((row, i) => {
    const fits = selects.every((select, k) => select.selectedIndex === 0 || texts[i][columns[k]] === select.value);
    const all = texts[i].join(" ").toLowerCase();
    row.hidden = !(fits && asked.every(word => all.includes(word)));
    count += !row.hidden;
  });
  document.querySelector("output").textContent = `${count} of ${rows.length} figures`;
}
function sort(head) {
  const column = heads.indexOf(head), down = head.getAttribute("aria-sort") === "ascending";
  heads.forEach(each => each.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = row => texts[place.get(row)][column], numeric = head.dataset.kind === "number";
  const order = (a, b) => numeric ? parseFloat(a) - parseFloat(b) : a < b ? -1 : a > b ? 1 : 0;
  const filled = rows.filter(row => key(row) !== ""), empty = rows.filter(row => key(row) === "");
  filled.sort((a, b) => (down ? -1 : 1) * order(key(a), key(b)) || place.get(a) - place.get(b));
  body.append(...filled, ...empty);
}
heads.forEach(head => head.firstElementChild.addEventListener("click", () => sort(head)));
selects.forEach(select => select.addEventListener("change", show));
words.addEventListener("input", show);
show();
"""


def site(files: Mapping[str, Sequence[Record]], every: Sequence[Row]) -> str:
    """The whole page: a row for each peer of each row, and for each peer that was left out."""
    body = "\n".join(_row(cells) for cells in (*_figures(every), *_absent(files)))
    heads = "".join(
        f"<th{' data-kind=number' * (name in NUMBERS)}><button>{markup(name)}</button></th>" for name in COLUMNS
    )
    filters = "".join(
        f'<label>{name} <select name="{name}"><option value="">all</option></select></label>' for name in FILTERS
    )
    policy = f"default-src 'none'; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; base-uri 'none'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>fastpeft: all measurements</title>
<style>{STYLE}</style>
</head>
<body>
<h1>All measurements</h1>
<p>Every time, rate and size in the records, older ones too. "fastpeft / peer" is fastpeft's figure over the peer's in
the same rounds, "ceiling" the share of the machine's own rates, as on
<a href="../../benchmarks.html">the page with tables</a>.</p>
<div class="filters">{filters}<label>words <input type="search"></label><output></output></div>
<div class="wide">
<table>
<thead><tr>{heads}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _row(cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<td>{markup(cell)}</td>' for cell in cells)}</tr>"


def _figures(every: Sequence[Row]) -> Iterator[list[str]]:
    last = {id(row) for row in newest(every)}
    for row in every:
        what = row.what
        both = {**row.peers, **{f"{name} again": record for name, record in row.again.items()}}
        for name, record in both.items():
            share, beside = row.share_of_ceiling(name), row.ratio(name) if name in row.rivals else None
            yield [
                *(
                    what.name if what.beside else what.case,
                    what.device,
                    what.op,
                    what.suite,
                    what.direction,
                    what.dtype,
                    name,
                    what.metric,
                ),
                *(", ".join(filter(None, (number(record.median), record.over_budget))), record.unit),
                f"{number(min(record.samples))} to {number(max(record.samples))}" if len(record.samples) > 1 else "",
                *(str(len(record.samples)), ratio(beside) if beside else "", f"{share:.0%}" if share else ""),
                *("yes" if id(row) in last else "no", *_source(row.run.date, record, row.run.file)),
            ]


def _absent(files: Mapping[str, Sequence[Record]]) -> Iterator[list[str]]:
    for run, records in runs(files):
        for record in records:
            if record.metric in ABSENT and record.suite not in RAW:
                what, why = what_of(record), reason(record.settings.get("reason", "no reason given"))
                yield [
                    *(
                        what.name if what.beside else what.case,
                        what.device,
                        what.op,
                        what.suite,
                        what.direction,
                        what.dtype,
                        record.peer,
                    ),
                    *(f"{record.metric}: {why}", "", "", "", "", "", "", "", *_source(run.date, record, run.file)),
                ]


def _source(date: str, record: Record, file: str) -> tuple[str, str, str]:
    return (date[:10], (record.environment.commit or "")[:10], file)
