"""AdamW for many small matrices: PyTorch's fused kernel, with next to nothing of Python around it.

An adapter has hundreds of matrices, and what `torch.optim.AdamW` does with each of them in Python at each step takes
longer than a GPU needs for the arithmetic. Here the lists that the kernel wants are kept from step to step.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_torch_step = inspect.unwrap(torch.optim.Adam.step)
"""Without the hooks that torch puts around the `step` of every class of optimizers: ours has them already."""


class AdamW(torch.optim.AdamW):
    """The numbers, state and options of `torch.optim.AdamW(fused=True)`, bit for bit, in less time on the host.

    Parameters, gradients and moments stay where they are, and `state_dict` has PyTorch's form: a run can go on with
    either. Only the counts of steps, a number for each parameter, are elements of one tensor. Parameters without a
    gradient are skipped, as PyTorch does. Its own step is taken until two steps had the same parameters with gradients,
    and for what the kept lists are not for: amsgrad, capturable, a tensor as learning rate, sparse or complex
    gradients, DTensors (FSDP2), torch.compile, capturing a CUDA graph.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, capturable: as of `torch.optim.AdamW`. Parameters are
            where PyTorch has a fused AdamW, on a CPU or a GPU, in any floating dtype; moments have the same.

    Raises:
        ValueError: an option out of range, as PyTorch says it.
        RuntimeError: at a step, a parameter for which there is no fused AdamW.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, https://arxiv.org/abs/1711.05101
    """

    _kept: _Kept | None = None
    _before: _Signature | None = None

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, capturable=capturable, fused=True
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of a state that an AdamW which is not fused has saved, whose counts of steps are on the CPU."""
        super().__setstate__(state)
        self._kept = self._before = None
        for group in self.param_groups:
            group["fused"], group["foreach"] = True, None
            for parameter in group["params"]:
                if own := self.state.get(parameter):
                    own["step"] = own["step"].to(parameter.device, torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns what `closure`, if given, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling() or not all(map(_is_plain, self.param_groups)):
            _torch_step(self)
            return loss
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        seen = _Signature(self, gradients)
        if self._kept is None or self._kept.signature != seen:
            self._kept = _Kept(self, gradients) if self._before == seen else None
            self._before = seen
        if self._kept is not None and self._kept.serves:
            self._kept.run(self, gradients)
        else:
            _torch_step(self)
        return loss


def _is_plain(group: dict[str, Any]) -> bool:
    numbers = (group["lr"], *group["betas"])
    others = group["amsgrad"] or group["capturable"] or group["differentiable"]
    return group["fused"] and not others and not any(isinstance(number, Tensor) for number in numbers)


class _Signature:
    """All that the lists depend on: parameters, their state, and which have no gradient.

    Objects are compared by identity, which is quick, and held, so that no other can come to the place of one.
    """

    def __init__(self, optimizer: AdamW, gradients: list[Tensor | None]) -> None:
        groups = [group["params"] for group in optimizer.param_groups]
        self._objects = [
            *chain.from_iterable(groups),
            *chain.from_iterable(state.values() for state in optimizer.state.values()),
        ]
        self._sizes = list(map(len, groups))
        self._absent = [gradient is None for gradient in gradients]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Signature)
            and self._sizes == other._sizes
            and self._absent == other._absent
            and len(self._objects) == len(other._objects)
            and all(map(is_, self._objects, other._objects))
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass
class _Call:
    """Of the kernel, for the parameters of one group, device and dtype; `where` are their places among all."""

    where: list[int] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)


class _Kept:
    """The lists, made once; the counts of steps become elements of one tensor on each device.

    Attributes:
        signature: what they were made of.
    """

    def __init__(self, optimizer: AdamW, gradients: list[Tensor | None]) -> None:
        self._calls: dict[tuple[int, torch.device, torch.dtype], _Call] = defaultdict(_Call)
        self._steps: dict[torch.device, Tensor] = {}
        members = [
            (number, parameter) for number, group in enumerate(optimizer.param_groups) for parameter in group["params"]
        ]
        trained = [(*member, i) for i, member in enumerate(members) if gradients[i] is not None]
        if all(_is_served(parameter, gradients[i], optimizer.state[parameter]) for _, parameter, i in trained):
            self._join_steps(optimizer, [parameter for _, parameter, _ in trained])
            for number, parameter, i in trained:
                call, state = self._calls[number, parameter.device, parameter.dtype], optimizer.state[parameter]
                call.where.append(i)
                call.parameters.append(parameter)
                call.exp_avgs.append(state["exp_avg"])
                call.exp_avg_sqs.append(state["exp_avg_sq"])
                call.steps.append(state["step"])
        self.signature = _Signature(optimizer, gradients)

    def _join_steps(self, optimizer: AdamW, parameters: list[Tensor]) -> None:
        for device in {parameter.device for parameter in parameters}:
            states = [optimizer.state[parameter] for parameter in parameters if parameter.device == device]
            self._steps[device] = torch.stack([state["step"] for state in states])
            for state, step in zip(states, self._steps[device].unbind(), strict=True):
                state["step"] = step

    @property
    def serves(self) -> bool:
        """Whether there is something to do that may be done now."""
        capturing = any(device.type == "cuda" for device in self._steps) and torch.cuda.is_current_stream_capturing()
        return bool(self._calls) and not capturing

    def run(self, optimizer: AdamW, gradients: list[Tensor | None]) -> None:
        """One step. A gradient scaler leaves its scale and whether it found an inf at the optimizer, for the kernel."""
        grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        for steps in self._steps.values():
            steps.add_(1)
        for (number, device, _), call in self._calls.items():
            group = optimizer.param_groups[number]
            torch._fused_adamw_(
                call.parameters,
                [gradients[i] for i in call.where],  # type: ignore[misc]
                call.exp_avgs,
                call.exp_avg_sqs,
                [],
                call.steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=group["maximize"],
                grad_scale=_on(device, grad_scale),
                found_inf=_on(device, found_inf),
            )
        for device, steps in self._steps.items():
            if (left_out := _on(device, found_inf)) is not None:
                steps.sub_(left_out)


def _is_served(parameter: Tensor, gradient: Tensor | None, state: dict[str, Any]) -> bool:
    kinds = {type(tensor) for tensor in (parameter, gradient, *state.values())}
    return (
        kinds <= {Tensor, Parameter}
        and parameter.is_floating_point()
        and gradient is not None
        and gradient.layout == torch.strided
        and {"step", "exp_avg", "exp_avg_sq"} <= state.keys()
        and state["step"].device == parameter.device
    )


def _on(device: torch.device, number: Tensor | None) -> Tensor | None:
    return None if number is None else number.to(device, non_blocking=True)
