"""An embedding of which some tokens are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Forward, Inputs, OpCase
from .making import Numbers, by_name, floors, peft_layer
from .models import BERT_BASE, LLAMA_8B, QWEN3_600M, Shape
from .peers import compiled


def cases(device: str, depth: str) -> Iterator[OpCase]:
    """256 tokens in fp32 on a CPU, where PEFT takes seconds for large models; 8192 in bf16 on a GPU."""
    tokens, dtype = (256, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    yield case(BERT_BASE, tokens, 16, dtype)
    if device == "cuda" and depth != "quick":
        yield case(QWEN3_600M, tokens, 16, dtype)
        yield from (case(LLAMA_8B, tokens, count, dtype) for count in (16, 500))


def case(shape: Shape, tokens: int, trained: int, dtype: torch.dtype) -> OpCase:
    """The rows of ids (tokens,), a quarter of which are among the last `trained` words, whose rows are others.

    Floor: forward reads ids and as many rows, and writes them; backward reads ids and dy of a quarter of them, and
    writes the gradient of (trained, hidden).
    """

    def make(device: str, dtype_: torch.dtype, seed: int) -> Inputs:
        numbers = Numbers(device, dtype_, dtype, seed)
        weight = numbers.normal(shape.vocab, shape.hidden)
        rows = nn.Parameter(numbers.normal(trained, shape.hidden))
        last = shape.vocab - trained + numbers.integers(trained, tokens)
        ids = torch.where(numbers.integers(4, tokens) == 0, last, numbers.integers(shape.vocab - trained, tokens))
        return Inputs({"weight": weight, "ids": ids, "rows": rows}, (rows,), (numbers.normal(tokens, shape.hidden),))

    looked_up, given = tokens * shape.hidden * dtype.itemsize, 8 * tokens
    gradient = trained * shape.hidden * dtype.itemsize
    return OpCase(
        op="tokens",
        name=f"{shape.name}, {tokens} tokens, {trained} trained",
        dtype=dtype,
        make=make,
        floors=floors((0.0, 0.0), given + looked_up, looked_up, given, gradient, looked_up / 4),
        reference=by_name(_plain),
        peers={"fastpeft": by_name(_fastpeft), "peft": _peft, "torch.compile": compiled(by_name(_plain))},
        settings={"model": shape.name, "tokens": tokens, "trained": trained},
    )


def _plain(weight: Tensor, ids: Tensor, rows: Tensor) -> Sequence[Tensor]:
    index = torch.arange(weight.shape[0] - rows.shape[0], weight.shape[0], device=weight.device)
    return (F.embedding(ids, weight.index_copy(0, index, rows)),)


def _fastpeft(weight: Tensor, ids: Tensor, rows: Tensor) -> Sequence[Tensor]:
    from fastpeft_kernels.tokens import token_embedding

    return (token_embedding(ids, weight, rows, tuple(range(weight.shape[0] - rows.shape[0], weight.shape[0]))),)


def _peft(inputs: Inputs) -> Forward:
    tensors = inputs.tensors
    weight, rows = tensors["weight"], tensors["rows"]
    last = list(range(weight.shape[0] - rows.shape[0], weight.shape[0]))
    layer = peft_layer(nn.Embedding.from_pretrained(weight), "TrainableTokensConfig", token_indices=last)
    layer.trainable_tokens_delta["default"] = rows
    return lambda: (layer(tensors["ids"]),)
