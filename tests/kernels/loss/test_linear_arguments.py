"""What `linear_cross_entropy` refuses, and with which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastpeft_kernels.loss import Head, linear_cross_entropy
from fastpeft_kernels.weights import DenseWeight

HIDDEN, WEIGHT, LABELS = torch.randn(2, 3, 8), torch.randn(9, 8), torch.zeros(2, 3, dtype=torch.int64)
S, B = torch.randn(2, 3, 4), torch.randn(9, 4)


def bad(message: str, kind: type[Exception] = ValueError, **changed: Any) -> Any:
    return pytest.param(kind, message, changed, id=message[:40])


@pytest.mark.parametrize(
    "kind, message, changed",
    (
        bad("hidden: expected a floating tensor, got torch.int64", TypeError, hidden=LABELS),
        bad("hidden: expected one of", TypeError, hidden=HIDDEN.to(torch.float8_e4m3fn)),
        bad(r"hidden: expected shape \(..., hidden_size\), got \(\)", hidden=torch.tensor(1.0)),
        bad("head: expected a Head, got Tensor", TypeError, head=WEIGHT),
        bad("head.weight: expected a FrozenWeight or Tensor, got list", TypeError, head=Head([1.0])),  # type: ignore
        bad("head.weight: expected a floating tensor", TypeError, head=Head(torch.zeros(9, 8, dtype=torch.int8))),
        bad(r"head.weight: expected shape \(words, 8\)", head=Head(WEIGHT.t())),
        bad(r"words >= 1, got \(0, 8\)", head=Head(WEIGHT[:0])),
        bad("head.weight: expected a tensor on cpu like hidden, got meta", head=Head(WEIGHT.to("meta"))),
        bad(r"head.bias: expected shape \(9,\), got \(8,\)", head=Head(WEIGHT, WEIGHT[0])),
        bad("head.s, head.b: expected both or neither, got one", head=Head(WEIGHT, s=S)),
        bad(r"head.s: expected shape \(2, 3, 4\), got \(2, 4\)", head=Head(WEIGHT, s=S[:, 0], b=B)),
        bad(r"head.b: expected shape \(9, 4\), got \(8, 4\)", head=Head(WEIGHT, s=S, b=B[1:])),
        bad("head.scale: expected a number, got str", TypeError, head=Head(WEIGHT, scale="1")),  # type: ignore
        bad("head.softcap: expected a number > 0 or None, got 0", head=Head(WEIGHT, softcap=0)),
        bad("labels: expected torch.int64, got torch.int32", TypeError, labels=LABELS.int()),
        bad(r"labels: expected shape \(2, 3\), got \(6,\)", labels=LABELS.flatten()),
        bad(r"labels: expected ignore_index \(-100\) or 0 <= label < 9, got 9", labels=LABELS + 9),
        bad(r"labels: expected ignore_index \(-1\) or 0 <= label < 9, got -100", labels=LABELS - 100, ignore_index=-1),
        bad("label_smoothing: expected 0 <= label_smoothing <= 1, got 1.5", label_smoothing=1.5),
        bad("z_loss: expected a number >= 0, got -1", z_loss=-1),
        bad("z_loss: expected a number >= 0, got nan", z_loss=float("nan")),
        bad("class_weight: expected shape", class_weight=torch.ones(8)),
        bad("class_weight: expected a tensor without gradient", class_weight=torch.ones(9, requires_grad=True)),
        bad("token_weight: expected shape", token_weight=torch.ones(2)),
        bad("token_weight: expected a floating dtype", TypeError, token_weight=LABELS),
        bad("reduction: expected one of", reduction="average"),
        bad('num_items: expected None with reduction "sum", got 3', reduction="sum", num_items=3),
        bad("num_items: expected a number or a 0-d tensor", num_items=torch.ones(2)),
        bad("num_items: expected a int or float or Tensor, got str", TypeError, num_items="3"),
        bad(
            "mean_logits: expected no class_weight beside label_smoothing, got one",
            mean_logits=True,
            label_smoothing=0.1,
            class_weight=torch.ones(9),
        ),
    ),
)
def test_refused(kind: type[Exception], message: str, changed: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"hidden": HIDDEN, "head": Head(DenseWeight(WEIGHT)), "labels": LABELS, **changed}
    with pytest.raises(kind, match=message):
        linear_cross_entropy(**arguments)
