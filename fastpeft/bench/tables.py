"""Markdown tables made from records, and put between two markers of a document.

python -m fastpeft.bench.tables benchmarks/results/cpu/steps.jsonl --into README.md
python -m fastpeft.bench.tables benchmarks/results/nvidia-h200/layer.jsonl --as layer --into docs/measured.md
python -m fastpeft.bench.tables benchmarks/results/nvidia-h200/layer.jsonl --as layer --only "r=16 fp32" --into DOCUMENT
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import shorten

from .limits_table import limits_table
from .reading import place, time_ratio, versions
from .records import Record, load
from .trainings_table import trainings_table


def steps_table(records: Sequence[Record]) -> str:
    """Step time and bytes kept of fastpeft beside PEFT, one row a case, with where and with what it was measured.

    PEFT's second measurement beside its first shows the noise. Where the records say how long a GPU was busy, that too.

    The time ratio is the median over rounds of the two times of one round.

    Raises:
        ValueError: records of more than one environment, or none.
    """
    records = [record for record in records if record.suite in ("step", "steps")]
    where = place(records)
    by_key = {(r.case, r.metric, r.peer): r for r in records}
    with_busy = any(r.metric == "busy" for r in records)
    rows = [
        "| training step | PEFT, ms | fastpeft, ms | time, fastpeft / PEFT | PEFT / itself | kept, fastpeft / PEFT |"
        + " GPU busy: PEFT, fastpeft, ms |" * with_busy,
        "|---" * (6 + with_busy) + "|",
    ]
    for case in dict.fromkeys(r.case for r in records):
        ours, theirs = by_key[case, "step time", "fastpeft"], by_key[case, "step time", "peft"]
        again = by_key[case, "step time", "peft again"]
        kept = by_key[case, "kept for backward", "fastpeft"].median / by_key[case, "kept for backward", "peft"].median
        ms = [f"{r.median:.{0 if theirs.median >= 100 else 1}f}" for r in (theirs, ours)]
        ratios = f"{time_ratio(ours, theirs):.2f} | {time_ratio(again, theirs):.2f} | {kept:.2f}"
        busy = [by_key.get((case, "busy", peer)) for peer in ("peft", "fastpeft")]
        at_work = f" {', '.join(f'{r.median:.1f}' if r else '-' for r in busy)} |" * with_busy
        rows.append(f"| {case} | {ms[0]} | {ms[1]} | {ratios} |{at_work}")
    rounds = len(next(r for r in records if r.metric == "step time").samples)
    threads, command = records[0].settings.get("threads"), "make gpu" if where.device_type == "cuda" else "make bench"
    on = where.device if threads is None else f"{where.device}, torch on {threads} of them"
    rows += [
        "",
        f"Medians of {rounds} interleaved rounds on {on}; "
        f"{versions(where, ('torch', 'transformers', 'peft', 'bitsandbytes'))}; "
        f"{where.date[:10]}; `{command}`. Of ratios the median of the rounds' own, not that of the medians. PEFT is "
        "measured twice a round: its time divided by itself, if not 1, shows the noise of the machine. Kept: bytes "
        "that a forward keeps for backward." + " Busy: by torch's profiler, in steps of their own." * with_busy,
    ]
    return "\n".join(rows)


PEERS = {
    "peft": "PEFT",
    "peft + liger": "PEFT + Liger",
    "unsloth functions": "Unsloth's functions",
    "fastpeft": "fastpeft",
}
WORKS = {
    "layer": "seven projections and the MLP's activation",
    "linears": "seven projections alone",
    "linear": "one of 4096 x 4096",
}


def layer_table(records: Sequence[Record]) -> str:
    """Forward and backward of a decoder layer's projections: everyone's time over that of the bare frozen products.

    Raises:
        ValueError: records of more than one environment, or none.
    """
    records = [record for record in records if record.op == "layer"]
    where = place(records)
    times = {(r.case, r.peer): r for r in records if r.metric == "forward and backward"}
    peaks = {(r.case, r.peer): r.median for r in records if r.metric == "peak memory"}
    rows = [
        f"| | frozen products, ms | {' | '.join(PEERS.values())} | peak MiB: {', '.join(PEERS.values())} |",
        "|---" * (len(PEERS) + 3) + "|",
    ]
    for case in dict.fromkeys(case for case, _ in times):
        products = times[case, "frozen products"]
        ratios = [f"{time_ratio(times[case, peer], products):.2f}" if (case, peer) in times else "" for peer in PEERS]
        most = [f"{peaks[case, peer]:.0f}" if (case, peer) in peaks else "-" for peer in PEERS]
        work, _, rest = case.partition(" ")
        rows.append(f"| {WORKS[work]}: {rest} | {products.median:.2f} | {' | '.join(ratios)} | {', '.join(most)} |")
    first = next(iter(times.values()))
    names = ("torch", "triton", "peft", "bitsandbytes", "liger-kernel", "unsloth")
    sizes = "{tokens} tokens, {hidden} and {intermediate} features".format(**first.settings)
    rows += [
        "",
        f"Device time of forward and backward over that of the bare frozen products in bf16, medians of "
        f"{len(first.samples)} interleaved rounds; {sizes} (a layer of Llama 3.1 8B); {where.device}, driver "
        f"{where.driver}, ptxas {where.ptxas}; {versions(where, names)}; {where.date[:10]}; `make gpu`. Peak: most "
        "memory of one forward and backward, beside weights and inputs.",
    ]
    return "\n".join(rows)


def decode_table(records: Sequence[Record]) -> str:
    """4-bit decode beside a copy of the decoded matrix: GB/s, of bytes that a decoder has to read and write.

    Raises:
        ValueError: records of more than one environment, or none.
    """
    rates = {"bandwidth": lambda r: r.median, "time": lambda r: r.settings.get("bytes", 0) / r.median / 1e6}
    records = [r for r in records if r.op == "quant" and r.metric in rates and rates[r.metric](r)]
    where = place(records)
    by_key = {(r.case, r.peer): rates[r.metric](r) for r in records}
    peers = list(dict.fromkeys(r.peer for r in records))
    rows = [f"| NF4, nested, to bf16 | {' | '.join(peers)} |", "|---" * (len(peers) + 1) + "|"]
    for case in dict.fromkeys(r.case for r in records):
        figures = [f"{by_key[case, peer]:.0f}" if (case, peer) in by_key else "" for peer in peers]
        rows.append(f"| {case} | {' | '.join(figures)} |")
    rows += [
        "",
        f"GB/s of device time, medians of {len(records[0].samples)} interleaved rounds; {where.device}; "
        f"{versions(where, ('torch', 'triton', 'bitsandbytes', 'unsloth'))}; {where.date[:10]}; `make gpu`.",
    ]
    return "\n".join(rows)


def combinations_table(records: Sequence[Record]) -> str:
    """A row a way of PEFT to adapt, a column a base: time of a step (PEFT's own spread) and bytes kept beside PEFT's.

    What is not served, or only in part, has the number of a reason below.

    Raises:
        ValueError: records of more than one environment, or none.
    """
    records = [record for record in records if record.suite == "combinations"]
    where = place(records)
    by_key = {(r.settings["method"], r.settings["base"], r.metric, r.peer): r for r in records}
    bases = list(dict.fromkeys(r.settings["base"] for r in records))
    reasons: dict[str, int] = {}

    def number(reason: str) -> str:
        return f"[{reasons.setdefault(reason, len(reasons) + 1)}]"

    def cell(method: str, base: str) -> str:
        refused = by_key.get((method, base, "refused", "peft"))
        if refused is not None:
            words = shorten(refused.settings["reason"], 110, placeholder=" ...")
            return f"no {number(f'PEFT: `{words}`')}"
        said = by_key.get((method, base, "served", "fastpeft"))
        if said is None:
            return ""
        why = [number(f"fastpeft: {reason}") for reason in said.settings["reasons"]]
        ours = by_key.get((method, base, "step time", "fastpeft"))
        if ours is None:
            return " ".join(["PEFT's", *why])
        theirs, again = by_key[method, base, "step time", "peft"], by_key[method, base, "step time", "peft again"]
        sizes = [by_key[method, base, "kept for backward", peer].median for peer in ("fastpeft", "peft")]
        figures = f"{time_ratio(ours, theirs):.2f} ({time_ratio(again, theirs):.2f}), {sizes[0] / sizes[1]:.2f}"
        return " ".join([figures, *why])

    rows = [f"| | {' | '.join(bases)} |", "|---" * (len(bases) + 1) + "|"]
    for method in dict.fromkeys(r.settings["method"] for r in records):
        rows.append(f"| {method} | {' | '.join(cell(method, base) for base in bases)} |")
    rows += ["", *(f"- {number(reason)} {reason}" for reason in list(reasons))]
    first = next(r for r in records if r.metric == "step time")
    names = ("torch", "transformers", "peft", "bitsandbytes", "torchao", "hqq")
    rows += [
        "",
        "Each cell: time of a training step over PEFT's (PEFT's second time over its first, in the same rounds), bytes "
        f"kept for backward over PEFT's. Llama (Qwen3-MoE for experts), {first.settings['model']}; medians of "
        f"{len(first.samples)} interleaved rounds on {where.device}, torch on {first.settings['threads']} of them; "
        f"{versions(where, names)}; "
        f"{where.date[:10]}; `python -m fastpeft.bench.combinations`.",
    ]
    return "\n".join(rows)


def losses_table(records: Sequence[Record]) -> str:
    """Time and memory of the loss of hidden states, one row a case.

    Raises:
        ValueError: records of more than one environment, or none.
    """
    records = [record for record in records if record.suite == "losses"]
    where = place(records)
    by_key = {(r.case, r.peer, r.metric): r for r in records}
    names = {"plain": "plain PyTorch", "fastpeft": "fastpeft", "trl": "TRL's chunked function"}
    shown = [peer for peer in names if any(r.peer == peer for r in records)]
    others = [peer for peer in shown if peer != "fastpeft"]
    against = ", ".join(names[peer] for peer in others)
    rows = [
        f"| | {', '.join(names[peer] for peer in shown)}, ms | time, fastpeft / {against} | peak, MiB |",
        "|---|---|---|---|",
    ]
    for case in dict.fromkeys(r.case for r in records):
        times = [by_key[case, peer, "step time"] for peer in shown]
        ratios = [time_ratio(by_key[case, "fastpeft", "step time"], by_key[case, peer, "step time"]) for peer in others]
        peaks = [by_key[case, peer, "peak memory"].median for peer in shown]
        cells = (
            ", ".join(f"{time.median:.0f}" for time in times),
            ", ".join(f"{each:.2f}" for each in ratios),
            ", ".join(f"{mib:.0f}" for mib in peaks),
        )
        rows.append(f"| {case} | {' | '.join(cells)} |")
    first = records[0]
    rows += [
        "",
        f"Forward and backward in fp32; medians of {len(first.samples)} interleaved rounds on {where.device}, torch on "
        f"{first.settings['threads']} of them; {versions(where, ('torch', 'trl'))}; {where.date[:10]}; "
        "`python -m fastpeft.bench.losses`. Peak: rise of the process's resident memory in one step.",
    ]
    return "\n".join(rows)


TABLES: dict[str, Callable[[Sequence[Record]], str]] = {
    "": steps_table,
    "steps": steps_table,
    "earlier steps": steps_table,
    "layer": layer_table,
    "decode": decode_table,
    "combinations": combinations_table,
    "losses": losses_table,
    "limits": limits_table,
    "trainings": trainings_table,
}
"""By the name in the markers."""


def cases(records: Sequence[Record], only: str) -> list[Record]:
    """The records of cases in whose names the expression `only` is found."""
    return [record for record in records if re.search(only, record.case)]


def insert(text: str, table: str, name: str = "") -> str:
    """The document with the table between the markers of that name.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    begin, end = (f"<!-- measured{' ' * bool(name)}{name}: {which} -->" for which in ("begin", "end"))
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"document: expected {begin} and {end} once each, in this order")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastpeft.bench.tables", description=__doc__)
    parser.add_argument("records", type=Path)
    parser.add_argument("--as", dest="name", choices=TABLES, default="", help="which table, and which markers")
    parser.add_argument("--into", type=Path, help="a document with the two markers; printed when not given")
    parser.add_argument("--only", metavar="REGEX", default="", help="the cases whose names it is found in")
    options = parser.parse_args(arguments)
    table = TABLES[options.name](cases(load(options.records), options.only))
    if options.into is None:
        print(table)
    else:
        options.into.write_text(insert(options.into.read_text(), table, options.name))


if __name__ == "__main__":
    main()
