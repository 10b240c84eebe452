"""`fastpeft cache`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastpeft.errors import RunFailed, UserError

EPILOG = """
Examples:

  fastpeft cache

  fastpeft cache --clear meta-llama/Llama-3.2-1B

  fastpeft cache --clear all
"""


def cache(
    clear: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="Delete what is kept of this model, or of all; may come again.",
            show_default=False,
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Of the cache; the user's if left out.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the models whose 4-bit weights are kept on disk, or clear them.

    fastpeft.load and the commands pack the weights of a model once, and read them from there in later runs. Whatever is
    cleared is packed again when it is needed.
    """
    from fastpeft.memory.packed import entries as packed_entries

    found = packed_entries.entries(folder)
    if clear is not None:
        if unknown := [name for name in clear if name != "all" and name not in {entry.source for entry in found}]:
            raise UserError(f"--clear: expected all, or a model that fastpeft cache lists, got {unknown[0]!r}")
        found = [entry for entry in found if "all" in clear or entry.source in clear]
        if busy := [entry.source for entry in found if not packed_entries.clear(entry)]:
            raise RunFailed(f"{busy[0]}: another process packs its weights; try again later")
    rows = [
        {"model": one.source, "packing": one.packing, "mib": one.bytes >> 20, "finished": one.finished} for one in found
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        state = "" if row["finished"] else ", unfinished"
        print(f"{row['mib']:>8} MiB  {row['model']}  ({row['packing']}{state})")
    mib = sum(one.bytes for one in found) >> 20
    print(f"{mib:>8} MiB  {'cleared' if clear else 'in'} {folder or packed_entries.user_folder()}")
