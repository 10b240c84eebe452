"""The definition: what the names mean, beside what others have under these names."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fastpeft_kernels.attention.masks import Mask
from fastpeft_kernels.attention.reference import attention_reference
from fastpeft_kernels.attention.scores import Scores

from .drawn import make_case


@pytest.mark.parametrize("causal", (True, False))
def test_as_pytorch(causal: bool) -> None:
    case = make_case(queries=9, keys=9, dtype=torch.float64, mask=Mask(right=0) if causal else None)
    out, lse = attention_reference(case.q, case.k, case.v, case.mask, case.scores)
    want = scaled_dot_product_attention(case.q, case.k, case.v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(out, want)
    score = case.q @ case.k.repeat_interleave(2, 1).mT * case.scores.scale
    if causal:
        score = score.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(lse, score.logsumexp(-1))


@pytest.mark.parametrize("model", ("gpt_oss", "gemma2", "t5"))
def test_as_eager_attention_of_transformers(model: str) -> None:
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    extras = {"gpt_oss": ["sinks"], "gemma2": ["softcap"], "t5": ["bias"]}[model]
    case = make_case(queries=7, keys=7, mask=Mask(left=3, right=0), extras=extras)
    module = torch.nn.Module().eval()
    module.num_key_value_groups, module.sinks = 2, case.scores.sinks
    distance = torch.arange(7)[:, None] - torch.arange(7)
    mask = torch.zeros(7, 7).masked_fill((distance < 0) | (distance > 3), torch.finfo(torch.float32).min)[None, None]
    more = {"softcap": case.scores.softcap} if model == "gemma2" else {}
    if model == "t5":
        case = make_case(queries=7, keys=7, kv_heads=4, mask=Mask(left=3, right=0), extras=extras)
        more = {"position_bias": case.scores.bias}
    want, _ = modeling.eager_attention_forward(
        module, case.q, case.k, case.v, mask, scaling=case.scores.scale, dropout=0.0, **more
    )
    out, _ = attention_reference(case.q, case.k, case.v, case.mask, case.scores)
    torch.testing.assert_close(out.transpose(1, 2), want)


def test_relative_is_added_by_distance() -> None:
    case = make_case(batch=1, heads=2, kv_heads=2, queries=3, keys=5, extras=["relative"], dtype=torch.float64)
    relative = case.scores.relative
    bias = torch.stack([relative[:, k - q + 2] for q in range(3) for k in range(5)], 1).view(2, 3, 5)
    want, _ = attention_reference(case.q, case.k, case.v, Mask(), Scores(case.scores.scale, bias=bias))
    out, _ = attention_reference(case.q, case.k, case.v, Mask(), case.scores)
    torch.testing.assert_close(out, want)


def test_a_query_that_sees_nothing() -> None:
    case = make_case(mask=Mask(keys=torch.tensor([[True] * 23, [False] * 23])), extras=["softcap"])
    out, lse = attention_reference(case.q, case.k, case.v, case.mask, case.scores)
    assert not out[1].any() and (lse[1] == -math.inf).all()
    grads = torch.autograd.grad(out.square().sum(), (case.q, case.k, case.v))
    assert all(grad[0].any() and not grad[1].any() for grad in grads)


@pytest.mark.parametrize("extras", ([], ["softcap", "relative", "bias", "sinks"], ["dropout"]))
def test_gradcheck(extras: list[str]) -> None:
    sizes = {"batch": 1, "heads": 2, "kv_heads": 1, "queries": 3, "keys": 4, "features": 3}
    case = make_case(**sizes, dtype=torch.float64, mask=Mask(right=0), extras=extras)
    names = list(case.inputs())

    def out(*tensors: torch.Tensor) -> torch.Tensor:
        named = dict(zip(names, tensors, strict=True))
        q, k, v = (named.pop(name) for name in ("q", "k", "v"))
        return attention_reference(q, k, v, case.mask, replace(case.scores, **named))[0]

    torch.autograd.gradcheck(out, tuple(case.inputs().values()))


def test_dropout_keeps_the_expected_share() -> None:
    case = make_case(queries=64, keys=64, extras=["dropout"])
    eye = torch.eye(64).expand(2, 2, 64, 64)
    weights, _ = attention_reference(case.q * 0, case.k, eye, Mask(), case.scores)
    assert abs((weights == 0).float().mean() - 0.3) < 0.02
    torch.testing.assert_close(weights[weights != 0].unique(), torch.tensor([1 / 64 / 0.7]))
    assert not torch.equal(weights[0, 0], weights[0, 1]) and not torch.equal(weights[0, 0], weights[1, 0])
