"""The one call, and its undoing: both walk the list of replacements and know nothing of any of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn

from fastpeft_kernels.common.scratch import release_scratch

from .integrations.versions import require_core
from .layers.kept import bring
from .memory.allocator import grow_segments
from .memory.policy import LayerPolicy, MemoryPolicy
from .replacements import REPLACEMENTS, Match
from .replacements.fp8 import ask_fp8, check_fp8
from .replacements.memory import carried_out, check_memory
from .replacements.mlp import RECOMPUTE

if TYPE_CHECKING:
    from .memory.plan.planning import Plan

logger = logging.getLogger("fastpeft")

Model = TypeVar("Model", bound=nn.Module)
SETTINGS = "fastpeft_settings"
RETRIED = "fastpeft_retried"
"""Attribute of a model whose policies were changed when memory ran out: how, in words."""


@dataclass(frozen=True)
class Switches:
    """The keywords of `accelerate`, kept on the model for the report."""

    lora: bool = True
    mlp: bool | str = True
    attention: bool = True
    loss: bool = True
    norms: bool = True
    memory: Any = None
    fp8_compute: str | None = None
    fp8_exclude: tuple[str, ...] = ()


def accelerate(
    model: Model,
    *,
    lora: bool = True,
    mlp: bool | Literal["recompute"] = True,
    attention: bool = True,
    loss: bool = True,
    norms: bool = True,
    memory: Plan | MemoryPolicy | LayerPolicy | None = None,
    fp8_compute: Literal["never", "forward", "both"] | None = None,
    fp8_exclude: Sequence[str] = (),
) -> Model:
    """Make a model with PEFT LoRA layers faster and smaller, in place, without changing what it computes.

    Works on any module that holds LoRA layers (a PeftModel, or a transformers model after `add_adapter`), before or
    after a Trainer was built around it; calling it again takes in what was added since. Parameter names, state dict,
    saving, merging and adapter switching stay PEFT's. `restore(model)` undoes it; `report(model)` says what was done.

    The first forward pass afterwards runs once more than usual, under no_grad, to learn which projections share an
    input.

    Args:
        model: the module; dense bases in fp32, bf16 or fp16, or quantised ones that `integrations` reads.
        lora: replace layers of LoRA, LoHa, LoKr and VeRA, and LoRA on the stacked experts of a mixture
            (`target_parameters`).
        mlp: compute each MLP, down(act(gate(x)) * up(x)) and the like, as one op, adapted or not. They are recognised
            by their parts, and each is proved by trying it on random numbers. "recompute" does not keep gate and up for
            backward, but computes them again there from the input: less memory, more time.
        attention: run attention by our function, whose memory grows with the number of tokens. It takes the place of
            "sdpa" and "eager", in models that call attention through transformers' interface. Any other implementation
            was asked for by name, and stays.
        loss: in calls with labels, compute the loss from hidden states and head, without all logits. Whoever reads the
            logits still gets them.
        norms: compute RMSNorm, in every form that models have, in one pass each way, keeping its input and no copy of
            it; and rotary embeddings of queries and keys in one pass. Which modules do that, and how they round, is
            recognised by their parts and proved on each instance.
        memory: what each layer keeps for backward. One `LayerPolicy` for all, a `MemoryPolicy` with one for each layer,
            or the plan that `fastpeft.plan(model, gpu_memory="24GiB", seq=..., batch=...)` gave; None leaves it to the
            model. Loss and gradients are the same bits under each policy; in tiles (`LayerPolicy.tile`) the adapters'
            gradients are the same within rounding. Layers are those that transformers' activation checkpointing wraps.
            The frozen weights of streamed layers stay in host memory and are copied to the device ahead of each use.
            From then on torch's allocator takes GPU memory in segments that grow (`expandable_segments`), unless
            PYTORCH_ALLOC_CONF says otherwise. A Trainer's `gradient_checkpointing=True` changes nothing in these layers
            but the arguments of torch's checkpoint.
        fp8_compute: multiply in 8-bit floating point, which is faster and does *not* give the same numbers. None leaves
            each base to its library: 16 bits for ordinary weights, its own FP8 product for transformers' FP8Linear.
            "forward" multiplies x with the frozen weight of every adapted layer in e4m3, over 16-bit and FP8Linear
            bases, with a scale for each row of both. "both" does so for the gradient of x too. Each product costs one
            byte more for each element of the weight. "never" multiplies with the decoded weight in 16 bits, over
            FP8Linear too. `fp8_report` shows what it costs in accuracy.
        fp8_exclude: patterns (as in file names) of the modules that stay in 16 bits, such as "*.down_proj".

    Returns:
        The same model.

    Raises:
        TypeError: `model` is not an nn.Module, `fp8_exclude` not a list, or `memory` neither plan nor policy.
        ValueError: `mlp` or `fp8_compute` is none of the values above; FP8 is asked for with `lora=False`, with a
            pattern of `fp8_exclude` that matches nothing, or on GPUs that cannot multiply in FP8 (compute capability
            below 8.9); `memory` does not fit the model's layers, computes them again with prefix tuning, or streams
            them with copies in FP8.
        ImportError: torch, transformers or peft is missing or older than what fastpeft supports.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if mlp not in (True, False, RECOMPUTE):
        raise ValueError(f"mlp: expected True, False or {RECOMPUTE!r}, got {mlp!r}")
    require_core()
    memory = carried_out(model, memory)
    check_memory(model, memory, fp8_compute)
    check_fp8(model, fp8_compute, fp8_exclude, lora)
    if memory is not None:
        grow_segments()
    switches = Switches(lora, mlp, attention, loss, norms, memory, fp8_compute, tuple(fp8_exclude))
    modules = dict(model.named_modules())
    found: dict[str, bool] = {}
    with torch.device("cpu"):  # trials make tensors of their own, whatever the caller's default device
        for replacement in REPLACEMENTS:
            setting = getattr(switches, replacement.switch)
            if not setting:
                for module in modules.values():
                    replacement.undo(module)
                continue
            mine = {}
            for path, module in modules.items():
                if not replacement.installed(module):
                    matched = replacement.match(module)
                    if not isinstance(matched, Match):
                        continue
                    bring(module)
                    proved = replacement.prove(module, matched)
                    if not isinstance(proved, Match):
                        continue
                    replacement.install(module, proved)
                mine[path] = module
            replacement.finish(model, mine, setting)
            if mine:
                found[replacement.switch] = found.get(replacement.switch, False) or replacement.adapts
    ask_fp8(modules, fp8_compute, fp8_exclude)
    if not any(found.values()):
        *others, last = sorted(found) or [""]
        what = f"nothing but {', '.join(others)}{' and ' * bool(others)}{last}" if found else "nothing"
        logger.warning("%s was replaced in this %s; fastpeft.report(model) says why", what, type(model).__name__)
    model.__dict__[SETTINGS] = asdict(switches)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`: classes, hooks and settings are again what they were.

    Args:
        model: the module that was given to `accelerate`, or any module around or inside it.

    Returns:
        The same model. A model that was never accelerated is left as it is.

    Raises:
        TypeError: `model` is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for module in list(model.modules()):
        for replacement in reversed(REPLACEMENTS):
            replacement.undo(module)
        module.__dict__.pop(SETTINGS, None)
        module.__dict__.pop(RETRIED, None)
    release_scratch()
    return model
