"""What an optimizer is about to step by: the norm of each gradient, and which adapters never get one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .notices import shortly

SETTLED = 10
"""Steps after which an adapter that had no gradient in any of them is taken to get none."""
LEAST = 3
"""Steps that are enough where there were no more in all."""


class Gradients:
    """Of what one optimizer holds.

    Args:
        given: its parameters, of the model and others.
        ours: whether there is one of the model's.

    Attributes:
        asked: steps that it began.
        steps: of them, those whose norms were read.
        telling: of these, steps that say where gradients go: not those whose loss had none but zeros for anything,
            as where all answers to a prompt are rewarded alike.
        received: ids of parameters that had a gradient other than 0 in one of the first of those.
    """

    def __init__(self, given: list[Tensor], *, ours: bool) -> None:
        self.given, self.ours = given, ours
        self.asked, self.steps, self.telling = 0, 0, 0
        self.received: set[int] = set()

    def norms(self, optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], Tensor] | None:
        """The parameters that have a gradient, and (parameters + 1,) in fp32 on a device of theirs; None without any.

        Those are norms, and behind them 1 where a gradient scaler has the optimizer skip this step, else 0.
        """
        found = [(p, local_part(p.grad)) for p in self.given if p.grad is not None]
        found = [(p, grad) for p, grad in found if grad.numel() and grad.layout is torch.strided]
        if not found:
            return None
        with torch.no_grad():
            norms = torch._foreach_norm([grad for _, grad in found], 2, dtype=torch.float32)
            device = norms[0].device
            skipped = getattr(optimizer, "found_inf", None)
            last = skipped if isinstance(skipped, Tensor) else torch.zeros((), device=device)
            return [p for p, _ in found], torch.stack([n.to(device).float() for n in [*norms, last.reshape(())]])

    def note(self, parameters: list[Tensor], norms: Tensor) -> bool:
        """Read what `norms` gave, on the host; whether all that is stepped by is finite."""
        self.steps += 1
        told = not parameters or bool(norms[:-1].count_nonzero())
        self.telling += told
        if told and self.telling <= SETTLED:
            self.received.update(id(p) for p, norm in zip(parameters, norms.tolist(), strict=False) if norm != 0)
        return bool(norms[-1]) or bool(norms.isfinite().all())


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a sharded one."""
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


def all_finite(parameters: Iterable[Tensor]) -> bool:
    """Waits for the device."""
    return all(bool(local_part(p.detach()).isfinite().all()) for p in parameters)


def without_gradient(model: nn.Module, optimizers: Sequence[Gradients]) -> str | None:
    """In words: adapters that no gradient came to, or that no optimizer holds.

    A layer's adapters count together: matrix A alone has no gradient while B is 0, and of several adapters some may not
    be asked for. Of layers in no optimizer nothing is said where others are in one: theirs may step less often.
    """
    adapters = adapters_of(model)
    held = {id(p) for gradients in optimizers for p in gradients.given}
    stepped = {name: own for name, own in adapters.items() if any(id(p) in held for p in own)}
    if adapters and not stepped:
        return _NOT_HELD
    received = {one for gradients in optimizers for one in gradients.received}
    silent = [name for name, own in stepped.items() if not any(id(p) in received for p in own)]
    if not silent:
        return None
    advice = _MOST if 2 * len(silent) > len(stepped) else _SOME
    return f"{len(silent)} of {len(stepped)} adapters get no gradient ({shortly(silent)}): {advice}"


def adapters_of(model: nn.Module) -> dict[str, list[Tensor]]:
    """What each of PEFT's layers trains, by the layer's name; without what need not get a gradient in every step.

    Those are experts, to which no token may be sent, and single rows of embeddings, whose token may not come.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or "experts" in name.split("."):
            continue
        parts = [getattr(module, part, None) for part in module.adapter_layer_names if part != "trainable_tokens_delta"]
        trained: list[Tensor] = [
            p
            for part in parts
            if isinstance(part, (nn.Module, nn.ParameterDict))
            for p in part.parameters()
            if p.requires_grad and p.numel()
        ]
        if trained:
            found[name] = trained
    return found


_NOT_HELD = (
    "the optimizer holds no adapter, so none is trained: make it after get_peft_model or add_adapter, of the "
    "parameters that require gradients"
)
_MOST = (
    "nothing of the loss reaches them; reentrant gradient checkpointing needs model.enable_input_require_grads(), or "
    "use_reentrant=False; look for detach(), no_grad() and merged adapters"
)
_SOME = (
    "the loss is not computed from these modules; leave them out of target_modules, or look at how the model is called"
)
