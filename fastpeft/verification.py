"""Proof on the user's own model: the accelerated layers against PEFT's and against fp64.

Module by module, with the inputs and output gradients of a real step: `verification_modules`. For the whole model,
where no fp64 copy would fit, the difference between our gradients and PEFT's is held against what PEFT's own rounding
does to them: a twin run of PEFT whose layer outputs carry once more the rounding error that was measured for them.
Where one spot of a model amplifies rounding, the distance of one twin is a single draw and may be small by chance: what
fails beside one is held against several.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .integrations.models import model_within
from .integrations.transformers import sample_batch
from .layers.embedding import FastEmbedding
from .layers.experts import FastExperts
from .layers.frozen import FrozenSibling
from .layers.head import own_heads
from .layers.lazy_logits import plain
from .layers.lora import FastLoraLayer
from .layers.lycoris import FastLycorisLayer
from .layers.mlp import FastMlp
from .layers.norm import FastNorm
from .layers.rotary import FastRotary
from .layers.siblings import Sibling
from .layers.tokens import FastTokens
from .memory.streaming.layer import check_resident
from .verification_losses import check_losses, noisy_gradients, recorded_losses
from .verification_modules import Check, Whole, check_layers, check_norms, check_wholes, rounding_of_heads
from .verification_states import calm, noisy, suspended

MODEL_SLACK = 4.0
"""Whole model: our distance from PEFT may be this many times the twin's, which repeats the forward's rounding only."""
TWINS = 12
"""How many are run where we are too far beside the first. Of two equal errors along one direction (half-normal) one is
more than MODEL_SLACK times the other in 16 cases of 100, and more than so many times the rms of 12 in 2 of 1000."""

ONE_SIDED = 2.0
"""The twin's gradient at a head carries this many times the error of PEFT's loss, which is not random: the error of a
softmax's denominator goes one way, and further through the layers than as much noise."""

ADAPTED = (FastLoraLayer, FastLycorisLayer, FastExperts, FastEmbedding, FastTokens)
CHECKED = (*ADAPTED, FastMlp, FastNorm, FastRotary)


@dataclass(frozen=True)
class Verification:
    """The outcome; prints as a short table."""

    checks: tuple[Check, ...]
    loss: float
    loss_peft: float
    unserved: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Every check within its budget, and at least one layer checked."""
        return any(check.path for check in self.checks) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    def __str__(self) -> str:
        lines = [
            f"fastpeft verify: {'passed' if self.passed else 'FAILED'}, {len(self.checks)} checks",
            f"loss: ours {self.loss:.7g}, PEFT {self.loss_peft:.7g}",
            f"{'':40}{'worst error':>12}{'reference':>12}{'budget':>12}  where",
        ]
        kinds = dict.fromkeys((bool(check.path), _kind(check.what)) for check in self.checks)
        for in_module, kind in kinds:
            mine = [c for c in self.checks if bool(c.path) == in_module and _kind(c.what) == kind]
            worst = max(mine, key=lambda c: c.error / c.budget if c.budget else float(c.error > 0))
            name = f"{'each layer' if in_module else 'whole model'}: {kind}"
            where = worst.path or worst.what
            lines.append(f"{name:40}{worst.error:12.2e}{worst.reference:12.2e}{worst.budget:12.2e}  {where}")
        lines += [f"not served by an op, so not checked: {path}" for path in self.unserved]
        lines += [f"FAILED {c.path} {c.what}: error {c.error:.3e}, budget {c.budget:.3e}" for c in self.failures]
        return "\n".join(lines)


def verify(model: nn.Module, batch: Mapping[str, Any] | None = None, *, seed: int = 0) -> Verification:
    """Compare an accelerated model with PEFT's own computation and with fp64.

    Runs in the autocast state of the caller, in evaluation mode (no dropout). A fresh adapter's zero `lora_B` is given
    random values meanwhile, else half of the gradients would be zero. The model is afterwards as it was, gradients too.

    Args:
        model: a model that `fastpeft.accelerate` was called on.
        batch: keyword arguments of the model's forward; a small random one by default, for the model of transformers
            that is in it where another library's module holds one.
        seed: of the random batch and of the twin's rounding.

    Returns:
        A `Verification`: `.passed`, `.checks`, and a table when printed.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: the model holds no accelerated layer, or no batch can be made up for it, or for all of them at once.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_resident(model)
    if not any(isinstance(module, ADAPTED) for module in model.modules()):
        raise ValueError("model: no accelerated layer in it; call fastpeft.accelerate(model) first")
    if batch is None:
        model = model_within(model, CHECKED, "accelerated layers", "pass a batch")
    inputs = dict(sample_batch(model, seed) if batch is None else batch)
    with calm(model, seed):
        if any(getattr(module, "fastpeft_watch", None) is not None for module in model.modules()):
            with torch.no_grad():
                model(**inputs)  # tells which frozen projections are to be checked too
        found = _Replaced(model)
        layers, wholes, norms, heads, token_heads = (
            found.layers,
            found.wholes,
            found.norms,
            found.heads,
            found.token_heads,
        )
        # A hook on its projections takes an MLP apart, one on a head makes logits.
        _, traffic = recorded_step(model, {**layers, **norms, **heads, **token_heads}, inputs, record=True)
        adapted_heads = {path: layer for path, layer in layers.items() if "fastpeft_loss" in layer.__dict__}
        every_head: dict[str, nn.Module] = {**heads, **adapted_heads, **token_heads}
        with recorded_losses(every_head) as losses:
            ours, traffic_of_wholes = recorded_step(model, wholes, inputs, record=True)
        of_losses, of_peft = check_losses(losses)
        with suspended(found.every):
            peft, _ = recorded_step(model, layers, inputs)
        of_heads = rounding_of_heads(heads, traffic)
        checks, rounding = check_layers(layers, traffic)
        of_wholes, rounding_of_wholes = check_wholes({**wholes, **token_heads}, traffic | traffic_of_wholes)
        of_norms = check_norms(norms, traffic)
        outputs = rounding.outputs | {p: rms for p, rms in rounding_of_wholes.outputs.items() if p not in found.mlps}
        outputs |= of_heads
        noisy_layers = {**layers, **found.experts, **found.embeddings, **found.tokens, **heads}

        def distances_of_twin(seed: int) -> dict[str, float]:
            loss_noise = noisy_gradients(every_head, ONE_SIDED * of_peft["gradient"], seed)
            with suspended(found.every), noisy(noisy_layers, outputs, seed), loss_noise:
                return _distances(recorded_step(model, layers, inputs)[0], peft)

        of_gradients = rounding.gradients | rounding_of_wholes.gradients | {"loss": of_peft["loss"]}
        twins = map(distances_of_twin, itertools.count(seed))
        of_model = _compare_models(ours, peft, twins, of_gradients)
    checks += of_wholes + of_norms + of_losses + of_model
    checked = {check.path for check in checks}
    # A frozen sibling in front of which nothing is trained is not computed by an op.
    served = {**layers, **wholes, **token_heads}
    unserved = tuple(p for p, module in served.items() if p not in checked and not isinstance(module, FrozenSibling))
    return Verification(tuple(checks), ours["loss"].item(), peft["loss"].item(), unserved)


class _Replaced:
    """The modules of a model that compute by our code, by path.

    Attributes:
        layers: of LoRA, VeRA, LoHa and LoKr, and frozen projections that are computed together with some.
        mlps: those that are one op.
        experts: the outermost wrapper of each stack of experts.
        embeddings: with LoRA.
        tokens: embeddings and heads with trained tokens; `token_heads` are the heads among them.
        norms: those with our forward.
        heads: of language models, without adapters.
        wholes: what is checked as a whole: all of these but layers, norms and heads.
        every: all of our modules, those that are not checked by themselves too.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())

        def of(*kinds: type[nn.Module] | type[Sibling]) -> dict[str, Any]:
            return {path: module for path, module in modules.items() if isinstance(module, kinds)}

        wrappers: dict[str, FastExperts] = of(FastExperts)
        inside = {id(wrapper.get_submodule("base_layer")) for wrapper in wrappers.values()}
        self.layers = of(Sibling, FastLycorisLayer)
        self.mlps = {path: mlp for path, mlp in of(FastMlp).items() if mlp.fastpeft_roles is not None}
        self.experts = {path: wrapper for path, wrapper in wrappers.items() if id(wrapper) not in inside}
        self.embeddings = of(FastEmbedding)
        self.tokens = of(FastTokens)
        self.token_heads = {path: module for path, module in self.tokens.items() if "fastpeft_loss" in module.__dict__}
        self.norms = of(FastNorm)
        self.heads = dict(own_heads(model))
        of_embeddings = {path: module for path, module in self.tokens.items() if path not in self.token_heads}
        self.wholes: dict[str, Whole] = {**self.mlps, **self.experts, **self.embeddings, **of_embeddings}
        self.every: dict[str, nn.Module] = {
            **self.layers, **self.wholes, **wrappers, **self.token_heads, **self.norms, **of(FastRotary), **self.heads,
        }  # fmt: skip


def recorded_step(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: dict[str, Any], record: bool = False
) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """(output, loss and gradients of trainable parameters by name, [*inputs, dy] of each layer's first call)."""
    traffic: dict[str, list[Tensor]] = {}
    handles = (
        [layer.register_forward_hook(_recorder(path, traffic)) for path, layer in layers.items()] if record else []
    )
    try:
        with torch.enable_grad():
            output, loss = output_and_loss(model(**inputs))
            named = {name: p for name, p in model.named_parameters() if p.requires_grad and loss.requires_grad}
            gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True) if named else ()
    finally:
        for handle in handles:
            handle.remove()
    found = {name: g.detach() for name, g in zip(named, gradients, strict=True) if g is not None}
    return {"output": plain(output).detach(), "loss": loss.detach(), **found}, traffic


def _recorder(path: str, traffic: dict[str, list[Tensor]]) -> Any:
    def keep(gradient: Tensor | None) -> None:
        if gradient is not None:
            traffic[path].append(gradient.detach())

    def record(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if path in traffic or not (output.requires_grad or isinstance(module, FastNorm)):
            return
        traffic[path] = [argument.detach() for argument in args if isinstance(argument, Tensor)]
        if output.requires_grad:
            output.register_hook(keep)
        else:  # the first norm of a model, before anything that is trained
            keep(torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output))

    return record


def output_and_loss(outputs: Any) -> tuple[Tensor, Tensor]:
    """The first floating output that is not the loss (logits, say), and the loss.

    For models without a loss it is a fixed random projection of that output.
    """
    values = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, tuple) else (outputs,)
    y = next(value for value in values if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
    if loss is not None:
        return y, loss.float()
    generator = torch.Generator().manual_seed(0)
    return y, (y.float() * torch.randn(y.shape, generator=generator).to(y.device)).mean()


def _compare_models(
    ours: dict[str, Tensor], peft: dict[str, Tensor], twins: Iterable[dict[str, float]], rounding: dict[str, float]
) -> list[Check]:
    """Beside the first twin; beside TWINS of them, in the mean square, if anything fails there.

    Args:
        ours, peft: output, loss and gradients.
        twins: the distances of each from PEFT, made when they are asked for.
        rounding: PEFT's in gradients in their own layers, and in the loss: it adds to the twin's distance.
    """
    following = iter(twins)
    drawn = [next(following)]
    distances = _distances(ours, peft)
    checks = _held(distances, peft, drawn, rounding)
    if not all(check.passed for check in checks):
        drawn += itertools.islice(following, TWINS - 1)
        checks = _held(distances, peft, drawn, rounding)
    missing = sorted(ours.keys() ^ peft.keys())
    apart = [Check("", f"{_named(n)} has a gradient in one of the two only", float("inf"), 0.0, 0.0) for n in missing]
    return checks + apart


def _held(
    ours: dict[str, float], peft: dict[str, Tensor], twins: list[dict[str, float]], rounding: dict[str, float]
) -> list[Check]:
    """Our distances from PEFT against the twins' root mean squares."""
    checks = []
    rows = max(1, peft["output"].numel() // peft["output"].shape[-1])
    usual = {name: (sum(twin[name] ** 2 for twin in twins) / len(twins)) ** 0.5 for name in ours}
    for name in ["output", "loss", *sorted(ours.keys() - {"output", "loss"})]:
        noise = usual[name]
        if name == "loss":  # one number can be close by chance: it is a mean over rows of the output
            noise = max(noise, usual["output"] / rows**0.5)
        noise += rounding.get(name, 0.0)
        eps = torch.finfo(peft[name].dtype).eps
        checks.append(Check("", _named(name), ours[name], noise, MODEL_SLACK * max(noise, eps)))
    return checks


def _distances(other: dict[str, Tensor], peft: dict[str, Tensor]) -> dict[str, float]:
    """How far each tensor that both have lies from PEFT's, by the norm of PEFT's."""
    found = {}
    for name in other.keys() & peft.keys():
        reference = peft[name].double()
        found[name] = (other[name].double() - reference).norm().item() / (reference.norm().item() or 1.0)
    return found


def _named(name: str) -> str:
    return name if name in ("output", "loss") else f"gradient of {name}"


def _kind(what: str) -> str:
    return "gradients" if "." in what else what
