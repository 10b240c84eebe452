"""Inputs that backward makes again: of an activation what it was made of is kept anyway, by autograd, for its gradient.

So a projection after GELU or SiLU, as the second of an encoder's MLP, need not keep what it reads, which is as wide as
the MLP. Autograd's graph tells: the input's node is the activation's, and the node before it gave the result of a
projection of ours. Whatever stands between (a dropout that drops, a product) is another node, and the input is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
"""PyTorch's own, and so the same bits. Relu keeps its result, which costs nothing more to keep twice."""
_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
"""What takes saved tensors at present; no part of torch's public interface, which has none for it."""
_results: WeakValueDictionary[int, Tensor] = WeakValueDictionary()  # by the number of their node, as long as they live


class Remade(NamedTuple):
    """An input is `FUNCTIONS[function](source)`."""

    source: Tensor
    function: str

    def again(self) -> Tensor:
        return FUNCTIONS[self.function](self.source)


def note(outputs: Sequence[Tensor]) -> None:
    """A group gave these; if it is one, `remade` may meet it behind an activation."""
    if len(outputs) == 1 and outputs[0].requires_grad:
        _results[cast("Any", outputs[0].grad_fn)._sequence_nr()] = outputs[0]


def remade(x: Tensor) -> Remade | None:
    """What x is made of, where that is the one result of a group, and x an activation of it; both as they were made.

    Not where hooks take what is saved: they may run this again (checkpointing), when the result may live no more, or
    hold the result already (offloading).
    """
    node: Any = x.grad_fn
    if node is None or not torch.is_grad_enabled():
        return None
    name = type(node).__name__
    if name == "SiluBackward0":
        function = "silu"
    elif name == "GeluBackward0":
        function = "gelu" if node._saved_approximate == "none" else "gelu_tanh"
    else:
        return None
    before, number = node.next_functions[0]
    source = None if before is None else _results.get(before._sequence_nr())
    if source is None or source.grad_fn is not before or source.output_nr != number or x.dtype != source.dtype:
        return None
    if x._version or _hooks is None or _hooks(True) is not None:
        return None
    return Remade(source.detach(), function)
