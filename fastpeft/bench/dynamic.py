"""What dynamic fine-tuning saves: `python -m fastpeft.bench.dynamic --model DIR`.

Two tables of Markdown: steps with some layers frozen beside steps that train all; and steps with DFT's loss, without
logits and with them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from fastpeft.strategies.dynamic.costs import state_bytes
from fastpeft.strategies.dynamic.losses import token_losses
from fastpeft.strategies.dynamic.trained import Trained, named

from .kept import bytes_kept
from .memory import peak_of_step
from .timer import Step, interleaved

MIB = 2**20
Loss = Callable[[Any, dict[str, Any]], Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastpeft.bench.dynamic", description=__doc__)
    parser.add_argument("--model", required=True, help="a decoder's folder, or ID on the hub")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="of a row")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each, on a CPU in the process's own time")
    parser.add_argument("--table", choices=sorted(TABLES), action="append", help="this one alone; may come twice")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = batch_of(options.rows, options.tokens, device)
    for name in options.table or TABLES:
        print("\n".join([*TABLES[name](options, batch, device), ""]), flush=True)
    return 0


def freezing(options: Any, batch: dict[str, Any], device: str) -> list[str]:
    """Layers trained, what forward keeps for backward, optimizer state, time of a step."""
    count = len(Trained(model_of(options.model, options.rank, device)).layers)
    cases = {
        "all": range(count),
        "upper half": range(count // 2, count),
        "highest": [count - 1],
        "lowest": [0],
        "every third": range(0, count, 3),
    }
    lines = [
        "| layers trained | accelerated | kept for backward, MiB | optimizer state, MiB | a step, ms (of all) |",
        "|---|---|---|---|---|",
    ]
    for accelerated in (True, False):
        steps: dict[str, Step] = {}
        kept, states = {}, {}
        for name, numbers in cases.items():
            model = model_of(options.model, options.rank, device, accelerated=accelerated)
            optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-4)
            Trained(model).only(list(numbers), optimizer)
            steps[name] = partial(_step, model, batch, own_loss, optimizer)
            steps[name]()
            kept[name] = bytes_kept(model, partial(own_loss, model, batch))
            states[name] = state_bytes(optimizer)
        times = interleaved(steps, options.rounds, 1, device, None if device == "cuda" else processor_ms)
        for name, numbers in cases.items():
            lines.append(
                f"| {name} ({named(list(numbers))}) | {'yes' if accelerated else 'no'} | {kept[name] / MIB:.1f} | "
                f"{states[name] / MIB:.3f} | {median(times[name]):.1f} ({_ratio(times, name, 'all'):.2f}) |"
            )
    return lines


def weighting(options: Any, batch: dict[str, Any], device: str) -> list[str]:
    """Time and peak memory of forward and backward by loss."""
    anchored = partial(_dft, anchor=0.1)
    cases: dict[str, tuple[Loss, bool]] = {
        "cross-entropy, the model's own; accelerated": (own_loss, True),
        "DFT, without logits": (_dft, True),
        "DFT of logits, plain PEFT": (_dft, False),
        "DFT by TRL's chunked head, plain PEFT": (_trl, False),
        "DFT with anchor, without logits": (anchored, True),
        "DFT with anchor, of logits, plain PEFT": (anchored, False),
    }
    steps: dict[str, Step] = {}
    for name, (loss, accelerated) in cases.items():
        model = model_of(options.model, options.rank, device, accelerated=accelerated)
        if loss is _trl:
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(model.get_base_model())
        steps[name] = partial(_step, model, batch, loss)
        steps[name]()
    peaks = {name: peak_of_step(step, device) for name, step in steps.items()}
    times = interleaved(steps, options.rounds, 1, device, None if device == "cuda" else processor_ms)
    first = next(iter(cases))
    lines = ["| loss | peak of a step, MiB | forward and backward, ms (of the first) |", "|---|---|---|"]
    return lines + [
        f"| {name} | {peaks[name] / MIB:.1f} | {median(times[name]):.1f} ({_ratio(times, name, first):.2f}) |"
        for name in cases
    ]


TABLES = {"freezing": freezing, "weighting": weighting}


def model_of(name: str, rank: int, device: str, *, accelerated: bool = True) -> Any:
    """A decoder in fp32 with LoRA of that rank on all its layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    import fastpeft

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
    model = get_peft_model(base, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    return fastpeft.accelerate(model).train() if accelerated else model.train()


def batch_of(rows: int, tokens: int, device: str) -> dict[str, Any]:
    """Drawn at random, the same each time."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1000, (rows, tokens), generator=generator).to(device)
    return {"input_ids": ids, "labels": ids}


def own_loss(model: Any, batch: dict[str, Any]) -> Any:
    """The model's own."""
    return model(**batch, use_cache=False).loss


def _dft(model: Any, batch: dict[str, Any], anchor: float = 0.0) -> Any:
    tokens = token_losses(model, batch, "causal-lm", anchored=anchor > 0)
    losses = tokens.nll * (-tokens.nll.detach()).exp()
    if tokens.divergence is not None:
        losses = losses + anchor * tokens.divergence
    return losses.sum() / tokens.counted.sum()


def _trl(model: Any, batch: dict[str, Any]) -> Any:
    outputs = model(**batch, fused_lm_head=True)
    return -(outputs.log_probs * outputs.log_probs.exp().detach()).sum() / outputs.label_mask.sum()


def _step(model: Any, batch: dict[str, Any], loss: Loss, optimizer: Any = None) -> None:
    loss(model, batch).backward()
    if optimizer is not None:
        optimizer.step()
    model.zero_grad()


def processor_ms(step: Step) -> float:
    """The process's own time of one call, which other programs on the machine disturb least."""
    start = time.process_time()
    step()
    return 1000 * (time.process_time() - start)


def _ratio(times: dict[str, list[float]], name: str, against: str) -> float:
    """Median of the ratios of the rounds."""
    return median(one / other for one, other in zip(times[name], times[against], strict=True))


if __name__ == "__main__":
    sys.exit(main())
