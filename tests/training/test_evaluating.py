"""Losses row by row are those of the model itself; which tokens of a row are the answer that is generated anew."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fastpeft.data.encoded import Encoded
from fastpeft.training.evaluating import exchange, token_losses
from tests.checkpoints import Checkpoints

LEFT = -100


@pytest.mark.parametrize(
    ("labels", "prompt", "answer"),
    [
        ([LEFT, LEFT, 3, 4], [1, 2], [3, 4]),
        ([LEFT, 2, LEFT, 4], [1, 2, 3], [4]),  # a chat's last turn
        ([LEFT, 2, 3, LEFT], [1], [2, 3]),  # what a template writes behind it
    ],
)
def test_the_last_answer_and_what_comes_before(labels: list[int], prompt: list[int], answer: list[int]) -> None:
    assert exchange({"input_ids": [1, 2, 3, 4], "labels": labels}, "causal-lm") == (prompt, answer)


def test_a_text_has_none() -> None:
    assert exchange({"input_ids": [1, 2], "labels": [1, 2]}, "causal-lm") is None


def test_an_encoder_decoder_has_both_apart() -> None:
    assert exchange({"input_ids": [1, 2], "labels": [7, 8]}, "seq2seq-lm") == ([1, 2], [7, 8])


@pytest.mark.parametrize("virtual", [0, 3])
def test_losses_are_the_models_own(checkpoints: Checkpoints, virtual: int) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoints["llama"])
    if virtual:
        model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual))
    model.train()
    ids = [torch.randint(5, 900, (length,)).tolist() for length in (5, 9, 3, 9, 7)]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
    encoded = Encoded(rows, 0, 0, 33, (False,) * 5, rows, tuple(range(1, 6)))
    prepared: Any = SimpleNamespace(config=SimpleNamespace(model=SimpleNamespace(task="causal-lm", dtype="float32")))
    trainer = SimpleNamespace(model=model, args=SimpleNamespace(per_device_eval_batch_size=2))
    state = torch.get_rng_state()
    found = token_losses(prepared, trainer, encoded)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert found.tokens.tolist() == [4, 8, 2, 8, 6] and found.right.max() <= 8
    with torch.no_grad():
        learned = [[-100, *row[1:]] if virtual else row for row in ids]  # the first would follow the prompt
        own = [
            float(model(input_ids=torch.tensor([row]), labels=torch.tensor([labels])).loss)
            for row, labels in zip(ids, learned, strict=True)
        ]
    np.testing.assert_allclose(found.sums / found.tokens, own, rtol=1e-5)
