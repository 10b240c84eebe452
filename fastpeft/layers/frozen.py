"""Frozen projections beside adapted ones: the same nn.Linear or Linear4bit, as a member of its siblings' group.

One becomes such by a swap of `__class__` when its group forms, and is what it was when the group dissolves. A swap, not
a forward put on the instance: that one would be lost in pickles, and other libraries replace it. For the ops and for
PEFT, which asks with isinstance, the module stays what it is (`bypass.own_class`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..integrations import bitsandbytes
from ..integrations.accelerate import forward_is_its_class_s, has_hook_on_its_forward, rebind_hooked_forward
from .bypass import OWN_CLASS, own_class, why_not_bypassed, why_not_called
from .few_tokens import is_few
from .requests import Request, plain_request
from .siblings import RowNames, Sibling, SiblingGroup

ALONE = "no gradient of the input is wanted, so nothing is saved"


class FrozenSibling(Sibling):
    """Mixed in before the class of a frozen projection; overrides `forward`."""

    fastpeft_cpu_packing: bool | None
    adapted = False

    def request(self, x: Tensor, row_names: RowNames = None) -> Request | str:
        if not (x.requires_grad and torch.is_grad_enabled()):
            return ALONE
        return plain_request(self, x)

    def leaves_few(self, x: Tensor) -> bool:
        return True

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        group = self.fastpeft_group
        if group is not None and not group.members and not torch.compiler.is_compiling():  # copied without its parent
            self.part()
            return type(self).forward(self, *args, **kwargs)
        if len(args) == 1 and not kwargs and group is not None and group.members and not self.fastpeft_suspended:
            y = self._forward_with(group, args[0])
            if y is not None:
                return y
        return super().forward(*args, **kwargs)  # type: ignore[no-any-return, misc]

    def _forward_with(self, group: SiblingGroup, x: Any) -> Tensor | None:
        """The output for x where it is computed with the others'; the others' are in any case, when it leads."""
        if not torch.is_grad_enabled() and self is not group.members[0]:  # nothing is held for it, and it leads nobody
            return None
        if is_few(x) and group.leaves_few(x):
            return None
        reason = why_not_called(self, x, (), {}) or why_not_bypassed(self, type(self), x.device)
        if reason is None:
            y = group.take(self, x)
            if y is None:
                request = self.request(x)
                reason = request if isinstance(request, str) and request is not ALONE else None
                y = group.lead(self, x, request)
            if y is not None:
                self._count("fused")
                return y
        if reason is not None:
            self._count(reason)
        return None

    def part(self) -> None:
        super().part()
        bitsandbytes.allow_cpu_packing(self, self.__dict__.pop("fastpeft_cpu_packing", None))
        bitsandbytes.forget(self)
        self.__dict__.pop("fastpeft_calls", None)
        fast, stock = type(self), own_class(self)
        if stock is fast:  # FSDP2 has put a class of its own before ours, which then does nothing more
            return
        self.__class__ = stock  # type: ignore[assignment]
        rebind_hooked_forward(self, fast, stock)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        bitsandbytes.forget(self)  # what was read of it keeps the old device's memory
        return super()._apply(*args, **kwargs)


class SiblingLinear(FrozenSibling, nn.Linear):
    """nn.Linear beside adapted layers."""


def _stands_for(fast: type[FrozenSibling], stock: type[nn.Module]) -> None:
    """The name is the stock class's, which PEFT asks for and prints; pickles go by `__qualname__`."""
    fast.__name__ = stock.__name__
    OWN_CLASS[fast] = stock


_stands_for(SiblingLinear, nn.Linear)


def can_join(module: nn.Module) -> bool:
    """Whether a child of an adapted layer's parent is a frozen projection that the ops can read."""
    if type(module) is not nn.Linear and type(module) is not bitsandbytes.linear_4bit():
        return False
    if "forward" in module.__dict__ and not (forward_is_its_class_s(module) or has_hook_on_its_forward(module)):
        return False
    weight = module._parameters.get("weight")
    return weight is not None and not weight.requires_grad


def join(module: nn.Module) -> FrozenSibling:
    """The same module, ready to be a member."""
    stock = type(module)
    fast = SiblingLinear if stock is nn.Linear else __getattr__("SiblingLinear4bit")
    module.__class__ = fast
    assert isinstance(module, FrozenSibling)
    rebind_hooked_forward(module, stock, fast)
    module.fastpeft_cpu_packing = bitsandbytes.forbid_cpu_packing(module)
    return module


def __getattr__(name: str) -> Any:
    """The class over bitsandbytes' is made when a model or a pickle first needs it, and found by name from then on."""
    if name != "SiblingLinear4bit":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in globals():
        import bitsandbytes as installed

        stock = installed.nn.Linear4bit
        members = {"__module__": __name__, "__doc__": "bitsandbytes' Linear4bit beside adapted layers."}
        globals()[name] = made = type(name, (FrozenSibling, stock), members)
        _stands_for(made, stock)
    return globals()[name]
