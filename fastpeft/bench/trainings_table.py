"""The table of whole fine-tunings, made from records of `fastpeft.bench.finetune`."""

from __future__ import annotations

from collections.abc import Sequence

from .reading import place, versions
from .records import Record

PEERS = {
    "peft": "PEFT, Trainer",
    "peft again": "PEFT again, rows of a batch reversed",
    "peft + liger": "PEFT + Liger, Trainer",
    "torch.compile": "PEFT compiled, Trainer",
    "trl": "PEFT, TRL's SFTTrainer",
    "unsloth": "Unsloth, TRL's SFTTrainer",
    "fastpeft": "fastpeft, Trainer",
    "fastpeft + trl": "fastpeft, TRL's SFTTrainer",
    "fastpeft + trl without metrics": "fastpeft, SFTTrainer with Trainer's loss",
}


def trainings_table(records: Sequence[Record]) -> str:
    """One part a case, in it one row a trainer; who learned something else than PEFT or did not run has the reason.

    Raises:
        ValueError: records of more than one environment, or none.
    """
    records = [record for record in records if record.op == "run"]
    where = place(records)
    found = {(r.case, r.peer, r.metric): r for r in records}
    lines: list[str] = []
    for case in dict.fromkeys(r.case for r in records):
        lines += [
            f"| {case} | ms a step | of PEFT's | tokens/s | of the matrix rate | peak, MiB |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        lines += [
            _row(found, case, peer) for peer in PEERS if any((case, peer, m) in found for m in ("time", "left out"))
        ]
        lines.append("")
    first = next(r for r in records if r.metric == "time")
    steps, warmup = (int(first.settings[name]) for name in ("steps", "warmup"))
    names = ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "trl", "unsloth")
    lines.append(
        f"Random weights in the published sizes; medians of the last {steps - warmup} of {steps} steps of a training, "
        "all of the trainer's work in them; each trainer in a process of its own, one after the other. All had PEFT's "
        "losses: within twice the error of two trainings by PEFT itself against one in a wider dtype. Peak: the most "
        f"that training took beside the model. {where.device}, driver {where.driver}; {versions(where, names)}; "
        f"{where.date[:10]}; `make gpu`, part finetune."
    )
    return "\n".join(lines)


def _row(found: dict[tuple[str, str, str], Record], case: str, peer: str) -> str:
    time = found.get((case, peer, "time"))
    if time is None:
        return f"| {PEERS[peer]} | left out: {found[case, peer, 'left out'].settings['reason']} | | | | |"
    rate, peft = found.get((case, peer, "model FLOPs utilisation")), found[case, "peft", "time"]
    cells = [
        f"{time.median:.1f}",
        f"{time.median / peft.median:.2f}",
        f"{found[case, peer, 'speed'].median:.0f}",
        "" if rate is None else f"{rate.median:.2f}",
        f"{found[case, peer, 'peak memory'].median:.0f}",
    ]
    return f"| {PEERS[peer]} | {' | '.join(cells)} |"
