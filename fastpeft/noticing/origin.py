"""Where numbers that are none come from: looked for once, by running a batch again with hooks on all modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastpeft.memory.exhaustion.before import StateBefore
from fastpeft.memory.exhaustion.retrying import why_not_rerun

from .batches import IGNORED
from .gradients import all_finite, local_part

LARGE = 1e4
"""No adapter and no head is trained to values beyond."""
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Call(NamedTuple):
    """A call of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def origin(model: nn.Module, call: Call | None) -> str:
    """A sentence, without its full stop, that names the first module and says what to do.

    The model is left as it was: gradients, buffers and random numbers too.
    """
    if (name := frozen_not_finite(model)) is not None:
        return f"the frozen {name} holds NaN or infinity: load the model anew, and look for what writes there"
    if (most := _largest(p for p in model.parameters() if p.requires_grad)) > LARGE:
        return f"what is trained has grown to {most:.0e}: try a lower learning rate, or max_grad_norm"
    if call is None:
        return _RAN_AWAY
    labels = call.kwargs.get("labels")
    if isinstance(labels, Tensor) and labels.numel() and bool((labels == IGNORED).all()):
        return (
            f"all labels of the batch are {IGNORED}, which the loss ignores: leave such rows out, or cut less of them"
        )
    if why_not_rerun(model) is not None:
        return _RAN_AWAY
    if (name := _input_not_finite(call)) is not None:
        return f"the batch's {name} holds NaN or infinity: look at its rows"
    try:
        return _by_running(model, call) or _RAN_AWAY
    except Exception:  # whatever it is, the training counts
        return _RAN_AWAY


_RAN_AWAY = (
    "try a lower learning rate, max_grad_norm, or float32 in place of float16; a loss that is computed outside of the "
    "model may divide by 0 or take its logarithm"
)


def frozen_not_finite(model: nn.Module) -> str | None:
    """The first parameter that is not trained, or buffer, with something that is no number in it.

    Buffers may have infinity in them: masks do.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and not all(map(_is_finite, _ends(parameter))):
            return f"parameter {name}"
    for name, buffer in model.named_buffers():
        if any(end != end for end in _ends(buffer)):
            return f"buffer {name}"
    return None


def _largest(tensors: Iterable[Tensor]) -> float:
    """Of what is finite."""
    with torch.no_grad():
        parts = [part for t in tensors if (part := local_part(t)).numel()]
        return max((float(part.nan_to_num(0.0, 0.0, 0.0).abs().max()) for part in parts), default=0.0)


def _ends(tensor: Tensor) -> tuple[float, ...]:
    """Smallest and largest, both NaN where one is, without a copy; none of what is stored in codes."""
    if tensor.dtype not in _FLOATS or tensor.is_meta or not tensor.numel() or hasattr(tensor, "to_local"):
        return ()
    least, most = tensor.detach().aminmax()
    return float(least), float(most)


def _is_finite(value: float) -> bool:
    return value - value == 0


def _input_not_finite(call: Call) -> str | None:
    given = {f"argument {place + 1}": value for place, value in enumerate(call.args)} | call.kwargs
    floats = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return next((name for name, value in floats.items() if name != "attention_mask" and not all_finite([value])), None)


def _by_running(model: nn.Module, call: Call) -> str | None:
    """None if all numbers are numbers this time. What is trained and is no number counts as 0."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    clean = {name: p.detach().nan_to_num(0.0, 0.0, 0.0).requires_grad_() for name, p in trained.items()}
    with as_before(model), torch.enable_grad(), _Seen(model) as seen:
        output = functional_call(model, clean, call.args, call.kwargs)
        if seen.forward is not None:
            return seen.forward
        loss = loss_of(output)
        if loss is not None and loss.requires_grad:
            torch.autograd.grad(loss, list(clean.values()), allow_unused=True)
            if (where := seen.backward) is not None:
                return f"the first gradient that is no number comes in the backward pass of {where}"
    return None


def loss_of(output: Any) -> Tensor | None:
    """What a model of transformers gives as its loss; None if it gives none."""
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point() else None


@contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Gradients, buffers and random numbers are in the end what they are now."""
    state = StateBefore(model)
    state.note()
    try:
        yield
    finally:
        state.put_back()
        state.forget()


class _Seen:
    """Hooks on all modules inside a model, for as long as this is entered.

    Attributes:
        forward: a sentence about the first module whose output is not finite; None while all are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._hooks = model, list[Any]()
        self.forward: str | None = None
        self._last_good, self._first_bad = "", ""

    def __enter__(self) -> _Seen:
        for name, module in self._model.named_modules():
            if name:
                hook = module.register_forward_hook(lambda *given, name=name: self._look(name, given[0], given[2]))
                self._hooks.append(hook)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _look(self, name: str, module: nn.Module, output: Any) -> None:
        tensors = [output] if isinstance(output, Tensor) else output if isinstance(output, (tuple, list)) else []
        plain = [t for t in tensors if type(t) is Tensor and t.is_floating_point() and t.numel()]
        if self.forward is None and not all_finite(plain):
            self.forward = (
                f"the first module whose output is no number is {name} ({type(module).__name__}, output in "
                f"{_dtype(plain)}): {_ADVICE[plain[0].dtype == torch.float16]}"
            )
        if plain and plain[0].requires_grad:
            plain[0].register_hook(lambda grad: self._look_back(name, grad))

    def _look_back(self, name: str, grad: Tensor) -> None:
        if self._first_bad:
            return
        if all_finite([grad]):
            self._last_good = name
        else:
            self._first_bad = name

    @property
    def backward(self) -> str | None:
        """The module within which gradients stop being numbers; None if none does."""
        if not self._first_bad:
            return None
        both = zip(self._first_bad.split("."), self._last_good.split("."), strict=False)
        inside = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], both)]
        return ".".join(inside) or self._first_bad


_ADVICE = {
    True: "float16 ends at 65504, train in bfloat16 or float32",
    False: "look at what goes into it; a lower learning rate or max_grad_norm, if it was trained",
}


def _dtype(tensors: list[Tensor]) -> str:
    return str(tensors[0].dtype).removeprefix("torch.")
