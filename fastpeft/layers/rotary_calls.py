"""How models' functions take what they turn: queries and keys, or one of them, tables or complex numbers, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

NO_CALL = "called otherwise than it was tried"
_DIMENSION = "unsqueeze_dim"
"""By this name functions are told where the tables' dimension of heads goes: 2 if tokens come before heads, else 1."""


class Turned(NamedTuple):
    """The tensors of a call as the op takes them, and how to give back what it makes of them."""

    q: Tensor
    k: Tensor | None
    cos: Tensor
    sin: Tensor
    back: Callable[[Tensor, Tensor | None], Any]


class Convention(NamedTuple):
    """How a function takes its arguments.

    Attributes:
        alone: one tensor in place of q and k.
        tables: "cos, sin", "sin, cos", or "complex" for cos + i sin in one.
        tokens_first: whether tokens come before heads; None: `unsqueeze_dim` may say so.
        batched: whether there is a dimension of rows before these.
    """

    alone: bool = False
    tables: str = "cos, sin"
    tokens_first: bool | None = None
    batched: bool = True

    @property
    def arguments(self) -> int:
        """How many tensors it takes."""
        return (1 if self.alone else 2) + (1 if self.tables == "complex" else 2)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Turned | str:
        """The call's tensors, as views; or why they are none."""
        tokens_first = self._tokens_first(kwargs)
        if len(args) != self.arguments or tokens_first is None:
            return NO_CALL
        for x in args:
            if type(x) is not Tensor:
                return f"an input of type {type(x).__name__}"
        turned, tables = args[: 1 if self.alone else 2], args[1 if self.alone else 2 :]
        if self.tables == "complex":
            if not tables[0].is_complex():
                return NO_CALL
            tables = (tables[0].real, tables[0].imag)
        elif any([x.is_complex() for x in tables]):
            return NO_CALL
        dimensions = 4 if self.batched else 3
        if [x.dim() for x in (*turned, *tables)] != [dimensions] * len(turned) + [dimensions - 1] * 2:
            return f"inputs of shapes {', '.join(str(tuple(x.shape)) for x in args)}"
        cos, sin = reversed(tables) if self.tables == "sin, cos" else tables

        def there(x: Tensor) -> Tensor:
            x = x if self.batched else x.unsqueeze(0)
            return x.transpose(1, 2) if tokens_first else x

        def back(q: Tensor, k: Tensor | None) -> Any:
            made = [x.transpose(1, 2) if tokens_first else x for x in (q, k) if x is not None]
            made = made if self.batched else [x.squeeze(0) for x in made]
            return made[0] if self.alone else tuple(made)

        if not self.batched:
            cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
        return Turned(there(turned[0]), None if self.alone else there(turned[1]), cos, sin, back)

    def _tokens_first(self, kwargs: Mapping[str, Any]) -> bool | None:
        """None for a call with other names than it was tried with."""
        if self.tokens_first is not None:
            return None if kwargs else self.tokens_first
        if not kwargs.keys() <= {_DIMENSION}:
            return None
        return {1: False, 2: True}.get(kwargs.get(_DIMENSION, 1))

    def ways(self) -> list[dict[str, int]]:
        """What is passed by name, each to be tried."""
        return [{}, {_DIMENSION: 2}] if self.tokens_first is None else [{}]


CONVENTIONS = (
    Convention(),
    Convention(tokens_first=False),
    Convention(tokens_first=True, batched=False),
    Convention(alone=True),
    Convention(alone=True, tables="sin, cos", tokens_first=True),
    Convention(tables="complex", tokens_first=False),
    Convention(tables="complex", tokens_first=True),
)
"""Those of transformers' files: most; without `unsqueeze_dim`; Qwen2-VL's pictures; Gemma 3n; GPT-J; DeepSeek V2;
Llama 4."""
