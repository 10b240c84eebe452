"""What is predicted where memory runs out for a model that sees or hears: the step of what it was given."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpeft
from fastpeft import LayerPolicy, MemoryPolicy
from fastpeft.memory.exhaustion.out_of_memory import LastCall, OutOfMemory
from fastpeft.memory.plan.given import Given, given_of
from fastpeft.memory.plan.media import Pictures
from fastpeft.memory.plan.predicting import Model
from tests.memory.exhaustion.exhausted import SAID
from tests.memory.plan.seeing import Both, measured, valued

WITHIN = 0.05
KEEP, RECOMPUTE = LayerPolicy(), LayerPolicy("recompute")
CASES: dict[str, tuple[Pictures | None, int, float | None]] = {
    "qwen2_5_vl": (Pictures(2, (112, 168)), 160, None),
    "llava": (Pictures(1), 160, None),
    "smolvlm": (Pictures(1), 160, None),
    "whisper": (None, 64, None),
    "wav2vec2": (None, 1, 2.0),
}
HELD_OUT: dict[str, tuple[Pictures | None, int, float | None]] = {
    "qwen3_vl": (Pictures(2, (128, 192)), 160, None),
    "speech_to_text": (None, 64, 4.0),
}
"""Looked at only when all else was finished."""


@cache
def both(name: str) -> tuple[Any, dict[str, Tensor], Given]:
    """A model, a batch, and what is noted of its call."""
    pictures, tokens, seconds = (CASES | HELD_OUT)[name]
    found = Both(name, pictures, 2, tokens, seconds)
    batches = found.predicted.batches
    given = {each: valued(tensor) for each, tensor in batches.of(2, tokens, 2 * batches.pictures).items()}
    noted = given_of(given)
    assert noted is not None
    return found, given, noted


def ratio(name: str, policy: LayerPolicy) -> float:
    found, given, noted = both(name)
    return told_to_measured(found, given, noted, policy)


def told_to_measured(found: Any, given: dict[str, Tensor], noted: Given, policy: LayerPolicy) -> float:
    known = found.predicted.setting
    setting = type(known)(**vars(known) | {"pictures": None, "seconds": None, "given": noted})
    model = Model(setting)
    layers = MemoryPolicy(policy).of(len(model.skeleton.order))
    told = model.peak(layers, *noted.size).size
    return told / measured(found.model, given, policy)


def test_peak_of_what_was_given() -> None:
    assert abs(ratio("qwen2_5_vl", RECOMPUTE) - 1) <= WITHIN


@pytest.mark.full
@pytest.mark.parametrize("policy", [KEEP, RECOMPUTE], ids=["keep", "recompute"])
@pytest.mark.parametrize("name", [*CASES, *HELD_OUT])
def test_every_peak(name: str, policy: LayerPolicy) -> None:
    assert abs(ratio(name, policy) - 1) <= WITHIN


def different(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of Qwen-VL with one picture each, of different sizes."""
    grids = torch.tensor([[1, 8, 12], [1, 4, 6]])
    ids = torch.ones_like(given["input_ids"])
    for row, count in enumerate((24, 6)):
        ids[row, 1 : 1 + count] = int(given["input_ids"].max())
    pixels = torch.rand(8 * 12 + 4 * 6, given["pixel_values"].shape[1])
    made = {"input_ids": ids, "labels": ids, "pixel_values": pixels, "image_grid_thw": grids}
    return given | made | {"mm_token_type_ids": (ids == ids.max()).long()}


def test_pictures_of_different_sizes() -> None:
    found, given, _ = both("qwen2_5_vl")
    given = different(given)
    noted = given_of(given)
    assert noted is not None and noted.size == (2, 160)
    assert abs(told_to_measured(found, given, noted, KEEP) - 1) <= WITHIN


def test_what_is_said() -> None:
    """The table has the pictures' bytes; rows are not cut, since that would cut pictures."""
    found, given, _ = both("qwen2_5_vl")
    given = different(given)
    model = fastpeft.accelerate(found.model, memory=KEEP)
    with pytest.raises(OutOfMemory) as caught, fastpeft.explain_out_of_memory(model):
        model(**given)
        raise torch.OutOfMemoryError(SAID)
    said = str(caught.value)
    assert "memory ran out in a training step of 2 rows of 160 tokens" in said and "no prediction" not in said
    assert "\n  pictures " in said and "\n  total " in said
    assert caught.value.changes[0].startswith("batch 1 rather than 2") and "shorter rows" not in said


def test_a_call_is_noted() -> None:
    found, given, _ = both("qwen2_5_vl")
    with LastCall(found.model) as calls, torch.no_grad():
        found.model(**given)
    assert calls.seen.given is not None and calls.seen.rows == 2 and not calls.seen.trained
    assert calls.seen.given.media == {"pixel_values": (given["pixel_values"].shape, torch.float32)}
    heard = given_of({"input_values": torch.empty(3, 90), "labels": torch.zeros(3), "attention_mask": torch.ones(3, 9)})
    assert heard is not None and heard.hears and heard.size == (3, 1) and not heard.numbers
    assert given_of({"input_ids": torch.zeros(2, 3)}) is None


def test_calls_of_other_shapes_go_on() -> None:
    """Nothing is noted of them, and nothing fails."""
    for arguments in (
        {"input_ids": torch.zeros(6, dtype=torch.int64), "pixel_values": torch.rand(1, 3, 8, 8)},
        {"input_values": torch.tensor(0.5)},
        {"input_ids": torch.rand(2, 3), "pixel_values": torch.rand(1, 3, 8, 8)},
    ):
        assert given_of(arguments) is None
        with LastCall(Identity()) as calls:
            calls.model(**arguments)
        assert calls.seen.given is None and calls.seen.rows is None


def test_what_is_noted_of_odd_calls() -> None:
    ids, pixels = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with LastCall(Identity()) as calls:
        calls.model(ids, pixel_values=pixels)
    assert calls.seen.given is not None and set(calls.seen.given.numbers) == {"input_ids"}  # not the pictures
    assert (calls.seen.rows, calls.seen.tokens) == (2, 5)
    heard = given_of({"input_features": torch.rand(2, 80, 30), "decoder_input_ids": ids})
    assert heard is not None and heard.size == (2, 5)
    seen = given_of({"pixel_values": torch.rand(4, 3, 8, 8), "labels": torch.zeros(4)})
    assert seen is not None and seen.written is None and seen.size == (4, 1)


def test_pictures_alone_have_no_tokens() -> None:
    """In what is said of them."""
    model = Identity()
    with pytest.raises(OutOfMemory) as caught, fastpeft.explain_out_of_memory(model):
        model(pixel_values=torch.rand(4, 3, 8, 8))
        raise torch.OutOfMemoryError(SAID)
    assert "in a training step of 4 rows\n" in str(caught.value)
    assert caught.value.changes[-1] == "fewer pictures a row, or smaller ones"


class Identity(torch.nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> None:
        pass
