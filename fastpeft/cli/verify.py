"""`fastpeft verify`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from fastpeft.errors import UserError

from .generate import Base, TrustRemoteCode
from .shared import LAST_SEED, Dtype, Quantization, Quiet, Verbose, console, settle_logs

EPILOG = """
Examples:

  fastpeft verify meta-llama/Llama-3.2-1B --quantization nf4

  fastpeft verify runs/chat --json
"""


def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Base model or adapter: folder or hub ID.")],
    rank: Annotated[int, typer.Option(min=1, help="Of the fresh adapter on a base model.")] = 16,
    target_modules: Annotated[str, typer.Option(help="What the fresh adapter is put on.")] = "all-linear",
    base: Base = None,
    quantization: Annotated[
        Quantization | None, typer.Option(help="Storage of the frozen weights.", show_default=False)
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="What is computed with; auto: as fastpeft train.")] = Dtype.auto,
    seed: Annotated[int, typer.Option(min=0, max=LAST_SEED, help="Of the random inputs.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print every check as JSON.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Prove on a model of yours that accelerated layers compute what PEFT computes.

    Runs one step with random inputs; every layer's output and gradients are held against PEFT's and against float64.
    Exits with 1 if a check fails.
    """
    import fastpeft
    from fastpeft.config import LoraSection
    from fastpeft.models import tuned
    from fastpeft.models.devices import autocast, pick_device, pick_dtype
    from fastpeft.models.trainable import load_trainable

    settle_logs(verbose, quiet)
    source = tuned.find(model, base=base, trust_remote_code=trust_remote_code)
    device = pick_device()
    chosen = pick_dtype(dtype.value, device, "--dtype")
    console(quiet).print("loading the model", highlight=False)
    stored = None if quantization is None else quantization.value
    section = LoraSection(r=rank, alpha=2 * rank, target_modules=target_modules)
    loaded = load_trainable(source, device, chosen, stored, section, seed)
    try:
        with autocast(device, chosen):
            found = fastpeft.verify(loaded, seed=seed)
    except ValueError as error:
        raise UserError(f"MODEL: {error}") from error
    report = fastpeft.report(loaded)
    print(_json(found, report) if as_json else f"{report}\n\n{found}")
    if not found.passed:
        raise typer.Exit(1)


def _json(found: Any, report: Any) -> str:
    return json.dumps(
        {
            "passed": found.passed,
            "loss": found.loss,
            "loss_peft": found.loss_peft,
            "checks": [{**asdict(check), "passed": check.passed} for check in found.checks],
            "unserved": list(found.unserved),
            "report": report.to_dict(),
        },
        indent=1,
    )
