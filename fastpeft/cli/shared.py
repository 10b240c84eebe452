"""What the commands share: how much they say, and where it goes."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console


LAST_SEED = 2**32 - 1


class Quantization(str, Enum):
    """How the frozen weights are stored."""

    none = "none"
    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"


class Dtype(str, Enum):
    """What is computed with."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but errors and the result.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what the libraries log, too.")]


def console(quiet: bool = False) -> Console:
    """For people, on stderr; standard output is for results."""
    from rich.console import Console

    return Console(stderr=True, quiet=quiet or not speaks())


def speaks() -> bool:
    """Whether this process is the one that shows things: of several under torchrun or accelerate launch the first."""
    return os.environ.get("RANK", "0") == "0"


def complains() -> bool:
    """Whether this process says what is wrong: the first of each machine, for a file may be missing on one only."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def uncollected() -> Iterator[None]:
    """Python's search for garbage waits: importing libraries makes millions of objects that stay, all searched again
    and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def settle_logs(verbose: bool, quiet: bool = False, rows: bool = True) -> None:
    """What the libraries log and warn of goes to stderr if `verbose`; without, nothing below an error does.

    What fastpeft itself warns of does, unless `quiet`, until `unsettle_logs`. The libraries' own progress bars would
    break ours, so they are off. Without `rows` datasets is left alone, which takes a second to import.
    """
    import transformers

    level = logging.INFO if verbose else logging.ERROR
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.disable_progress_bar()
    if rows:
        _settle_datasets(verbose)
    for name in ("trl", "peft", "accelerate", "bitsandbytes", "huggingface_hub", "torch"):
        logging.getLogger(name).setLevel(level)
    if quiet:
        logging.getLogger("fastpeft").setLevel(logging.ERROR)
    if not verbose:
        warnings.simplefilter("ignore")


def _settle_datasets(verbose: bool) -> None:
    try:
        import datasets
    except ImportError:  # what needs it says so
        return
    datasets.utils.logging.set_verbosity(logging.INFO if verbose else logging.CRITICAL)  # its errors are raised as well
    datasets.disable_progress_bars()


def unsettle_logs() -> None:
    """fastpeft's own warnings are heard again, in a process that goes on."""
    logging.getLogger("fastpeft").setLevel(logging.NOTSET)
