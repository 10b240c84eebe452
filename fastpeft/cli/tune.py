"""`fastpeft tune`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from fastpeft.errors import RunFailed, UserError
from fastpeft.paths import can_be_made

from .generate import Base, TrustRemoteCode
from .shared import Dtype, Quantization, Quiet, Verbose, console, settle_logs

if TYPE_CHECKING:
    from fastpeft.tuning import Tuning

EPILOG = """
Examples:

  fastpeft tune meta-llama/Llama-3.2-1B --quantization nf4 --tokens 4096

  fastpeft tune runs/chat --again
"""


def tune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Base model or adapter: folder or hub ID.")],
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Tokens of a forward pass, rows times length; may come again. 512, 1024, 2048 and 4096 if left out.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of the fresh adapter on a base model.")] = 16,
    dropout: Annotated[float, typer.Option(min=0.0, max=0.99, help="Of the fresh adapter.")] = 0.0,
    target_modules: Annotated[str, typer.Option(help="What the fresh adapter is put on.")] = "all-linear",
    base: Base = None,
    quantization: Annotated[
        Quantization | None, typer.Option(help="Storage of the frozen weights.", show_default=False)
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="What is computed with; auto: as fastpeft train.")] = Dtype.auto,
    again: Annotated[bool, typer.Option("--again", help="Measure also what was measured earlier.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every case as JSON.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure which implementation of each op is fastest on this machine.

    One small training step shows what the model computes; each of these computations is then timed on random numbers,
    in every way in which it can be done. The fastest ways are kept in the user's cache folder and taken by all later
    runs on this device. Give rank, quantization, dtype and dropout of the training, and let nothing else run meanwhile.
    """
    from fastpeft.config import LoraSection
    from fastpeft.models import tuned
    from fastpeft.models.devices import autocast, pick_device, pick_dtype
    from fastpeft.models.trainable import load_trainable
    from fastpeft.progress import count
    from fastpeft.tuning import TOKENS, cases_of, measure, winners_file

    settle_logs(verbose, quiet)
    source = tuned.find(model, base=base, trust_remote_code=trust_remote_code)
    device = pick_device()
    chosen = pick_dtype(dtype.value, device, "--dtype")
    file = winners_file(device)
    if not can_be_made(file.parent):
        raise UserError(f"{file.parent}: expected a folder that can be written, for the winners")
    shown = console(quiet)
    shown.print("loading the model", highlight=False)
    section = LoraSection(r=rank, alpha=2 * rank, dropout=dropout, target_modules=target_modules)
    stored = None if quantization is None else quantization.value
    loaded = load_trainable(source, device, chosen, stored, section)
    try:
        with autocast(device, chosen):
            cases = cases_of(loaded, tokens or TOKENS)
    except ValueError as error:
        raise UserError(f"MODEL: {error}") from error
    del loaded  # its memory is wanted for the measurements
    with count(shown, "measuring", len(cases)) as progress:
        try:
            found = measure(cases, device, again=again, progress=progress)
        except OSError as error:  # it could be a moment ago
            raise RunFailed(f"the winners cannot be written: {error}") from error
    print(_json(found) if as_json else found)
    if found.outcomes and not any(outcome.winner for outcome in found.outcomes):
        raise RunFailed("nothing could be measured")


def _json(found: Tuning) -> str:
    from fastpeft_kernels.tuning.records import Winner

    rows = []
    for outcome in found.outcomes:
        winner = outcome.winner or Winner(outcome.op, outcome.key._asdict(), "", {})
        more = {"library": outcome.library, "dropped": outcome.dropped, "reused": outcome.reused}
        rows.append({**asdict(winner), **more})
    return json.dumps({"device": found.device, "file": str(found.file), "outcomes": rows}, indent=1)
