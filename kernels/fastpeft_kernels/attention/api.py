"""The public function."""

from __future__ import annotations

from torch import Tensor

from .masks import Mask
from .reference import attention_reference
from .scores import Scores

BACKENDS = ("auto", "reference")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    relative: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q kT) v with all that models do to it.

    Args:
        q: (batch, heads, queries, features), any strides.
        k, v: (batch, kv_heads, keys, features) and (..., v_features); heads is a multiple of kv_heads.
        mask: which keys each query sees; all by default.
        scale: 1 / sqrt(features) by default.
        softcap, relative, bias, sinks, dropout, seed: see `Scores`; a seed is drawn where dropout needs one.
        return_lse: also give the logarithm of the sum of the exponentials, without a gradient.
        deterministic: the same bits in every backward; may be slower.
        backend: "auto", or one by name, which then serves or raises.

    Returns:
        (batch, heads, queries, v_features), laid out so that `.transpose(1, 2)` is contiguous; with `return_lse` also
        (batch, heads, queries) in fp32. Gradients flow to q, k, v, relative, bias and sinks.
    """
    scores = Scores(q.shape[-1] ** -0.5 if scale is None else scale, softcap, relative, bias, sinks, dropout, seed)
    out, lse = attention_reference(q, k, v, mask or Mask(), scores)
    return (out, lse.detach()) if return_lse else out
