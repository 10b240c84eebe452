"""PEFT's LoRA on the stacked parameters of a mixture's experts (`target_parameters`), with a fused forward.

PEFT wraps the module of experts once for each parameter and makes, at every call, the sum of all experts' weights and
their updates. Ours is the same tree of wrappers; the outermost, which is the one that is called, reads the adapters of
all of them and computes rows sorted by expert, so that only tokens meet the adapters.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft_kernels.common.device import autocast_dtype
from fastpeft_kernels.common.shapes import imitated
from fastpeft_kernels.common.tracing import as_op
from fastpeft_kernels.experts import ExpertAdapter, Experts
from fastpeft_kernels.experts.api import run_experts

from ..integrations import peft
from ..integrations.transformers import multiplies_experts_as_stored
from ..integrations.tuner_layers import why_not_plain
from .bypass import why_not_bypassed, why_not_called
from .counting import Counting
from .experts_structure import ExpertRoles, even_routing, settings
from .merges import SeenMerges
from .naming import NamedAsPeft

CLASS = "FastParamWrapper"


class FastExperts(NamedAsPeft, SeenMerges, Counting, nn.Module):
    """Mixed in before PEFT's ParamWrapper; overrides `forward`.

    What else it keeps is in instance attributes of these names; `leave` takes them away again.
    """

    fastpeft_roles: ExpertRoles
    fastpeft_settings: dict[str, Any]  # of the proof
    fastpeft_wrappers: int = 1  # around the same experts
    fastpeft_suspended: bool = False

    def request(self, x: Tensor, *routing: Any) -> tuple[Experts, torch.dtype] | str:
        """What to compute, and in which dtype, or why PEFT's own forward must run."""
        device, roles = x.device, self.fastpeft_roles
        if len(routing) != (0 if roles.even else 2):
            return f"called otherwise than with {'x' if roles.even else 'x, index and weights'}"
        reason = None if roles.even else _why_not_routing(x, *routing)
        if reason is not None:
            return reason
        adapters: dict[str, tuple[ExpertAdapter, ...]] = {}
        for wrapper in wrappers(self):
            reason = None if wrapper is self else why_not_bypassed(wrapper, fast_class(), device)
            found = peft.used_adapters(wrapper, device, None) if reason is None else reason
            if isinstance(found, str):
                return found
            adapters[wrapper.parameter_name] = peft.by_expert(wrapper, found, roles.transposed)  # type: ignore[index, arg-type]
        base = wrappers(self)[-1]._modules["base_layer"]
        assert base is not None
        if "parametrizations" in base._modules:
            return "parametrized experts, as inside a call that PEFT serves"
        reason = _why_not_proved(base, self.fastpeft_settings, device) or _why_not_experts(base, roles, device)
        if reason is not None:
            return reason
        stack: Any = base._parameters[roles.inner]
        if roles.even and (x.dim() != 2 or x.shape[0] % stack.shape[0]):
            return f"an input of {tuple(x.shape)} for {stack.shape[0]} experts"
        stored = stack.dtype
        autocast = autocast_dtype(device)
        if autocast is None and stored != x.dtype:
            return f"input in {x.dtype}, experts in {stored}, no autocast"
        dtype = stored if autocast is None or multiplies_experts_as_stored(base) else autocast
        return roles.experts(base._parameters, adapters), dtype

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.fastpeft_suspended:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return, misc]
        reason = why_not_called(self, x, (), kwargs)
        if reason is None and as_op():
            reason = "selective checkpointing or another mode that replaces operations"
        if reason is None:
            request = self.request(x, *args)
            if not isinstance(request, str):
                for wrapper in wrappers(self):
                    wrapper._count("fused")
                return self._run(x, args, *request)
            reason = request
        self._count(reason)
        return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return, misc]

    def _run(self, x: Tensor, routing: tuple[Any, ...], experts: Experts, dtype: torch.dtype) -> Tensor:
        even = self.fastpeft_roles.even
        index, weights = even_routing(x, experts.inner.experts, dtype) if even else routing
        y = run_experts(x, index, weights, experts, dtype)
        return y.to(dtype) if even else y  # even ones give what their products are in

    def base_parameter(self) -> nn.Parameter:
        return self.get_param()  # type: ignore[operator, no-any-return]

    def leave(self) -> None:
        """This instance as it was before."""
        kept = ("roles", "settings", "wrappers", "calls", "suspended")
        for name in (f"fastpeft_{name}" for name in kept):
            self.__dict__.pop(name, None)


def wrappers(outer: Any) -> list[FastExperts]:
    """`outer` and the wrappers inside it, down to the one that holds the experts."""
    found = [outer]
    while isinstance(inner := found[-1]._modules["base_layer"], stock_wrapper()):
        found.append(inner)
    return found


def _why_not_routing(x: Tensor, index: Any, weights: Any) -> str | None:
    for value in (index, weights):
        if type(value) is not Tensor or value.dim() != 2 or value.shape[0] != x.shape[0] or value.device != x.device:
            return "a routing that is no two tensors of (tokens, choices)"
    if x.device.type == "meta" and not imitated(x.device):
        return "a routing without numbers, on the meta device"
    if x.dim() != 2 or index.shape != weights.shape or not weights.is_floating_point():
        return "a routing that is no two tensors of (tokens, choices)"
    if index.dtype not in (torch.int64, torch.int32):
        return f"a routing in {index.dtype}"
    return None


def _why_not_proved(base: nn.Module, proved: dict[str, Any], device: torch.device) -> str | None:
    """Why the experts' module must be called itself: it may compute something else than in its proof; or None."""
    reason = why_not_bypassed(base, type(base), device)
    if reason is not None:
        return reason
    now = settings(base)
    if now.keys() != proved.keys():
        return "other parts than when it was accelerated"
    for name, value in now.items():
        if value != proved[name]:
            return f"{name}: another one than when it was accelerated"
    for child in base._modules.values():
        reason = None if child is None else why_not_bypassed(child, type(child), device)
        if reason is not None:
            return reason
    return "experts in parallel on several devices" if getattr(base, "_is_expert_parallel", False) else None


def _why_not_experts(base: nn.Module, roles: ExpertRoles, device: torch.device) -> str | None:
    """Why the experts' parameters cannot be read; or None."""
    held = {name: parameter for name, parameter in base._parameters.items() if parameter is not None}
    if held.keys() != set(roles.names()):
        return "other parts than when it was accelerated"
    dtypes = set()
    for name, parameter in held.items():
        reason = why_not_plain(parameter, device)
        if reason is not None:
            return f"{name}: {reason}"
        if parameter.requires_grad:
            return f"{name} is trained"
        if not (parameter.is_contiguous() or parameter.mT.is_contiguous()):
            return f"{name}: matrices that do not lie one after the other"
        dtypes.add(parameter.dtype)
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        return f"experts in {', '.join(sorted(map(str, dtypes)))}"
    return None


def stock_wrapper() -> type[nn.Module]:
    """PEFT's class."""
    from peft.tuners.lora.layer import ParamWrapper

    return ParamWrapper  # type: ignore[no-any-return]


@cache
def fast_class() -> type[FastExperts]:
    """PEFT's ParamWrapper, fused. Made when PEFT is first needed; a module attribute, so that it can be pickled."""
    # The compiler breaks its graph at PEFT's forward, too, and then at each of its parts.
    forward = torch.compiler.disable(FastExperts.forward)
    members = {"__module__": __name__, "__doc__": "ParamWrapper of PEFT, fused.", "forward": forward}
    stock = stock_wrapper()  # whose name PEFT looks for where it adds an adapter; pickle looks for the other
    globals()[CLASS] = made = type(stock.__name__, (FastExperts, stock), {**members, "__qualname__": CLASS})
    return made


def __getattr__(name: str) -> Any:
    """Unpickling looks the class up by name."""
    if name == CLASS:
        return fast_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
