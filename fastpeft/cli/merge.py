"""`fastpeft merge`."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .generate import Base, TrustRemoteCode
from .shared import Dtype, Quantization, Quiet, Verbose, console, settle_logs

if TYPE_CHECKING:
    from fastpeft.models.tuned import Source

EPILOG = """
Examples:

  fastpeft merge runs/chat merged

  fastpeft merge runs/chat/checkpoint-500 merged --dtype float16
"""


class Into(str, Enum):
    """What the adapter of a quantised base is added to."""

    decoded = "decoded"
    original = "original"


def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of a run or adapter, or an ID on the hub.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="New folder for the merged model.")],
    dtype: Annotated[
        Dtype, typer.Option(help="Of the merged weights; auto: the base checkpoint's own 16 bits, else bfloat16.")
    ] = Dtype.auto,
    into: Annotated[
        Into, typer.Option(help="A base in 4 or 8 bits: its decoded values, or the checkpoint's original ones.")
    ] = Into.decoded,
    base: Base = None,
    quantization: Annotated[
        Quantization | None,
        typer.Option(
            help="Storage of the base in training, where no config.yaml beside the adapter tells.", show_default=False
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Merge an adapter into its base: a plain model for transformers, vLLM and others.

    The sum is made in float32 and rounded once, on the CPU. An adapter that was trained on a base in 4 bits is added to
    what these bits stand for, decoded; nothing is quantised again.
    """
    from fastpeft import merging
    from fastpeft.generation import end_tokens
    from fastpeft.models import tuned

    settle_logs(verbose, quiet)
    output = output.expanduser()
    merging.check_target(output, overwrite)
    source = tuned.find(adapter, base=base, key="ADAPTER", trust_remote_code=trust_remote_code)
    if quantization is not None:
        source = replace(source, model=replace(source.model, quantization=quantization.value))
    chosen = _dtype(dtype, source.config)
    shown = console(quiet)
    shown.print("loading and merging", highlight=False)
    merged = merging.merge(source, chosen, decode=into is Into.decoded)
    shown.print("saving", highlight=False)
    tokenizer = tuned.load_tokenizer(source)
    if getattr(merged, "generation_config", None) is not None:
        merged.generation_config.eos_token_id = end_tokens(merged, tokenizer)
        if merged.generation_config.temperature not in (None, 1.0) or merged.generation_config.top_p not in (None, 1.0):
            merged.generation_config.do_sample = True  # else saving refuses these two as without effect
    merging.save(merged, tokenizer, output, overwrite=overwrite)
    print(f"{output}: {source.name} merged into {source.model.name}, {str(chosen).removeprefix('torch.')}", end="")
    print(_decoded(source, into))


def _decoded(source: Source, into: Into) -> str:
    """What was done to the base's storage, if anything."""
    if getattr(source.config, "quantization_config", None) is not None:
        return ", base decoded"  # the checkpoint has no other values
    stored = source.model.quantization or "none"
    return f", base decoded from {stored}" if stored != "none" and into is Into.decoded else ""


def _dtype(wanted: Dtype, config: Any) -> Any:
    import torch

    if wanted is not Dtype.auto:
        return getattr(torch, wanted.value)
    own = getattr(config, "dtype", None)
    return own if own in (torch.float16, torch.bfloat16) else torch.bfloat16
