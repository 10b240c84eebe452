"""What happens in the process of a peer. Nothing heavy is imported before its import is timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .case import FinetuneCase
from .peers import PEFT, Peer
from .processes import Line

if TYPE_CHECKING:
    from .loading import Source

SOURCE, CEILINGS, READY, RUN, STEPS, GO = "source", "ceilings", "ready", "run", "steps", "go"


class Task(NamedTuple):
    """What a peer's process is given: `source` as `make_source` found it, how many steps it may make, and a folder."""

    case: FinetuneCase
    source: Source
    peer: Peer
    steps: int
    folder: Path


class Outcome(NamedTuple):
    """Of a run.

    Attributes:
        losses: one a step.
        ms: of each step, with what the trainer does between steps.
        peak_mib: most memory during training, beside what the model and its library took before.
        model_mib: what lay on the GPU before; 0 on a CPU.
        seconds: "import", "load" (weights, adapters, replacements, trainer), "first step", and "to first step", from
            the start of the process on.
        trained: parameters.
        flops: of a step; 0 for others than plain PEFT.
    """

    losses: list[float]
    ms: list[float]
    peak_mib: float
    model_mib: float
    seconds: dict[str, float]
    trained: int
    flops: float


def make_source(given: tuple[FinetuneCase, Path], line: Line, started: float) -> Callable[[Any], Any]:
    """Asked for SOURCE, makes the case's model and says where it is; asked for CEILINGS, measures the machine's."""
    case, folder = given
    import torch

    from fastpeft.bench.ops import ceilings
    from fastpeft.bench.timer import device_clock

    from .loading import find_source

    _use_threads(case)

    def answer(question: str) -> Any:
        if question == SOURCE:
            return find_source(case, folder)
        return ceilings.measure(case.device, [getattr(torch, case.dtype)], 10, device_clock(case.device))

    return answer


def train(task: Task, line: Line, started: float) -> Callable[[Any], Any]:
    """Asked for RUN, trains and answers with an Outcome. Asked for STEPS, answers each GO with the time of a step.

    Asked whether it is READY, answers when all is imported and the model loaded.
    """
    seconds = {}
    begun = time.perf_counter()
    _import(task.peer)
    seconds["import"] = time.perf_counter() - begun

    from .loading import load
    from .loop import make_trainer

    _use_threads(task.case)
    begun = time.perf_counter()
    model = load(task.case, task.source, task.peer)

    def gate(ms: float) -> None:
        line.tell(ms)
        line.listen()

    def answer(question: str) -> Any:
        if question == READY:
            return True
        gated = gate if question == STEPS else None
        trainer, log = make_trainer(task.case, task.source, task.peer, model, task.steps, str(task.folder), gated)
        seconds["load"] = time.perf_counter() - begun
        if question == STEPS:
            return trainer.train() and None
        peak, before = _peak_of(trainer.train, task.case.device)
        seconds["first step"] = log.ms[0] / 1e3
        seconds["to first step"] = log.first[0] - started
        return Outcome(
            losses=[loss.item() for loss in log.losses],
            ms=log.ms,
            peak_mib=peak,
            model_mib=before,
            seconds=seconds,
            trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            flops=_flops(trainer, model) if task.peer.name == PEFT else 0.0,
        )

    return answer


def _import(peer: Peer) -> None:
    if peer.unsloth:
        from contextlib import suppress

        with suppress(Exception):  # `load` says what is wrong with it
            import unsloth  # noqa: F401
    import peft  # noqa: F401
    from transformers import Trainer  # noqa: F401

    if peer.sft:
        from trl import SFTTrainer  # noqa: F401
    if peer.ours:
        import fastpeft

        fastpeft.accelerate  # noqa: B018


def _use_threads(case: FinetuneCase) -> None:
    import torch

    if case.threads:
        torch.set_num_threads(case.threads)


def _peak_of(work: Callable[[], Any], device: str) -> tuple[float, float]:
    """MiB: the most that it took beside what was there before, and that."""
    import torch

    from fastpeft.bench.memory import MIB, PeakMemory

    before = torch.cuda.memory_allocated() / MIB if device == "cuda" else 0.0
    with PeakMemory(torch.device(device)) as peak:
        work()
    return peak.mib - before, before


def _flops(trainer: Any, model: Any) -> float:
    from .flops import step_flops

    batch = next(iter(trainer.get_train_dataloader()))
    with trainer.compute_loss_context_manager():
        return step_flops(model, dict(batch))
