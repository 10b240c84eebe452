"""Peak memory of a step as `fastpeft plan` predicts it, beside what torch's allocator on this CPU was asked for.

python -m fastpeft.bench.planned                        # prints the table
python -m fastpeft.bench.planned --into docs/concepts/memory.md
python -m fastpeft.bench.planned --table                # the longest contexts that are predicted to fit
python -m fastpeft.bench.planned --recorded benchmarks/results/nvidia-h200/memory.jsonl     # a GPU's measured peaks
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastpeft.memory.plan.choosing import in_turns
from fastpeft.memory.policy import ACTIVATIONS, LayerPolicy, MemoryPolicy

from .memory import peak_of_step
from .steps import StepCase, adapt, base_model, targets
from .tables import insert

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
TASKS = {
    **dict.fromkeys(("llama", "moe", "gemma3", "qwen3"), "causal-lm"),
    "bert": "sequence-classification",
    "modernbert": "masked-lm",
}
HELD_OUT = ("moe", "bart", "modernbert", "qwen3", "marian")
"""Looked at only when all else was finished."""
FAMILIES = ("llama", "bert", "t5", "gemma3", *HELD_OUT)
METHODS = ("lora", "qlora")
LENGTHS = (128, 320)
TILE = 64
POLICIES = (
    *(LayerPolicy(kind) for kind in ACTIVATIONS),
    LayerPolicy("recompute", streamed=True),
    *(LayerPolicy(kind, tile=TILE) for kind in ("selective", "recompute")),
)


class Case(NamedTuple):
    """One step of a small model in fp32, two rows; what layers keep is set by `accelerate(memory=...)`."""

    family: str
    method: str
    policy: LayerPolicy
    tokens: int

    @property
    def name(self) -> str:
        tiles = f", tiles of {self.policy.tile} tokens" if self.policy.tile else ""
        what = self.policy.activations + ", streamed" * self.policy.streamed + tiles
        return f"{self.family} {self.method}, {what}, 2 x {self.tokens} tokens"


@dataclass(frozen=True)
class Compared:
    """Bytes of one step beside the model."""

    name: str
    predicted: int
    measured: int

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


def cases() -> list[Case]:
    """Families x methods x policies x lengths; all but "keep" and "recompute" at one length, tiles of MLPs that are one
    op."""
    both = [Case(*each) for each in product(FAMILIES, METHODS, POLICIES, LENGTHS)]
    some = [case for case in both if case.policy in TWICE or case.tokens == LENGTHS[-1]]
    return [case for case in some if not case.policy.tile or case.family in TILED]


TILED = ("llama", "t5", "gemma3")
TWICE = (LayerPolicy("keep"), LayerPolicy("recompute"))


class Family:
    """A model with values and the prediction of the same, for every policy and length."""

    def __init__(self, family: str, method: str) -> None:
        from fastpeft.config import LoraSection
        from fastpeft.memory.plan.predicting import Model, Setting

        size = StepCase(family, method, torch.float32, hidden=256, layers=6, tokens=LENGTHS[-1], words=2000)
        torch.manual_seed(0)
        base = _base(size)
        config, names = base.config, targets(base)
        self.family, self.method, self.words = family, method, size.words
        self.task = TASKS.get(family, "seq2seq-lm")
        model: Any = adapt(base, size, "cpu")
        model.config.use_cache = False
        self.model = model
        extra = {"target_parameters": EXPERTS} if family == "moe" else {}
        section = LoraSection(r=size.rank, target_modules=names, extra=extra)
        self.predicted = Model(
            Setting(
                config, self.task, LENGTHS[-1], 2, method == "qlora", size.dtype, section, device="cpu",
                accumulated=False,
            )
        )  # fmt: skip

    def compare(self, policy: LayerPolicy, tokens: int) -> Compared:
        """One step, measured and predicted."""
        name = Case(self.family, self.method, policy, tokens).name
        return self.compare_mix(name, MemoryPolicy(policy), tokens)

    def compare_mix(self, name: str, policy: MemoryPolicy, tokens: int) -> Compared:
        """The same with a policy for each layer."""
        layers = policy.of(len(self.predicted.skeleton.order))
        streamed = [s for s, layer in zip(self.predicted.streamed_bytes, layers, strict=True) if layer.streamed]
        predicted = self.predicted.peak(layers, 2, tokens).size + in_turns(streamed, policy)
        return Compared(name, predicted, self._measured(policy, tokens))

    def _measured(self, policy: MemoryPolicy, tokens: int) -> int:
        import fastpeft
        from fastpeft.memory.streaming.layer import StreamedLayer

        model = fastpeft.accelerate(self.model, memory=policy)
        ids = torch.randint(3, self.words, (2, tokens), generator=torch.Generator().manual_seed(1))
        batch = {"input_ids": ids, "labels": ids[:, 0] % 2 if self.task == "sequence-classification" else ids}

        def step() -> None:
            model(**batch).loss.backward()
            model.zero_grad(set_to_none=True)

        step()  # finds the siblings
        for layer in model.modules():
            if isinstance(layer, StreamedLayer):
                layer.fastpeft_ring.empty()  # what the last step left there
        return peak_of_step(step, "cpu")


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
    elif case.family == "modernbert":
        base = t.ModernBertForMaskedLM(
            t.ModernBertConfig(
                vocab_size=case.words, hidden_size=h, intermediate_size=2 * h, num_hidden_layers=n,
                num_attention_heads=4, pad_token_id=0, local_attention=64,
            )
        )  # fmt: skip
    elif case.family == "qwen3":
        base = t.Qwen3ForCausalLM(
            t.Qwen3Config(
                vocab_size=case.words, hidden_size=h, intermediate_size=3 * h, num_hidden_layers=n, head_dim=64,
                num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
            )
        )  # fmt: skip
    elif case.family == "marian":
        base = t.MarianMTModel(
            t.MarianConfig(
                vocab_size=case.words, d_model=h, encoder_layers=n, decoder_layers=n, encoder_ffn_dim=2 * h,
                decoder_ffn_dim=2 * h, encoder_attention_heads=4, decoder_attention_heads=4, pad_token_id=0,
                decoder_start_token_id=0, eos_token_id=1, bos_token_id=1,
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
    parser.add_argument("--table", action="store_true", help="the longest contexts of well-known models instead")
    parser.add_argument("--recorded", type=Path, help="records of `make gpu`, part memory: the same steps predicted")
    options = parser.parse_args(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if options.table:
        from .planned_table import cells, contexts

        _show(contexts(list(cells())), options.into, "contexts")
        return
    if options.recorded:
        from . import planned_recorded

        _show(planned_recorded.table(*planned_recorded.recorded(options.recorded)), options.into, "planned on a GPU")
        return
    found = []
    wanted = [case for case in cases() if options.family in (None, case.family)]
    for (family, method), some in groupby(wanted, lambda case: case[:2]):
        both = Family(family, method)
        for case in some:
            found.append(both.compare(case.policy, case.tokens))
            print(f"{found[-1].name}: {found[-1].ratio:.4f}", flush=True)
    _show(table(found), options.into, "planned")


def _show(text: str, into: Path | None, name: str) -> None:
    if into is None:
        print(text)
    else:
        into.write_text(insert(into.read_text(), text, name))


if __name__ == "__main__":
    main()
