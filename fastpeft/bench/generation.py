"""Tokens a second of greedy generation: plain PEFT beside the accelerated model, in the same run."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .steps import StepCase, build
from .timer import interleaved

STATES = ("active", "merged", "disabled")


@dataclass(frozen=True)
class GenerationCase:
    """A model family of `steps`, how many sequences at once, and what became of the adapters.

    Attributes:
        family, method, dtype: as of a `StepCase`.
        rows: sequences, all of one length.
        state: "active", "merged" into the base, or "disabled".
    """

    family: str
    method: str
    rows: int
    state: str = "active"
    hidden: int = 512
    layers: int = 4
    prompt: int = 16
    tokens: int = 64
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        dtype = f"{str(self.dtype)[6:]} " * (self.dtype != torch.float32)
        sizes = f"{self.layers}x{self.hidden} {self.rows}x{self.tokens} tokens"
        return f"{self.family} {self.method} {dtype}{sizes}" + f" {self.state}" * (self.state != "active")


def measure(case: GenerationCase, rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Tokens a second by peer, in rounds of the same order; PEFT twice, so that its own spread shows.

    Raises:
        RuntimeError: the accelerated model generates other tokens, in fp32, where roundings hardly decide.
    """
    import fastpeft

    step = StepCase(case.family, case.method, case.dtype, hidden=case.hidden, layers=case.layers)
    peft: Any = build(step, device).eval()
    models = {"peft": peft, "fastpeft": fastpeft.accelerate(copy.deepcopy(peft))}
    for model in models.values():
        _put(model, case.state)
    ids = torch.randint(3, 1000, (case.rows, case.prompt), generator=torch.Generator().manual_seed(1)).to(device)
    texts = {name: _generate(model, ids, case.tokens) for name, model in models.items()}
    if case.dtype == torch.float32 and not torch.equal(texts["peft"], texts["fastpeft"]):
        raise RuntimeError(f"{case.name}: the accelerated model generates other tokens than PEFT's")
    steps = {name: lambda model=model: _generate(model, ids, case.tokens) for name, model in models.items()}  # type: ignore[misc]
    steps["peft again"] = steps["peft"]
    times = interleaved(steps, rounds, warmup=0, device=device)
    return {name: [1e3 * case.rows * case.tokens / ms for ms in samples] for name, samples in times.items()}


def _put(model: Any, state: str) -> None:
    if state == "merged":
        model.base_model.merge_adapter()
    elif state == "disabled":
        model.base_model.disable_adapter_layers()


def _generate(model: nn.Module, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    generated: torch.Tensor = model.generate(  # type: ignore[operator]
        input_ids=ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return generated
