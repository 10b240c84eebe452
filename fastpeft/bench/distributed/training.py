"""One process of a training: model, rows, loop and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..bases import quantise
from .legs import HALF, ROWS, STEPS, TOKENS, Leg

WORDS, BATCHES = 64, 2


def tiny_model(base: str) -> nn.Module:
    """A Llama of two layers with LoRA on all projections, the same values at each call."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    linear = [path for path, module in model.named_modules() if type(module) is nn.Linear and path != "lm_head"]
    adapted = get_peft_model(
        quantise(model, base, linear),
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    return adapted.train()


def rows_of(step: int) -> tuple[Tensor, Tensor]:
    """(ROWS, TOKENS) tokens and labels of a step: one of BATCHES, rows that count upwards, of unequal lengths."""
    generator = torch.Generator().manual_seed(step % BATCHES)
    starts = torch.randint(WORDS, (ROWS, 1), generator=generator)
    strides = torch.randint(1, 4, (ROWS, 1), generator=generator)
    tokens = (starts + strides * torch.arange(TOKENS)) % WORDS
    lengths = torch.randint(4, TOKENS + 1, (ROWS, 1), generator=generator)
    return tokens, tokens.masked_fill(torch.arange(TOKENS) >= lengths, -100)


def train(leg: Leg, rank: int, folder: Path, steps: int = STEPS) -> dict[str, Any]:
    """The losses of all steps that the leg itself takes, and what the report says of its layers.

    A checkpoint of the adapter and the optimizer is written after HALF steps where others go on from one.

    Args:
        leg: of as many processes as the default group has; a leg alone needs none.
        rank: of this process.
        folder: of the checkpoints, shared by all processes.
        steps: in all, with those before a checkpoint.
    """
    import fastpeft

    from ..combinations import served

    model = tiny_model(leg.base)
    if leg.accelerated:
        fastpeft.accelerate(model)
    wrapped = _spread(model, leg)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    first = 0
    if leg.start is not None:
        _load(model, optimizer, _place(folder, leg.start))
        first = HALF
    losses = []
    for step in range(first, steps):
        tokens, labels = rows_of(step)
        counted = int((labels[:, 1:] != -100).sum())
        mine = slice(rank, None, leg.processes)
        part = wrapped(input_ids=tokens[mine], labels=labels[mine], num_items_in_batch=counted).loss
        (part * leg.processes).backward()  # gradients are averaged over the processes
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        whole = part.detach().clone()
        if leg.processes > 1:
            dist.all_reduce(whole)
        losses.append(whole.item())
        if step == HALF - 1 and leg.start is None and leg.processes == 2:
            _save(model, optimizer, _place(folder, leg))
    found = served(model)
    return {
        "base": leg.base, "name": leg.name, "first": first, "losses": losses, "layers": found.layers,
        "fused": found.fused, "frozen_bytes": _frozen_bytes(model),
    }  # fmt: skip


def _frozen_bytes(model: nn.Module) -> int:
    """Of the base's parameters that this process keeps between steps."""
    frozen = (p for p in model.parameters() if not p.requires_grad)
    return sum(here.numel() * here.element_size() for p in frozen for here in [getattr(p, "to_local", lambda p=p: p)()])


def _spread(model: nn.Module, leg: Leg) -> nn.Module:
    if leg.way == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if leg.way == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        from fastpeft.memory.layers import model_layers

        mesh = dist.device_mesh.init_device_mesh("cpu", (leg.processes,))
        for layer in model_layers(model).values():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def _place(folder: Path, leg: Leg) -> Path:
    return folder / f"{leg.base} {leg.name}"


def _state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Of what is trained alone: a state dict has a 4-bit weight's scales only where it is not sharded."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    values, state = get_state_dict(model, optimizer)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"model": {name: value for name, value in values.items() if name in trained}, "optimizer": state}


def _save(model: nn.Module, optimizer: Any, place: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(_state(model, optimizer), checkpoint_id=place)


def _load(model: nn.Module, optimizer: Any, place: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=place)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=False),  # the frozen rest is there already
    )
