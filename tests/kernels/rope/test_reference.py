"""The definition: its gradients, and what transformers' functions compute, to the bit."""

from __future__ import annotations

import importlib

import pytest
import torch

from fastpeft_kernels.rope import ANGLES, LAYOUTS, rotary
from fastpeft_kernels.rope.reference import rotary_reference
from fastpeft_kernels.rope.rotation import Rotation


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("angles", ANGLES)
def test_gradcheck(layout: str, angles: str) -> None:
    q, k = (torch.randn(2, heads, 3, 6, dtype=torch.float64, requires_grad=True) for heads in (3, 1))
    cos, sin = (torch.randn(1, 3, 2 if angles == "half" else 4, dtype=torch.float64) for _ in range(2))
    rotation = Rotation(layout, angles, torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: rotary_reference(q, k, cos, sin, rotation), (q, k))
    assert torch.autograd.gradcheck(lambda q: rotary_reference(q, None, cos, sin, rotation)[0], (q,))


@pytest.mark.parametrize(
    ("model", "layout", "angles", "features", "like_q"),
    [
        ("llama", "halved", "each", 16, False),
        ("gpt_neox", "halved", "each", 8, False),
        ("phi3", "halved", "each", 16, False),
        ("cohere", "interleaved", "each", 16, True),
        ("glm", "interleaved", "pairs", 8, False),
        ("gpt_oss", "halved", "half", 8, False),
        ("deepseek_v3", "separated", "pairs", 16, False),
    ],
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_bits_of_transformers(
    model: str, layout: str, angles: str, features: int, like_q: bool, dtype: torch.dtype
) -> None:
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    function = getattr(module, "apply_rotary_pos_emb_interleave", module.apply_rotary_pos_emb)
    q, k = (torch.randn(2, 5, heads, 16).to(dtype).transpose(1, 2) for heads in (4, 2))
    for table in (dtype, torch.float32):
        cos, sin = (torch.randn(2, 5, features).to(table) for _ in range(2))
        theirs = function(q, k, cos, sin)
        ours = rotary(q, k, cos, sin, layout=layout, angles=angles, dtype=dtype if like_q else None, backend="torch")
        if like_q and dtype != torch.float32:  # it computes in fp32
            torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
        else:
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_turn_keeps_lengths() -> None:
    angle = torch.randn(1, 7, 4)
    for layout in LAYOUTS:
        q, k = torch.randn(2, 3, 7, 8), torch.randn(2, 1, 7, 8)
        both = angle.repeat_interleave(2, -1) if layout == "interleaved" else torch.cat([angle, angle], -1)
        for x, y in zip((q, k), rotary(q, k, both.cos(), both.sin(), layout=layout), strict=True):
            torch.testing.assert_close(x.norm(dim=-1), y.norm(dim=-1))


def test_the_module_is_found() -> None:
    assert importlib.import_module("fastpeft_kernels.rope").rotary is rotary
