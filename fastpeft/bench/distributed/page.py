"""The losses as a table and a picture of the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def differences(found: dict[str, Any]) -> dict[tuple[str, str], list[float]]:
    """|loss - loss of one process| of each step that a leg took itself, by (base, leg)."""
    alone = {leg["base"]: leg["losses"] for leg in found["legs"] if leg["name"] == "one process"}
    return {
        (leg["base"], leg["name"]): [
            abs(a - b) for a, b in zip(leg["losses"], alone[leg["base"]][leg["first"] :], strict=True)
        ]
        for leg in found["legs"]
    }


def table(found: dict[str, Any]) -> str:
    """A row for each leg."""
    away = differences(found)
    rows = [
        "| base | spread over | steps | last loss | largest difference from one process | layers by the op "
        "| base in each process, KiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for leg in found["legs"]:
        most = max(away[leg["base"], leg["name"]])
        steps = f"{leg['first'] + 1} to {leg['first'] + len(leg['losses'])}"
        rows.append(
            f"| {leg['base']} | {leg['name']} | {steps} | {leg['losses'][-1]:.6f} | {most:.1e} | "
            f"{leg['fused']} of {leg['layers']} | {leg['frozen_bytes'] / 1024:.0f} |"
        )
    where = found["environment"]
    names = ", ".join(f"{name} {where['versions'][name]}" for name in PACKAGES)
    return "\n".join([*rows, "", f"{where['device']}, gloo, fp32; {names}; {where['date'][:10]}; "
                      "`python -m fastpeft.bench.distributed`."])  # fmt: skip


def figure(found: dict[str, Any], path: Path) -> None:
    """Losses above, differences from one process below, a column for each base."""
    from matplotlib.figure import Figure

    away, bases = differences(found), list(dict.fromkeys(leg["base"] for leg in found["legs"]))
    drawn = Figure(figsize=(10, 6.5), layout="constrained")
    panels = drawn.subplots(2, len(bases), sharex=True, squeeze=False)
    for column, base in enumerate(bases):
        above, below = panels[:, column]
        for place, leg in enumerate(leg for leg in found["legs"] if leg["base"] == base):
            steps = [leg["first"] + 1 + i for i in range(len(leg["losses"]))]
            look = {
                "marker": "os^DvPX<>"[place % 9],
                "markersize": 9 - 0.7 * place,
                "linewidth": 1,
                "fillstyle": "none",
            }
            above.plot(steps, leg["losses"], label=leg["name"], color=f"C{place}", **look)
            below.plot(steps, away[base, leg["name"]], color=f"C{place}", **look)
        above.set_title(base)
        above.set_ylabel("loss")
        below.set_ylabel("|loss - loss of one process|")
        below.set_yscale("symlog", linthresh=1e-7)
        below.set_xlabel("step")
        for axes in (above, below):
            axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=7)
    drawn.savefig(path, metadata={"Date": None})
