"""Logits that are made when somebody reads them, and not for a cross-entropy.

`LazyLogits` is a tensor to autograd, with a node of its own, and to whoever looks at shape, dtype or device; it has no
memory. Views, slices and casts of it, scalings, a soft-cap and a bias stay lazy, and `cross_entropy` of such is
computed from the hidden states. Any other operation gets the values, which are made once and kept: autograd, hooks and
writes then work as on any tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.utils._pytree import tree_map_only

from fastpeft_kernels.common.shapes import weightless

from ..integrations.fsdp import announces_backward
from .head_call import HeadCall
from .lazy_steps import STEPS, Trail

IGNORED = -100
REDUCTIONS = ("mean", "sum", "none")


class LazyLogits(Tensor):
    """What `logits_of` returns, and what recorded operations make of it.

    Attributes:
        family: shared by all that come from one call of a head.
        trail: the recorded operations.
        content: the logits themselves, once they are asked for.
    """

    family: Family
    trail: Trail
    content: Values

    @staticmethod
    def __new__(cls, family: Family, trail: Trail, content: Values) -> LazyLogits:
        like = trail.like
        lazy: LazyLogits = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=family.call.device
        )
        lazy.family, lazy.trail, lazy.content = family, trail, content
        family.members.append(ref(lazy))
        return lazy

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy:
            served = _cross_entropy(*args, **kwargs)
            if served is not None:
                return served
        elif func is Tensor.register_hook and announces_backward(args[1]):
            args[0].family.announced.append(args[1])
        elif func in _WANT_GRADIENTS:
            args[0].family.hooked(func.__name__)
        elif func in _OUTSIDE_TORCH:
            args = tree_map_only(LazyLogits, plain, args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Below autograd: what is returned here gets its graph from the operation itself."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, LazyLogits) and first.content.kept is None and func in STEPS:
            trail = STEPS[func](first.trail, func, args[1:], kwargs)
            if trail is not None:
                rest = tree_map_only(Tensor, lambda _: trail.biases[-1].values, args[1:])
                return LazyLogits(first.family, trail, Values(first.family, (first.content, func, rest, kwargs)))
        asked_by = str(func)
        owners: dict[int, LazyLogits] = {}

        def made(lazy: LazyLogits) -> Tensor:
            if func._schema.is_mutable:  # what was derived before must not see a write, but where it is a view
                for member in lazy.family.alive():
                    member.content.made(asked_by)
            values = lazy.content.made(asked_by)
            owners[id(values)] = lazy
            return values

        args, kwargs = tree_map_only(LazyLogits, made, (args, kwargs))
        result = func(*args, **kwargs)
        return tree_map_only(Tensor, lambda tensor: owners.get(id(tensor), tensor), result)


class Values:
    """What lazy logits are, without a graph.

    Made from other values and not from lazy logits, since a node that saves its own result (tanh) keeps a copy of it:
    one that held the result would hold the node, for good.

    Attributes:
        kept: the logits, once they were asked for; what was written is in them.
    """

    def __init__(self, family: Family, made_of: tuple[Values, Any, Any, Any] | None = None) -> None:
        self.family, self._made_of = family, made_of
        self.kept: Tensor | None = None

    def made(self, asked_by: str) -> Tensor:
        if self.kept is None:
            self.family.close(asked_by)
            if self._made_of is None:
                self.kept = self.family.call.logits()
            else:
                before, func, args, kwargs = self._made_of
                self.kept = func(before.made(asked_by), *args, **kwargs)
                self._made_of = None
        return self.kept


class Family:
    """All lazy logits of one call of a head.

    Attributes:
        lazy: whether a loss may still be computed from the hidden states: nobody has the values, no hook waits for a
            gradient of them.
        served: whether one was.
        watched: whether a hook came after that; it gets the gradients of further losses.
        announced: hooks that only have to be called before any gradient gets here; losses get them too.
    """

    def __init__(self, call: HeadCall) -> None:
        self.call, self.members = call, list[ref[LazyLogits]]()
        self.lazy, self.served, self.watched = True, False, False
        self.announced: list[Callable[[Tensor], Tensor]] = []

    def alive(self) -> Iterator[LazyLogits]:
        yield from (member for each in self.members if (member := each()) is not None)

    def close(self, asked_by: str) -> None:
        """From now on a loss is computed from the logits."""
        if self.lazy:
            self.lazy = False
            self.call.calls.asked_for(asked_by, self.served)

    def hooked(self, what: str) -> None:
        """A hook waits for the gradient of logits: it gets one, unless their loss has been computed already."""
        if self.served:
            self.watched = True
            self.call.calls.hooked_late(what)
        else:
            self.close(what)


class _Node(torch.autograd.Function):
    """hidden, weight, bias, s, b -> lazy logits. Backward is that of the plain head, for logits that were read."""

    @staticmethod
    def forward(ctx: Any, call: HeadCall, *inputs: Tensor | None) -> LazyLogits:
        ctx.call = call
        ctx.save_for_backward(*inputs)
        family = Family(call)
        hidden = inputs[0]
        assert hidden is not None
        with weightless():
            like = torch.empty((*hidden.shape[:-1], call.words), dtype=call.out, device="meta")
        return LazyLogits(family, Trail(like), Values(family))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Any, ...]:
        return (None, *ctx.call.gradients(dlogits, ctx.saved_tensors, ctx.needs_input_grad[1:]))


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lazy: LazyLogits) -> Tensor:
        return lazy.content.made("something outside torch's operations").detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def logits_of(call: HeadCall) -> LazyLogits:
    """The logits of a head's call, not made yet; differentiable in all that the call holds."""
    return _Node.apply(call, *call.inputs)  # type: ignore[no-untyped-call, no-any-return]


def plain(tensor: Tensor) -> Tensor:
    """The same as an ordinary tensor, with its graph; any other tensor as it is."""
    if not isinstance(tensor, LazyLogits):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return _Plain.apply(tensor)  # type: ignore[no-untyped-call, no-any-return]


def _cross_entropy(
    logits: Any,
    labels: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = IGNORED,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """F.cross_entropy of (tokens, words) and (tokens,) without logits; None where torch's own must have them."""
    if type(logits) is not LazyLogits or type(labels) is not Tensor:
        return None
    if not logits.family.lazy or logits.family.watched:
        return None
    if size_average is not None or reduce is not None or not logits.trail.serves or logits.dim() != 2:
        return None
    if (
        reduction not in REDUCTIONS
        or labels.dtype != torch.int64
        or labels.shape != logits.shape[:1]
        or labels.device != logits.device
    ):
        return None
    family = logits.family
    if not all(added.unchanged for added in logits.trail.biases):  # its values then are in the logits, its graph too
        family.close("cross_entropy, after a write to a bias that was added")
        return None
    wanted = torch.is_grad_enabled() and logits.requires_grad
    if wanted and not _from_the_head(logits):
        return None
    with torch._C.DisableTorchFunctionSubclass(), torch.set_grad_enabled(wanted):
        loss = family.call.loss(
            logits.trail,
            labels,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            class_weight=weight,
        )
    if loss.requires_grad:
        for hook in family.announced:
            loss.register_hook(hook)
    if not family.served:
        family.served = True
        family.call.calls.served()
    return loss


def _from_the_head(logits: LazyLogits) -> bool:
    """Whether gradients go from logits to the head by the recorded operations alone.

    They do not from logits that were detached and want a gradient again, nor through an autograd function of somebody's
    own, as torch puts one below a module with backward hooks: it may give its input, and another gradient.
    """
    with torch._C.DisableTorchFunctionSubclass():
        node = logits.grad_fn
    while node is not None and not isinstance(node, BackwardCFunction):
        node = node.next_functions[0][0] if node.next_functions else None
    return isinstance(node, _Node._backward_cls)


_WANT_GRADIENTS = (Tensor.register_hook, Tensor.retain_grad, Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
_OUTSIDE_TORCH = (
    Tensor.__repr__,
    Tensor.__deepcopy__,
    Tensor.__reduce_ex__,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.numpy,
    Tensor.tolist,
    Tensor.data_ptr,
    Tensor.storage,
    Tensor.untyped_storage,
    Tensor.share_memory_,
)
"""What reads memory without an operation of torch's."""
