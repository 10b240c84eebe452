"""transformers' masks as one interval of keys for each query, in a tensor that models carry like any other mask.

transformers describes a mask by a function of (batch, head, query, key) and hands it to the mask function of the
attention implementation, which makes a tensor of it. The functions that it composes itself are told by their code and
read from their closures. Of those ours makes, in place of queries x keys values:

- None where all is seen;
- `causal_alone`, four dimensions and no content, where all up to the query itself is seen: transformers' own None would
  leave that to the module, and some modules say that they are not causal (Pegasus-X's);
- a bool (batch, 1, queries, keys) whose rows are one row in memory, where only padding hides keys;
- else int32 (batch, 1, queries, 2): (start, stop) of each query, within what padding on either side leaves;
- where padding has holes, or torch.compile traces, int32 (batch, 1, queries + keys, 3): then (seen, 0, 0) of each key.

They have four dimensions, so that models and caches take them for masks that are prepared already. Gemma 4 keeps the
last queries of a mask when it generates, so each kind has a last dimension of its own, and intervals a row a query:
where nothing is trained, holes make a mask of queries x keys up to `_FEW_SEEN`; beyond it such a cut is an error.

Whatever else a model asks for becomes transformers' own bool mask of queries x keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpeft_kernels.attention.masks import Mask, dense_mask
from fastpeft_kernels.attention.ranges import packed_by_index

_KEYS = "fastpeft_keys"
"""Attribute of intervals: of how many keys they are, while the tensor is the one that was made."""
_FEW_SEEN = 1 << 26
"""Elements of a mask of queries x keys, a byte each."""


class Part(NamedTuple):
    """One condition of a mask; all of them must hold.

    Attributes:
        kind: "band" (left, right), "chunk" (size, left padding) or "documents" (ids that do not decrease).
        values: of the kind.
        positions: int64 (batch, tokens) that the kind counts in, where they are not the tokens' indices: consecutive
            within a document.
    """

    kind: str
    values: tuple[Any, ...]
    positions: Tensor | None = None


def interval_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """The mask function of our attention implementation; arguments are transformers'.

    Returns:
        One of the tensors above, or None.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    mask_function = causal_mask_function if mask_function is None else mask_function
    parts = None if use_vmap or q_length == 1 else parts_of(mask_function)
    packed = parts is not None and any(part.kind == "documents" for part in parts)
    in_full = not (allow_is_causal_skip or allow_is_bidirectional_skip or packed)  # to be added to, for one
    if parts is None or (parts and in_full):
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            use_vmap=use_vmap,
            device=device,
            **others,
        )
    seen = _seen_keys(attention_mask, kv_length, kv_offset)
    if not parts:
        if seen is None and allow_is_bidirectional_skip:
            return None
        seen = torch.ones((batch_size, kv_length), dtype=torch.bool, device=device) if seen is None else seen
        return seen[:, None, None, :].expand(batch_size, 1, q_length, kv_length)
    square = q_length == kv_length and type(q_offset) is type(kv_offset) is int and q_offset == kv_offset
    if seen is None and square and _is_causal(parts, kv_length):
        return causal_alone(batch_size, device)
    query = torch.arange(q_length, device=device) + q_offset
    start, stop = (edge - kv_offset for edge in _bounds(parts, query[None]))
    return encoded(start, stop, seen, batch_size, kv_length)


def causal_alone(batch: int, device: torch.device | str) -> Tensor:
    """int32 (batch, 1, 1, 1)."""
    return torch.zeros((batch, 1, 1, 1), dtype=torch.int32, device=device)


def is_causal_alone(mask: Tensor | None) -> bool:
    """Whether it is what `causal_alone` makes."""
    return mask is not None and mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[1:] == (1, 1, 1)


def encoded(start: Tensor, stop: Tensor, seen: Tensor | None, batch: int, keys: int) -> Tensor | None:
    """One of the tensors above, of start and stop (1 or batch, queries), and seen, bool (batch, keys)."""
    if seen is not None and not torch.compiler.is_compiling():
        first, end = _run(seen)
        if bool((end - first == seen.sum(-1)).all()):  # blocks of keys need not be looked at one by one
            start, stop = torch.maximum(start, first[:, None]), torch.minimum(stop, end[:, None])
            seen = None
        elif not torch.is_grad_enabled() and batch * start.shape[1] * keys <= _FEW_SEEN:
            return dense_mask(Mask(start=start, stop=stop, keys=seen), start.shape[1], keys, start.device)
    rows = torch.stack([start, stop], dim=-1).clamp(0, keys).expand(batch, -1, -1)
    if seen is None:
        made = rows.to(torch.int32)[:, None]
        if not torch.compiler.is_compiling():
            setattr(made, _KEYS, keys)
        return made
    columns = torch.nn.functional.pad(seen.to(rows.dtype)[..., None], (0, 2))
    return torch.cat([torch.nn.functional.pad(rows, (0, 1)), columns], dim=1).to(torch.int32)[:, None]


def _run(seen: Tensor) -> tuple[Tensor, Tensor]:
    """The first key that is seen and the one after the last, int64 (batch,); 0 and 0 where none is."""
    found = seen.to(torch.int64)
    end = seen.shape[1] - found.flip(-1).argmax(-1)
    return found.argmax(-1), end.masked_fill(~seen.any(-1), 0)


def decoded(attention_mask: Tensor | None, queries: int, keys: int) -> tuple[Mask, Tensor | None]:
    """(mask, bias to add) of what a model hands to its attention function as its mask.

    Raises:
        ValueError: a shape or dtype that says nothing about queries x keys, or other keys than it was made for.
    """
    given = attention_mask
    if given is None:
        return Mask(), None
    if given.dim() == 4 and given.dtype == torch.int32 and given.shape[1:] == (1, queries, 2):
        if not torch.compiler.is_compiling() and (made := getattr(given, _KEYS, keys)) != keys:
            cause = "; activation checkpointing takes caches away, which prefix tuning needs" if made > keys else ""
            raise ValueError(f"attention_mask: expected a mask of {keys} keys, got one of {made}{cause}")
        start, stop = given[:, 0].unbind(-1)
        return Mask(start=start, stop=stop), None
    if given.dim() == 4 and given.dtype == torch.int32 and given.shape[1:] == (1, queries + keys, 3):
        start, stop, _ = given[:, 0, :queries].unbind(-1)
        return Mask(start=start, stop=stop, keys=given[:, 0, queries:, 0] != 0), None
    if given.dim() == 2 and given.shape[1] == keys and not given.is_floating_point():
        return Mask(keys=given != 0), None
    if given.dim() == 4 and given.shape[2] in (1, queries) and given.shape[3] in (1, keys):
        if given.is_floating_point():
            return Mask(), given
        if given.dtype == torch.bool:
            alike = given.shape[1] == 1 and given.shape[3] == keys and (given.shape[2] == 1 or given.stride(2) == 0)
            return (Mask(keys=given[:, 0, 0]) if alike else Mask(dense=given)), None
    raise ValueError(
        f"attention_mask: expected None, a bool or floating mask that broadcasts to (batch, heads, {queries}, {keys}), "
        f"a mask of keys (batch, {keys}), or what fastpeft's mask function made; "
        f"got {given.dtype} of shape {tuple(given.shape)}"
    )


def seen_keys(mask: Mask, keys: int) -> Tensor | None:
    """bool (batch, keys): what some query may see, of a mask that `decoded` gave; None where it is not told."""
    if mask.keys is not None or mask.start is None or mask.stop is None:
        return mask.keys
    key = torch.arange(keys, device=mask.start.device)
    return (key >= mask.start.amin(-1, keepdim=True)) & (key < mask.stop.amax(-1, keepdim=True))


def parts_of(function: Any) -> tuple[Part, ...] | None:
    """What a mask function of transformers is made of; empty where it hides nothing, None if it is unknown."""
    if torch.compiler.is_compiling():  # it cannot read closures
        from transformers import masking_utils as masks

        if function is masks.bidirectional_mask_function:
            return ()
        return (Part("band", (None, 0)),) if function is masks.causal_mask_function else None
    code: Any = getattr(function, "__code__", None)
    kind = _known().get(code)
    if kind is None:
        return None
    closure = dict(zip(code.co_freevars, (c.cell_contents for c in function.__closure__ or ()), strict=True))
    try:
        return _READERS[kind](closure)
    except KeyError:  # another version's closure
        return None


def _conjunction(closure: dict[str, Any]) -> tuple[Part, ...] | None:
    found = [parts_of(each) for each in closure["mask_functions"]]
    return None if None in found else tuple(part for parts in found for part in parts or ())


def _remapped(closure: dict[str, Any]) -> tuple[Part, ...] | None:
    inner, positions = parts_of(closure["mask_function"]), closure["position_ids"]
    if inner is None or any(part.kind == "documents" or part.positions is not None for part in inner):
        return None
    return tuple(part._replace(positions=positions) for part in inner)


_READERS: dict[str, Callable[[dict[str, Any]], tuple[Part, ...] | None]] = {
    "all": lambda _: (),
    "causal": lambda _: (Part("band", (None, 0)),),
    "window": lambda closure: (Part("band", (closure["sliding_window"] - 1, None)),),
    "around": lambda closure: (Part("band", (closure["sliding_window"], closure["sliding_window"])),),
    "chunk": lambda closure: (Part("chunk", (closure["chunk_size"], closure["left_padding"])),),
    "documents": lambda closure: (Part("documents", (closure["packed_sequence_mask"],)),),
    "and": _conjunction,
    "remapped": _remapped,
}


@cache
def _known() -> dict[CodeType, str]:
    """The code of each mask function of transformers that is read here."""
    from transformers import masking_utils as masks

    made = {
        "all": masks.bidirectional_mask_function,
        "causal": masks.causal_mask_function,
        "window": masks.sliding_window_overlay(1),
        "around": masks.sliding_window_bidirectional_overlay(1),
        "chunk": masks.chunked_overlay(1, None),
        "documents": masks.packed_sequence_mask_function(None),
        "and": masks.and_masks(),
    }
    if hasattr(masks, "remap_positions_for_packed_sequence"):  # not in 5.17
        made["remapped"] = masks.remap_positions_for_packed_sequence(None, None)
    return {function.__code__: kind for kind, function in made.items()}


def _is_causal(parts: tuple[Part, ...], keys: int) -> bool:
    """Whether a query sees exactly what is not after it."""
    if any(part.kind != "band" or part.positions is not None for part in parts):
        return False
    lefts = [part.values[0] for part in parts if part.values[0] is not None]
    rights = [part.values[1] for part in parts if part.values[1] is not None]
    return bool(rights) and min(rights) == 0 and min(lefts, default=keys) >= keys - 1


def _bounds(parts: tuple[Part, ...], query: Tensor) -> tuple[Tensor, Tensor]:
    """start and stop, int64 (1 or batch, queries), of queries at the indices (1, queries)."""
    far = torch.iinfo(torch.int32).max
    start, stop = torch.zeros_like(query), torch.full_like(query, far)
    for part in parts:
        shift: Tensor | int = 0
        at = query
        if part.positions is not None:
            at = part.positions[:, query[0]]
            shift = query - at
        first, end = _edges(part, at)
        start = start if first is None else torch.maximum(start, first + shift)
        stop = stop if end is None else torch.minimum(stop, end + shift)
    return start, stop


def _edges(part: Part, at: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if part.kind == "band":
        left, right = part.values
        return None if left is None else at - left, None if right is None else at + right + 1
    if part.kind == "chunk":
        size, padding = part.values[0], part.values[1][:, None]
        first = (at - padding) // size * size + padding
        return first, first + size
    own = packed_by_index(part.values[0], causal=False)
    return own.start, own.stop


def _seen_keys(attention_mask: Tensor | None, keys: int, offset: int | Tensor) -> Tensor | None:
    """bool (batch, keys) of the 2-D mask of all tokens, False past its end; None where it is known to hide nothing."""
    if attention_mask is None:
        return None
    from transformers.masking_utils import prepare_padding_mask

    padded: Tensor = prepare_padding_mask(attention_mask, keys, offset)
    seen = padded[:, torch.arange(keys, device=padded.device) + offset] if padded.shape[1] != keys else padded
    if not torch.compiler.is_compiling() and bool(seen.all()):
        return None
    return seen
