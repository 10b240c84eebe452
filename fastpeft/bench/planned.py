"""Peak memory of a step as `fastpeft plan` predicts it, beside what torch's allocator on this CPU was asked for.

python -m fastpeft.bench.planned                        # prints the table
python -m fastpeft.bench.planned --into docs/concepts/memory.md
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .memory import peak_of_step
from .steps import StepCase, adapt, base_model, targets
from .tables import insert

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
TASKS = {"llama": "causal-lm", "moe": "causal-lm", "gemma3": "causal-lm", "bert": "sequence-classification"}
HELD_OUT = ("gemma3", "bart")
"""Looked at only when all else was finished."""
FAMILIES = ("llama", "bert", "t5", "moe", *HELD_OUT)


@dataclass(frozen=True)
class Compared:
    """Bytes of one step beside the model."""

    name: str
    predicted: int
    measured: int

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


def cases() -> list[StepCase]:
    """Families x methods x what layers keep x lengths, on small models in fp32."""
    return [
        StepCase(
            family, method, torch.float32, hidden=256, layers=5, tokens=tokens, words=2000, checkpointing=recompute
        )
        for family in FAMILIES
        for method in ("lora", "qlora")
        for recompute in (False, True)
        for tokens in (128, 320)
    ]


def compare(case: StepCase) -> Compared:
    """One step measured, then predicted from the same configuration."""
    import fastpeft
    from fastpeft.config import LoraSection
    from fastpeft.memory.composing import compose
    from fastpeft.memory.layers import model_layers
    from fastpeft.memory.policy import LayerPolicy
    from fastpeft.memory.skeleton import build
    from fastpeft.memory.timeline import trace

    torch.manual_seed(0)
    base = _base(case)
    config, names = base.config, targets(base)
    model: Any = fastpeft.accelerate(adapt(base, case, "cpu"))
    ids = torch.randint(3, case.words, (case.rows, case.tokens), generator=torch.Generator().manual_seed(1))
    task = TASKS.get(case.family, "seq2seq-lm")
    batch = {"input_ids": ids, "labels": ids[:, 0] % 2 if task == "sequence-classification" else ids}
    model.config.use_cache = False

    def step() -> None:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    step()  # finds the siblings
    measured = peak_of_step(step, "cpu")
    extra = {"target_parameters": EXPERTS} if case.family == "moe" else {}
    section = LoraSection(r=case.rank, target_modules=names, extra=extra)
    skeleton = build(config, task, case.dtype, case.method == "qlora", section)
    if case.checkpointing:
        skeleton.model.gradient_checkpointing_enable({"use_reentrant": False})
    meta = {name: tensor.to("meta") for name, tensor in batch.items()}
    stretches = trace(skeleton.model, model_layers(skeleton.model), meta, "cpu", accumulated=False)
    kind = LayerPolicy("recompute" if case.checkpointing else "keep")
    peak = compose({kind: stretches}, skeleton.order, (kind,) * len(skeleton.order))
    return Compared(case.name, peak.size, measured)


def _base(case: StepCase) -> Any:
    import transformers as t

    h, n = case.hidden, case.layers
    if case.family == "gemma3":
        base: nn.Module = t.Gemma3ForCausalLM(
            t.Gemma3TextConfig(
                vocab_size=case.words, hidden_size=h, intermediate_size=2 * h, num_hidden_layers=n, head_dim=64,
                num_attention_heads=4, num_key_value_heads=2, sliding_window=64,
            )
        )  # fmt: skip
    elif case.family == "bart":
        base = t.BartForConditionalGeneration(
            t.BartConfig(
                vocab_size=case.words, d_model=h, encoder_layers=n, decoder_layers=n, encoder_ffn_dim=4 * h,
                decoder_ffn_dim=4 * h, encoder_attention_heads=4, decoder_attention_heads=4,
            )
        )  # fmt: skip
    else:
        base = base_model(case)
    return base


def table(found: Sequence[Compared]) -> str:
    rows = ["| step on a CPU | predicted, MiB | measured, MiB | ratio |", "|---|---|---|---|"]
    for one in found:
        rows.append(f"| {one.name} | {one.predicted / 2**20:.2f} | {one.measured / 2**20:.2f} | {one.ratio:.3f} |")
    worst = max(abs(one.ratio - 1) for one in found)
    rows += [
        "",
        "Beside the model itself; predicted from the first layers of each stack, measured by torch's profiler. "
        f"Farthest off: {worst:.1%}. torch {torch.__version__}; `python -m fastpeft.bench.planned`.",
    ]
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastpeft.bench.planned", description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, help="only this one")
    parser.add_argument("--into", type=Path, help="a document with the two markers; printed when not given")
    options = parser.parse_args(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    found = []
    for case in cases():
        if options.family in (None, case.family):
            found.append(compare(case))
            print(f"{found[-1].name}: {found[-1].ratio:.4f}", flush=True)
    if options.into is None:
        print(table(found))
    else:
        options.into.write_text(insert(options.into.read_text(), table(found), "planned"))


if __name__ == "__main__":
    main()
