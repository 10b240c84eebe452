"""Each way of PEFT to adapt over each base: is it served, and what does a training step take beside PEFT's?

python -m fastpeft.bench.combinations --rounds 5 --only "DoRA over" --out runs/bench/combinations.jsonl

Writes one JSON Lines file of records; `python -m fastpeft.bench.tables --as combinations` makes the table of it.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .bases import BASES, quantise
from .left_out import NotHereError, reason_of
from .methods import METHODS, RANK, Method
from .records import RecordFile, environment
from .steps import Sides, StepCase, base_model, make_batch, projections, side_by_side, targets
from .timer import ratio

SUITE = "combinations"
SIZES = StepCase("llama", "", torch.float32, layers=2, rows=2, tokens=128, rank=RANK)
_BY_PEFT = re.compile(r"^\d+ of \d+ calls by PEFT: ")


@dataclass(frozen=True)
class Served:
    """What the report says of a model.

    Attributes:
        layers: how many have adapters.
        fused: how many of them had every call so far computed by an op of ours.
        reasons: why others, or calls of them, were left to PEFT.
        mlps, fused_mlps: of the model, and computed as one op.
    """

    layers: int
    fused: int
    reasons: tuple[str, ...]
    mlps: int
    fused_mlps: int


@dataclass(frozen=True)
class Result:
    """Of one combination; `sides` is None where nothing is replaced, so that both would run the same code."""

    sides: Sides | None
    served: Served


class RefusedError(Exception):
    """PEFT itself does not make this combination, or does not train it for two steps; the message is its own."""


def measure(method: Method, base: str, rounds: int, sizes: StepCase) -> Result:
    """Time and bytes kept of a training step of PEFT and of fastpeft, and what the report says afterwards.

    Args:
        method: one of `METHODS`.
        base: one of `BASES`.
        rounds: how many samples of each.
        sizes: of the model and the batch.

    Raises:
        NotHereError: the base's library is absent.
        RefusedError: PEFT cannot do it.
    """
    import fastpeft

    case = replace(sizes, family=method.family)
    if rows := len(method.row_names):
        case = replace(case, rows=rows, tokens=case.rows * case.tokens // rows)
    torch.manual_seed(0)
    plain = base_model(case)
    names, paths = targets(plain), [path for path, _ in projections(plain)]
    quantised = quantise(plain, base, paths)
    batch = make_batch(case, "cpu")

    def loss(model: Any) -> torch.Tensor:
        with fastpeft.mixed_batch(model, method.row_names) if method.row_names else nullcontext():
            return model(**batch).loss  # type: ignore[no-any-return]

    try:
        model = method.adapt(quantised, names).train()
        trial = copy.deepcopy(model)
        for _ in range(2):
            loss(trial).backward()
    except Exception as error:
        raise RefusedError(reason_of(error)) from error
    offered = served(fastpeft.accelerate(copy.deepcopy(model)))
    if not offered.fused and not offered.fused_mlps:
        return Result(None, offered)
    sides = side_by_side(model, loss, rounds)
    return Result(sides, served(sides.accelerated))


def served(model: nn.Module) -> Served:
    """The figures of `fastpeft.report`."""
    import fastpeft
    from fastpeft.replacements.lora import FROZEN

    rows = fastpeft.report(model).rows
    adapted = [row for row in rows if row.kind == "lora" and not row.op.startswith(FROZEN)]
    mlps = [row for row in rows if row.kind == "mlp"]
    reasons: dict[str, None] = {}
    fused = 0
    for row in adapted:
        why = [_BY_PEFT.sub("", note) for note in row.note.split("; ") if not row.op or _BY_PEFT.match(note)]
        fused += bool(row.op) and not why
        reasons |= dict.fromkeys(why)
    return Served(len(adapted), fused, tuple(reasons), len(mlps), sum(row.accelerated for row in mlps))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; names what is slower than PEFT by more than PEFT's own spread."""
    parser = argparse.ArgumentParser(prog="python -m fastpeft.bench.combinations", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="combinations whose name, METHOD over BASE, holds this text")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/combinations.jsonl"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.out.unlink(missing_ok=True)
    file = RecordFile(options.out, environment("cpu"))
    slower = []
    for base, name in _chosen(options.only):
        case = f"{name} over {base}"
        settings = {"method": name, "base": base, "threads": options.threads, "model": _model(SIZES)}
        try:
            result = measure(METHODS[name], base, options.rounds, SIZES)
        except NotHereError as error:
            print(f"{case:56} left out: {error}", flush=True)
            continue
        except RefusedError as error:
            print(f"{case:56} PEFT refuses: {error}", flush=True)
            file.add(
                suite=SUITE, case=case, op="step", peer="peft", metric="refused", unit="1", samples=1,
                settings={**settings, "reason": str(error)},
            )  # fmt: skip
            continue
        keep(file, case, result, settings)
        ours, spread, _ = _figures(result.sides)
        print(f"{case:56} {_summary(result)}", flush=True)
        if ours > 1.0 + abs(spread - 1.0):
            slower.append(case)
    for case in slower:
        print(f"slower than PEFT: {case}")
    return 0


def _chosen(text: str) -> Iterator[tuple[str, str]]:
    return ((base, name) for base in BASES for name in METHODS if text in f"{name} over {base}")


def _figures(sides: Sides | None) -> tuple[float, float, float]:
    """Time over PEFT's, PEFT's second time over its first, bytes kept over PEFT's; 1 where nothing was measured."""
    if sides is None:
        return 1.0, 1.0, 1.0
    ours, spread = (ratio(sides.samples, peer, "peft") for peer in ("fastpeft", "peft again"))
    return ours, spread, sides.kept["fastpeft"] / sides.kept["peft"]


def _summary(result: Result) -> str:
    found, (ours, spread, kept) = result.served, _figures(result.sides)
    share = f"{found.fused} of {found.layers} layers, {found.fused_mlps} of {found.mlps} MLPs"
    figures = f"  time {ours:.3f} (PEFT beside itself {spread:.3f})  kept {kept:.3f}" if result.sides else ""
    return f"{share}{figures}  {'; '.join(found.reasons)}"


def _model(sizes: StepCase) -> str:
    return f"{sizes.layers} layers of width {sizes.hidden}, {sizes.rows * sizes.tokens} tokens, r = {sizes.rank}, fp32"


def keep(file: RecordFile, case: str, result: Result, settings: dict[str, Any]) -> None:
    """One record a peer and metric, and one of what is served, whose settings hold the report's words."""
    common = {"suite": SUITE, "case": case, "op": "step"}
    if result.sides is not None:
        for peer, samples in result.sides.samples.items():
            file.add(**common, peer=peer, metric="step time", unit="ms", samples=samples, settings=settings)
        for peer, kept in result.sides.kept.items():
            size = kept / 2**20
            file.add(**common, peer=peer, metric="kept for backward", unit="MiB", samples=size, settings=settings)
    found = result.served
    said = {"layers": found.layers, "fused": found.fused, "reasons": list(found.reasons)}
    said |= {"mlps": found.mlps, "fused_mlps": found.fused_mlps}
    share = found.fused / found.layers
    file.add(**common, peer="fastpeft", metric="served", unit="1", samples=share, settings={**settings, **said})


if __name__ == "__main__":
    sys.exit(main())
