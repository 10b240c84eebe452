"""What is trained twice, accelerated and not, and the table of it in docs/how-to/trainers.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.integration.trainers import loops

PLAIN: dict[str, Any] = {}
BF16 = {"bf16": True}
CHECKPOINTS = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
PIECES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
WHOLE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
NAMES = {
    "bf16": "bf16 autocast",
    "fp16": "fp16 autocast with a scaled loss",
    "pieces": "batches of 8 as 4 of 2",
    "label_smoothing": "label smoothing",
}
MIXED = ("bf16", "mixed_precision", "precision")
"""Options that round; the same training without them is the exact one."""

QUICK = {
    (loops.transformers_trainer, "bert", "fp32"),
    (loops.fp16_loop, "llama", "fp16"),
    (loops.accelerate_loop, "llama", "bf16"),
}
"""Run by `make test`."""


@dataclass(frozen=True)
class Case:
    trainer: str
    train: Callable[..., list[float]]
    mode: str = "fp32"
    options: tuple[tuple[str, Any], ...] = ()
    model: str = "llama"
    nf4: bool = False
    exactly: tuple[tuple[str, Any], ...] = ()
    """Options of the exact training that are others."""
    full: bool = True

    def __str__(self) -> str:
        return f"{self.train.__name__} {self.model} {'NF4 ' * self.nf4}{self.mode}".replace(" ", "-")


def _cases() -> list[Case]:
    found: list[Case] = []

    def add(trainer: str, train: Any, model: str = "llama", nf4: bool = False, **modes: dict[str, Any]) -> None:
        for mode, options in modes.items():
            name = NAMES.get(mode, mode.replace("_", " "))
            exactly = tuple(WHOLE.items()) if options is PIECES else ()
            full = (train, model, mode) not in QUICK
            found.append(Case(trainer, train, name, tuple(options.items()), model, nf4, exactly, full))

    recomputed = {"recomputed": CHECKPOINTS, "recomputed_reentrantly": REENTRANT}
    add("transformers' Trainer", loops.transformers_trainer, fp32=PLAIN, bf16=BF16, pieces=PIECES, **recomputed,
        label_smoothing={"label_smoothing_factor": 0.1}, NEFTune={"neftune_noise_alpha": 5.0},
        compiled={"torch_compile": True, "torch_compile_backend": "aot_eager"})  # fmt: skip
    add("transformers' Trainer", loops.transformers_trainer, nf4=True, fp32=PLAIN, bf16=BF16, recomputed=CHECKPOINTS)
    add("transformers' Trainer", loops.transformers_trainer, "bert", fp32=PLAIN, bf16=BF16)
    add("transformers' Trainer", loops.transformers_trainer, "bert", nf4=True, fp32=PLAIN)
    add("Seq2SeqTrainer", loops.seq2seq_trainer, "t5", fp32=PLAIN, label_smoothing={"label_smoothing_factor": 0.1})
    add("Seq2SeqTrainer", loops.seq2seq_trainer, "bart", fp32=PLAIN)
    # At 1e-2 it enlarges few roundings a hundredfold, so that chance decides; a budget at 1e-3 is a tenth of that.
    add("Seq2SeqTrainer", loops.seq2seq_trainer, "t5", nf4=True, fp32={"learning_rate": 1e-3})
    add("TRL's SFTTrainer", loops.sft, fp32=PLAIN, bf16=BF16, pieces=PIECES, packed={"packing": True},
        recomputed_reentrantly=REENTRANT)  # fmt: skip
    add("TRL's SFTTrainer", loops.sft, nf4=True, fp32=PLAIN, bf16=BF16)
    add("TRL's DPOTrainer", loops.dpo, fp32=PLAIN, bf16=BF16)
    add("TRL's DPOTrainer", loops.dpo, nf4=True, fp32=PLAIN)
    add("TRL's KTOTrainer", loops.kto, fp32=PLAIN, bf16=BF16)
    add("TRL's GRPOTrainer", loops.grpo, fp32=PLAIN)
    # By seed 5 a token is drawn that adapters in bf16 and in fp64 tell apart.
    add("TRL's GRPOTrainer", loops.grpo, nf4=True, fp32={"seed": 1})
    add("TRL's RLOOTrainer", loops.rloo, fp32=PLAIN)
    add("TRL's RewardTrainer", loops.reward, fp32=PLAIN)
    add("TRL's DistillationTrainer", loops.distillation, fp32=PLAIN)
    add("TRL's GKDTrainer", loops.gkd, fp32=PLAIN)
    add("accelerate", loops.accelerate_loop, fp32=PLAIN, bf16={"mixed_precision": "bf16"})
    add("accelerate", loops.accelerate_loop, nf4=True, fp32=PLAIN)
    add("Lightning", loops.lightning, fp32=PLAIN, bf16={"precision": "bf16-mixed"})
    add("Lightning", loops.lightning, "bert", fp32=PLAIN)
    add("a plain loop", loops.plain_loop, fp32=PLAIN)
    add("a plain loop", loops.fp16_loop, fp16=PLAIN)
    add("a plain loop", loops.compiled_loop, compiled=PLAIN)
    add("a plain loop", loops.plain_loop, "bert", fp32=PLAIN)
    add("a plain loop", loops.plain_loop, "t5", fp32=PLAIN)
    return found


CASES = _cases()


def table() -> list[str]:
    """Lines of Markdown: a row for each trainer, model and base, with all that it was trained in."""
    modes: dict[tuple[str, str, str], list[str]] = {}
    for case in CASES:
        modes.setdefault((case.trainer, case.model, "NF4" if case.nf4 else "dense"), []).append(case.mode)
    rows = [f"| {who} | `{model}` | {base} | {'; '.join(names)} |" for (who, model, base), names in modes.items()]
    return ["| Trainer | Model | Base | Trained in |", "|---|---|---|---|", *rows]
