"""`fastpeft quickstart`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .shared import Dtype, Quantization


class Storage(str, Enum):
    """The two kinds of Quantization that are compared here."""

    nf4 = Quantization.nf4.value
    none = Quantization.none.value


def quickstart(
    model: Annotated[
        str | None, typer.Option(metavar="ID_OR_DIR", help="Base model; a small one is shipped.", show_default=False)
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to fine-tune on; some is shipped.", show_default=False)
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to measure on; goes with --text.", show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps; the first is not timed.")] = 80,
    batch_size: Annotated[int, typer.Option(help="Blocks of text a step.")] = 8,
    sequence_length: Annotated[int, typer.Option(help="Tokens a block.")] = 256,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    quantization: Annotated[Storage, typer.Option(help="Storage of the frozen weights.")] = Storage.nf4,
    dtype: Annotated[
        Dtype, typer.Option(help="What is computed with; auto: float32 on a CPU, 16 bits on a GPU.")
    ] = Dtype.auto,
    seed: Annotated[int, typer.Option(help="Of the adapter's first values and the order of the data.")] = 0,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where results go.")] = Path("runs/quickstart"),
) -> None:
    """Fine-tune a small model twice, with plain PEFT and accelerated, and compare.

    Needs neither a network nor a GPU. Both runs use transformers' Trainer with the same seed, data order and initial
    adapter, each in a process of its own. Exits with 1 when the two disagree or the model does not get better.
    """
    from fastpeft.quickstart.comparing import run
    from fastpeft.quickstart.settings import checked_settings

    settings = checked_settings(
        model=model,
        text=text,
        held_out=held_out,
        steps=steps,
        batch_size=batch_size,
        sequence_length=sequence_length,
        rank=rank,
        learning_rate=learning_rate,
        quantization=quantization.value,
        dtype=dtype.value,
        seed=seed,
        output=output,
    )
    if not run(settings):
        raise typer.Exit(1)
