"""Losses row by row are those of the model itself."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fastpeft.metrics.language import Losses, losses
from tests.checkpoints import Checkpoints

LENGTHS = (5, 9, 3, 9, 7)


def padded(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    def pad(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)

    ids = [example["input_ids"] for example in examples]
    ones = [[1] * len(row) for row in ids]
    return {"input_ids": pad(ids, 0), "labels": pad(ids, -100), "attention_mask": pad(ones, 0)}


def test_they_are_the_models_own(checkpoints: Checkpoints) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints["llama"]).train()
    ids = [torch.randint(5, 900, (length,)).tolist() for length in LENGTHS]
    rows = datasets.Dataset.from_dict({"input_ids": ids})
    state = torch.get_rng_state()
    found = losses(model, rows, padded, 2, shifted=True, computing=contextlib.nullcontext)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert found.tokens.tolist() == [length - 1 for length in LENGTHS]
    with torch.no_grad():
        own = [float(model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss) for row in ids]
    np.testing.assert_allclose(found.sums / found.tokens, own, rtol=1e-5)


def of(*sums: float, tokens: int = 10) -> Losses:
    return Losses(np.asarray(sums), np.full(len(sums), tokens))


def test_perplexity_is_of_tokens_not_of_rows() -> None:
    found = Losses(np.asarray([10.0, 10.0]), np.asarray([10, 30]))
    assert found.loss().value == pytest.approx(0.5)
    assert found.perplexity().value == pytest.approx(math.exp(0.5))
    assert found.perplexity().low == pytest.approx(math.exp(1 / 3))
    assert found.perplexity().high == pytest.approx(math.e)


def test_each_row_is_compared_with_itself() -> None:
    before = of(10, 20, 30, 40, 50)
    change = of(11, 21, 31, 41, 51).since(before)
    assert change == pytest.approx((0.1, 0.1, 0.1))
    assert before.loss().high - before.loss().low > 1  # which another draw of rows would have hidden it in


def test_a_loss_beyond_floats_is_no_error() -> None:
    assert math.isfinite(of(1e6).perplexity().value)
