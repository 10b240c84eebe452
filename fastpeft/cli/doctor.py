"""`fastpeft doctor`."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only what is not ok.")] = False,
) -> None:
    """What this machine can do for fine-tuning, and what is wrong with it.

    Looks at system, GPUs, driver, torch, Triton, bitsandbytes, libraries, memory, disks and the link to the GPU, tries
    small computations, and says what to do about whatever is not ok. Needs no GPU. Prints no user names and no secrets.

    Exits with 1 when it finds a problem: something without which this machine cannot fine-tune, or cannot use the GPU
    that it has. Notes and warnings exit with 0.
    """
    from fastpeft.doctor import Status, examine, render

    diagnosis = examine()
    if as_json:
        print(render.as_json(diagnosis, quiet))
    else:
        render.show(diagnosis, quiet)
    if diagnosis.status is Status.problem:
        raise typer.Exit(1)
