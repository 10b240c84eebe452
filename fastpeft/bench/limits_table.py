"""The table of models that hardly fit, made from records of `make gpu`, part limits."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .reading import place, versions
from .records import Record

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def limits_table(records: Sequence[Record]) -> str:
    """One row a case that passed: time of a step, what it took at the most, and what was predicted.

    Each case may be of another run and commit, on the same GPU with the same driver and packages.

    Raises:
        ValueError: a case of more than one environment, cases of several GPUs, drivers or packages, or no records.
    """
    records = [record for record in records if record.suite == "limits"]
    places = [place([r for r in records if r.case == case]) for case in dict.fromkeys(r.case for r in records)]
    said = {(where.device, where.driver, versions(where, PACKAGES)) for where in places}
    if len(said) != 1:
        raise ValueError(f"records: expected one GPU with one driver and the same packages, got {len(said)}")
    ((device, driver, packages),) = said
    predictions = [r for r in records if r.metric == "predicted_to_peak"]
    steps = sorted({r.settings.get("predicted_for", "steps with gradient accumulation") for r in predictions})
    days = " and ".join(sorted({where.date[:10] for where in places}))
    by_key = {(r.case, r.metric): r.median for r in records}
    rows = [
        "| QLoRA on a GPU of so much memory | a step, s | tokens/s | peak, MiB | predicted / peak | reserved, MiB "
        "| speed beside resident weights |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case in [r.case for r in records if r.metric == "passed" and r.median == 1.0]:
        seconds, tokens = by_key[case, "step_s"], int(re.findall(r"(\d+) tokens", case)[0])
        beside = by_key.get((case, "speed_of_resident_same_policy"))
        cells = [f"{seconds:.1f}", f"{tokens / seconds:.0f}", f"{by_key[case, 'peak_mib']:.0f}"]
        cells += [f"{by_key[case, 'predicted_to_peak']:.3f}", f"{by_key[case, 'reserved_mib']:.0f}"]
        rows.append(f"| {case} | {' | '.join(cells)} | {'not streamed' if beside is None else f'{beside:.2f}'} |")
    rows += [
        "",
        f"One step each, random weights, bf16, fused AdamW; {device}, driver {driver}, limited by "
        f"`torch.cuda.set_per_process_memory_fraction` to 0.5 GiB less, which are the CUDA context's; "
        f"{packages}; {days}; `make gpu`, part limits. Reserved: by torch's allocator, with what it holds unused. "
        f"Policies and predictions: by `fastpeft plan`, for {', or '.join(steps)}.",
    ]
    return "\n".join(rows)
