"""What is done again and again. Each work is a generator: after each unit it says how far it is, from 0 to 1."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastpeft
from fastpeft.memory.policy import LayerPolicy, MemoryPolicy

from .models import KINDS, TINY, WORDS, batch, step

Work = Callable[[int, Path], Iterator[None]]


def steps(units: int, folder: Path) -> Iterator[None]:
    """Training steps of ragged batches, the kinds of models in turn.

    Now and then an evaluation, a forward whose graph is dropped, one that fails, a few generated tokens, an adapter
    saved and loaded again.
    """
    chance = random.Random(0)
    models = {kind: fastpeft.accelerate(about.make(), **about.switches) for kind, about in KINDS.items()}
    optimizers = {kind: torch.optim.AdamW(_trained(model), 1e-4) for kind, model in models.items()}
    for unit in range(units):
        kind = list(models)[unit % len(models)]
        model, given = models[kind], batch(kind, chance, unit / units)
        step(model, kind, given, chance)
        optimizers[kind].step()
        optimizers[kind].zero_grad(set_to_none=True)
        if chance.random() < 0.1:
            _aside(model, kind, given, chance, folder)
        yield


def _aside(model: Any, kind: str, given: dict[str, Any], chance: random.Random, folder: Path) -> None:
    what = chance.choice(("evaluate", "drop", "fail", "generate", "save"))
    if what == "evaluate":
        with torch.no_grad():
            model.eval()(**given)
    elif what == "drop":
        model(**given)
    elif what == "fail":
        try:
            model(**{**given, "input_ids": given["input_ids"] + WORDS})
        except IndexError:
            pass
        else:
            raise AssertionError("expected an IndexError: there are no such words")
    elif what == "generate" and not kind.startswith("encoder"):
        with torch.no_grad():
            model.eval().generate(input_ids=given["input_ids"][:1, :8], max_new_tokens=4, do_sample=False)
    elif what == "save":
        model.save_pretrained(folder / "saved")
        model.load_adapter(folder / "saved" / ("first" if KINDS[kind].mixed else ""), "again")
        fastpeft.accelerate(model, **KINDS[kind].switches)
        model.delete_adapter("again")
    model.train()


def restores(units: int, folder: Path) -> Iterator[None]:
    """`accelerate`, a step and `restore`, of each kind of model in turn."""
    chance = random.Random(1)
    models = {kind: about.make() for kind, about in KINDS.items()}
    for unit in range(units):
        kind = list(models)[unit % len(models)]
        model = fastpeft.accelerate(models[kind], **KINDS[kind].switches)
        step(model, kind, batch(kind, chance, unit / units), chance)
        model.zero_grad(set_to_none=True)
        fastpeft.restore(model)
        yield


def adapters(units: int, folder: Path) -> Iterator[None]:
    """An adapter is added or loaded, taken in by `accelerate`, trained for a step and deleted, each of a new name."""
    from peft import LoraConfig

    chance, kind = random.Random(2), "decoder over NF4, checkpointed"
    model = fastpeft.accelerate(KINDS[kind].make())
    model.save_pretrained(folder / "adapter")
    config: LoraConfig = model.peft_config["default"]
    for unit in range(units):
        name = f"adapter {unit}"
        if unit % 2:
            model.load_adapter(folder / "adapter", name, is_trainable=True)
        else:
            model.add_adapter(name, LoraConfig(r=chance.choice((2, 4, 8)), target_modules=config.target_modules))
        model.set_adapter(name)
        fastpeft.accelerate(model)
        step(model, kind, batch(kind, chance, unit / units), chance)
        model.zero_grad(set_to_none=True)
        model.set_adapter("default")
        model.delete_adapter(name)
        yield


def models(units: int, folder: Path) -> Iterator[None]:
    """Models that are made or loaded, accelerated, planned for, trained for two steps, saved, and let go of."""
    from fastpeft.bench.steps import base_model

    chance, checkpoint = random.Random(3), folder / "checkpoint"
    base_model(TINY).save_pretrained(checkpoint)
    ways = [*KINDS, "loaded from the packed cache", "streamed", "tuned"]
    for unit in range(units):
        way = ways[unit % len(ways)]
        kind = way if way in KINDS else "decoder over NF4, checkpointed"
        model = KINDS[kind].make() if way in KINDS else _loaded(checkpoint)
        switches = KINDS[kind].switches
        if way == "streamed":
            switches = {"memory": MemoryPolicy(LayerPolicy("recompute", streamed=True))}
        fastpeft.accelerate(model, **switches)
        for _ in range(2):
            step(model, kind, batch(kind, chance, unit / units), chance)
        str(fastpeft.report(model))
        if way == "tuned":
            fastpeft.tune(model, tokens=(64,))
        model.save_pretrained(folder / "saved")
        del model
        yield


def _loaded(checkpoint: Path) -> Any:
    from peft import LoraConfig, get_peft_model

    model = fastpeft.load(checkpoint, quantization="nf4", device="cpu", dtype=torch.float32)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"])).train()


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


WORKS: dict[str, tuple[Work, int]] = {
    "training steps": (steps, 10_000),
    "accelerate and restore": (restores, 1_000),
    "adapters added and deleted": (adapters, 1_000),
    "models one after another": (models, 100),
}
"""By name, with how many units are done."""
