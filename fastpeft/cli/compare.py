"""`fastpeft compare`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fastpeft.config import FastpeftConfig

from .shared import Quiet, Verbose, console, settle_logs
from .train import read_config

EPILOG = """
Examples:

  fastpeft compare examples/compare.yaml

  fastpeft compare --model MODEL --data news.jsonl --methods full,lora,ia3 --steps 60 --minutes 40

  fastpeft compare examples/compare.yaml --resume

Other keys of the configuration are options as with fastpeft train: --lora.r 8, --max-length 64.
"""


def compare(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.yaml", help="Configuration; options change it.")
    ] = None,
    methods: Annotated[str | None, typer.Option(metavar="A,B,...", help="Which; all if left out.")] = None,
    seeds: Annotated[int | None, typer.Option(help="How often each is trained and tested (3).")] = None,
    rates: Annotated[int | None, typer.Option(help="Learning rates tried for each (3).")] = None,
    steps: Annotated[int | None, typer.Option(help="Of each training; training.max_steps.")] = None,
    rows: Annotated[int | None, typer.Option(help="To learn from, at the most (400).")] = None,
    minutes: Annotated[float | None, typer.Option(help="Begin no trial that would end later.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the comparison in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the one in the output folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Which way to fine-tune is best for a model and your rows?

    Tries each method with several learning rates, chosen by rows of validation; then trains each with several seeds on
    the same batches, and tests once. Repeated and nearly repeated rows are left out first. The output folder gets
    report.md, comparison.svg and results.json; a comparison that was cut short goes on with --resume.
    """
    settled = read_config(config, context.obj or [], resume=False)
    given = {"methods": methods.split(",") if methods else None, "seeds": seeds, "rates": rates, "rows": rows}
    settled = _with(settled, given | {"minutes": minutes}, steps)
    from fastpeft.strategies.compare.report import write
    from fastpeft.strategies.compare.runner import compare as run

    settle_logs(verbose, quiet=not verbose)  # every trial would say again what is accelerated of it
    shown = console(quiet)
    found = run(settled, shown, resume=resume, overwrite=overwrite)
    text, results = write(found)
    print(results if as_json else text)
    shown.print(f"report: {settled.training.output_dir}/report.md", markup=False, highlight=False, soft_wrap=True)


def _with(config: FastpeftConfig, options: dict[str, Any], steps: int | None) -> FastpeftConfig:
    """The configuration with what was given on the command line."""
    given = {name: value for name, value in options.items() if value is not None}
    strategy = replace(config.strategy, options=config.strategy.options | given)
    training = config.training if steps is None else replace(config.training, max_steps=steps)
    return replace(config, strategy=strategy, training=training)
