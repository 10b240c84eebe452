"""Models that hardly fit: the plan for a small GPU carried out under its limit, its peak beside the one predicted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fastpeft.bench.recorder import Recorder

if TYPE_CHECKING:
    from fastpeft import MemoryPolicy

order = 58
time_limit_s = 480
needs = ("peft", "bitsandbytes")

OPTIMIZER = "adamw_torch_fused"
STEPS = "steps without gradient accumulation"
"""That are run here; their policies are chosen, and their peaks predicted, for such."""


@dataclass(frozen=True)
class Case:
    """A QLoRA training of a model of `memory.plan.known` under limits of GPU and pinned host memory."""

    model: str
    gpu_gib: float
    host_gib: float
    tokens: int
    rank: int

    @property
    def name(self) -> str:
        return f"{self.model}, {self.tokens} tokens, r={self.rank}, {self.gpu_gib:g} GiB"


CASES = (
    Case("llama-3.1-70b", 16, 64, 8192, 16),
    Case("llama-3.1-8b", 24, 64, 120_000, 32),
    Case("llama-3.1-8b", 80, 64, 100_000, 32),
)
LONG = Case("llama-3.1-8b", 80, 64, 200_000, 32)
SMALL = Case("a small Llama", 1, 1, 64, 4)


def run(recorder: Recorder, depth: str) -> None:
    cases = (*CASES, LONG) if depth == "full" else CASES
    recorder.run_checks("limits", [(case.name, partial(_case, recorder.device, case)) for case in cases])


def dry_run(recorder: Recorder, depth: str) -> None:
    recorder.run_checks("limits", [(SMALL.name, partial(_case, recorder.device, SMALL))])


def _case(device: str, case: Case) -> dict[str, Any]:
    import torch

    import fastpeft
    from fastpeft import MemoryPolicy
    from fastpeft.bench.memory import limited
    from fastpeft.memory.allocator import grow_segments
    from fastpeft.memory.plan.choosing import CONTEXT
    from fastpeft.memory.plan.rendering import policy_text

    config = _config(case)
    gpu, host = (int(gib * 2**30) for gib in (case.gpu_gib, case.host_gib))
    planned = partial(
        fastpeft.plan, config, gpu_memory=gpu, host_memory=host, seq=case.tokens, rank=case.rank, optimizer=OPTIMIZER,
        largest=False, accumulation=1,
    )  # fmt: skip
    plan = planned()
    print(plan, flush=True)
    assert plan.fits, "the plan does not fit"
    policy, need = plan.policy, plan.need
    if device == "cpu":  # a model so small keeps all
        policy = MemoryPolicy(fastpeft.LayerPolicy("offload", streamed=True, tile=16))
        need = planned(policy=policy).need
    streamed = any(layer.streamed for layer in policy.different)
    ids = torch.randint(3, 500, (1, case.tokens), generator=torch.Generator().manual_seed(1)).to(device)
    figures: dict[str, Any] = {"streams": streamed, "predicted_for": STEPS, "policy": policy_text(policy.layers)}
    grow_segments()  # as `accelerate` does below, before the base takes its memory
    with limited(device, gpu - CONTEXT):
        start = time.perf_counter()
        model = _model(config, case.rank, device, "cpu" if streamed else device)
        fastpeft.accelerate(model, memory=policy)
        model.to(device)
        figures["built_s"] = time.perf_counter() - start
        step = _step_of(model, device)
        step(ids[:, :256])  # finds the siblings, compiles
        step(ids[:, :256])
        _check_served(model)
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = [_seconds(device, partial(step, ids)) for _ in range(2 if streamed else 1)]
        figures["step_s"] = seconds[-1]
        if device == "cuda":
            found, predicted = torch.cuda.max_memory_allocated(), need.static + need.step
            figures |= {"peak_mib": found / 2**20, "predicted_mib": predicted / 2**20}
            figures |= {
                "reserved_mib": torch.cuda.max_memory_reserved() / 2**20,
                "predicted_to_peak": predicted / found,
            }
    print(figures, flush=True)
    if streamed:
        figures |= _resident(model, step, ids, policy, device, figures["step_s"])
    return figures


def _resident(
    model: Any, step: Callable[[Any], None], ids: Any, policy: MemoryPolicy, device: str, streamed_s: float
) -> dict[str, float]:
    """The same steps without the limit, with the weights on the GPU."""
    from dataclasses import replace

    import fastpeft
    from fastpeft import MemoryPolicy

    fastpeft.restore(model)
    layers = policy.layers if isinstance(policy.layers, tuple) else (policy.layers,)
    figures: dict[str, float] = {}
    for name, each in {
        "same_policy": tuple(replace(layer, streamed=False) for layer in layers),
        "recompute": (fastpeft.LayerPolicy("recompute"),) * len(layers),
    }.items():
        chosen = MemoryPolicy(each if len(each) > 1 else each[0])
        fastpeft.accelerate(model, memory=chosen)
        seconds = [_seconds(device, partial(step, ids)) for _ in range(2)][-1]
        figures |= {f"resident_{name}_s": seconds, f"speed_of_resident_{name}": seconds / streamed_s}
    return figures


def _check_served(model: Any) -> None:
    """Not by PEFT, which takes more memory."""
    import fastpeft

    notes = {row.note for row in fastpeft.report(model).rows if row.kind in ("lora", "mlp") and row.note}
    assert not notes, "; ".join(notes)


def _step_of(model: Any, device: str) -> Callable[[Any], None]:
    """Forward, backward and optimizer; raises where the loss is no number."""
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step(ids: Any) -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert math.isfinite(loss.item()), f"loss {loss.item()}"

    return step


def _seconds(device: str, call: Callable[[], None]) -> float:
    import torch

    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _config(case: Case) -> Any:
    from transformers import LlamaConfig

    from fastpeft.memory.plan.known import known_config

    if case is SMALL:
        return LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=5, num_attention_heads=2
        )
    config = known_config(case.model)
    config.max_position_embeddings = max(config.max_position_embeddings, case.tokens)
    return config


def _model(config: Any, rank: int, device: str, home: str) -> Any:
    """A causal model with random weights: layer by layer its linear ones are made on `device`, packed, and brought to
    `home`, so that no more than one layer of them is there in 32 bits."""
    import copy

    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers import AutoModelForCausalLM

    from fastpeft.bench.bases import NF4, quantise

    short = copy.deepcopy(config)
    short.num_hidden_layers = 1
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(short, dtype=torch.bfloat16)
        (first,) = model.model.layers
        layers = nn.ModuleList()
        for index in range(config.num_hidden_layers):
            layer = first if index == 0 else type(first)(short, index).to(torch.bfloat16)
            paths = [path for path, module in layer.named_modules() if isinstance(module, nn.Linear)]
            layers.append(quantise(layer, NF4, paths).to(home))
    model.model.layers = layers
    model.config.num_hidden_layers = config.num_hidden_layers
    model.to(home)
    model.is_loaded_in_4bit = True
    names = sorted({path.rpartition(".")[2] for path in paths})
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)).train()
