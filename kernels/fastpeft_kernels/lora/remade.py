"""Inputs that backward makes again: of an activation what it was made of is kept anyway, by autograd, for its gradient.

So a projection after GELU or SiLU, as the second of an encoder's MLP, need not keep what it reads, which is as wide as
the MLP. Autograd's graph tells: the input's node is the activation's, and the node before it gave the result of a
projection of ours. Whatever stands between (a dropout that drops, a product) is another node, and the input is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
"""PyTorch's own, and so the same bits. Relu keeps its result, which costs nothing more to keep twice."""
_NAMES = tuple(FUNCTIONS)
_NOTE = "fastpeft_lora_result"  # of a node's metadata, which live as long as the node


class Remade(NamedTuple):
    """An input is `FUNCTIONS[function](source)`."""

    source: Tensor
    function: str

    def kept(self) -> Tensor:
        """The source with as many dimensions more as tell the function, for what is kept may be another's to give back:
        a checkpointed part is run again, and what it then saves must say of itself whether it is x."""
        return self.source[(None,) * (1 + _NAMES.index(self.function))]


def again(kept: Tensor, dim: int) -> Tensor:
    """x, of `dim` dimensions, of itself or of `Remade.kept`."""
    more = kept.dim() - dim
    return FUNCTIONS[_NAMES[more - 1]](kept[(0,) * more]) if more else kept


def note(outputs: Sequence[Tensor]) -> None:
    """A group gave these; if it is one, `remade` may meet it behind an activation."""
    if len(outputs) == 1 and outputs[0].requires_grad:
        y, node = outputs[0], cast("Any", outputs[0].grad_fn)
        node.metadata[_NOTE] = ref(y), y._version


def remade(x: Tensor) -> Remade | None:
    """What x is made of, where that is the one result of a group, unchanged, and x an activation of it."""
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
    before, _ = node.next_functions[0]
    found, version = (None, 0) if before is None else before.metadata.get(_NOTE, (None, 0))
    source = None if found is None else found()
    if source is None or x._version or source._version != version or x.dtype != source.dtype:
        return None
    return Remade(source.detach(), function)
