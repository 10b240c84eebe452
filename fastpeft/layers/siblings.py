"""Projections that read the same tensor, computed together by the first that is called.

Members have adapters (`lora.py`) or are frozen (`frozen.py`). A frozen one is computed with the others where a gradient
of the input is wanted, and by itself elsewhere; where it is the first to be called, it leads the others either way, so
that dropout draws its numbers at the same time in a checkpointed forward, without gradients, and in its recomputation.

Who belongs together is found by `watching`, and copied and pickled with the parent. What a group holds for members that
are yet to be called is transient: it is never copied, and it is gone when the parent's forward ends.

torch.compile allows no write to what outlives a checkpointed region, so a traced group holds nothing itself: what it
computed ahead hangs on the input, of which every traced parent first makes a tensor of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastpeft_kernels.common.device import autocast_dtype

from .counting import Counting
from .requests import Request, compute, together

_AHEAD = "fastpeft_ahead"  # attribute of a traced input


RowNames = Sequence[str] | None
_Outputs = dict[int, tuple[Tensor, Any]]


class _Held:
    """Outputs computed ahead for one input, valid while nothing that went into them has changed."""

    def __init__(self, x: Tensor, outputs: _Outputs) -> None:
        self.x, self.version, self.outputs = ref(x), version_of(x), outputs


class Sibling(Counting, nn.Module):
    """What a group asks of its members. All that it keeps is in instance attributes of these names."""

    fastpeft_group: SiblingGroup | None = None
    fastpeft_suspended: bool = False
    adapted: bool  # has adapters, so that its own forward is not good enough

    def request(self, x: Tensor, row_names: RowNames = None) -> Request | str:
        """What to compute for x, or why the module's own forward must run; `row_names` if the batch is mixed."""
        raise NotImplementedError

    def leaves_few(self, x: Tensor) -> bool:
        """Whether the module's own forward is at least as fast for an x that `is_few`."""
        raise NotImplementedError

    def state(self, x: Tensor, row_names: RowNames = None) -> tuple[Any, ...]:
        """What decides, beside parameters and input, what forward returns."""
        return torch.is_grad_enabled(), autocast_dtype(x.device)

    def is_member(self) -> bool:
        """Whether it has siblings: a copy without its parent has none, even where it still knows the original's."""
        return self.fastpeft_group is not None and self in self.fastpeft_group.members

    def ungroup(self) -> None:
        """Its group dissolved; a copy lets go of the original's."""
        if self.fastpeft_group is not None and self.is_member():
            self.fastpeft_group.dissolve()
        else:
            self.part()

    def part(self) -> None:
        """Be no member any more."""
        self.__dict__.pop("fastpeft_group", None)


class SiblingGroup:
    """Layers under one parent that are called with the same tensor, in calling order."""

    def __init__(self) -> None:
        self.members: list[Sibling] = []
        self.hooks: list[RemovableHandle] = []
        self._held: _Held | None = None

    def form(self, parent: nn.Module, members: list[Sibling]) -> None:
        """These layers under this parent belong together from now on."""
        self.members = members
        self.hooks = [
            parent.register_forward_pre_hook(_own_inputs, with_kwargs=True),
            parent.register_forward_hook(_Above(self).after, always_call=True),
        ]
        for member in members:
            member.fastpeft_group = self

    def is_below(self, parent: nn.Module) -> bool:
        """Whether all members are in their places; other libraries wrap some, or copy one without its parent."""
        children = set(parent.children())
        return bool(self.members) and children.issuperset(self.members)

    def leaves_few(self, x: Tensor) -> bool:
        """Whether all members do: else all must be computed together, since what one leaves the others compute."""
        return all([member.leaves_few(x) for member in self.members])

    def take(self, member: Sibling, x: Tensor, row_names: RowNames = None) -> Tensor | None:
        """The member's output when it was computed ahead for this very x in this very state, else None."""
        if not self.members and not torch.compiler.is_compiling():  # a layer that was copied without its parent
            member.part()
        outputs = self._ahead(x)
        if outputs is None:
            return None
        found = outputs.pop(id(member), None)
        if not outputs:
            self._hold(x, None)
        return found[0] if found is not None and _same(found[1], member.state(x, row_names)) else None

    def compute(self, member: Sibling, x: Tensor, request: Request) -> Tensor:
        """The member's output; when it leads, the others' are computed with it and held."""
        y = self.lead(member, x, request)
        return compute(x, [request])[0] if y is None else y

    def lead(self, member: Sibling, x: Tensor, request: Request | str) -> Tensor | None:
        """When it is this member's turn: all outputs that can be had together, held; its own is returned if among them.

        The first to be called leads. Where that is a frozen one, which some models may pass over or hooks may keep to
        itself, the first with adapters does so when nothing was computed ahead.
        """
        if not self.members or (not torch.compiler.is_compiling() and x.is_inference()):
            return None
        adapted = [other for other in self.members if other.adapted]
        first = member is self.members[0] or (member is adapted[0] and self._ahead(x) is None)
        if not first:
            return None
        self._hold(x, None)
        others = self.members[self.members.index(member) + 1 :]
        row_names = None if isinstance(request, str) else request.row_names
        found = together([(member, request), *[(other, other.request(x, row_names)) for other in others]])
        if not any(other.adapted for other, _ in found):
            return None
        outputs = compute(x, [wanted for _, wanted in found])
        ahead = {id(other): (y, other.state(x, row_names)) for (other, _), y in zip(found, outputs, strict=True)}
        own = ahead.pop(id(member), None)
        if ahead:
            self._hold(x, ahead)
        return None if own is None else own[0]

    def dissolve(self) -> None:
        """The members are on their own again."""
        self.forget()
        for hook in self.hooks:
            hook.remove()
        for member in self.members:
            member.part()

    def _ahead(self, x: Tensor) -> _Outputs | None:
        if torch.compiler.is_compiling():
            return getattr(x, _AHEAD, None)
        held = self._held
        return None if held is None or held.x() is not x or held.version != version_of(x) else held.outputs

    def _hold(self, x: Tensor, outputs: _Outputs | None) -> None:
        if torch.compiler.is_compiling():
            setattr(x, _AHEAD, outputs)
        else:
            self._held = None if outputs is None else _Held(x, outputs)

    def forget(self) -> None:
        """Hold nothing ahead."""
        self._held = None

    def __reduce__(self) -> Any:
        """A copy knows nothing, until the parent's hook that is copied with it tells; a layer's copy has no parent."""
        return SiblingGroup, ()


class _Above:
    """The parent's end of a group, held by its hook: there the forward ends, and there copies of the group begin."""

    def __init__(self, group: SiblingGroup) -> None:
        self.group = group

    def after(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.group.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"group": self.group, "members": self.group.members, "hooks": self.group.hooks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.group = state["group"]
        self.group.members, self.group.hooks = state["members"], state["hooks"]


def _own_inputs(
    parent: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """While torch.compile traces: aliases in place of the tensors that a parent is called with."""
    if not torch.compiler.is_compiling():
        return None
    known: list[tuple[Tensor, Tensor]] = []

    def alias(value: Any) -> Any:
        if type(value) is not Tensor or not value.is_floating_point():
            return value
        for original, own in known:
            if original is value:
                return own
        known.append((value, value.view_as(value)))
        return known[-1][1]

    return tuple([alias(value) for value in args]), {name: alias(value) for name, value in kwargs.items()}


def version_of(x: Tensor) -> int:
    """How often x was written into; inference tensors do not count."""
    return 0 if x.is_inference() else x._version


def _same(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    """Equal, and the very same tensors where a scaling is one."""
    if len(before) != len(now):
        return False
    pairs = zip(before, now, strict=True)
    return all([a is b or not (isinstance(a, Tensor) or isinstance(b, Tensor) or a != b) for a, b in pairs])
