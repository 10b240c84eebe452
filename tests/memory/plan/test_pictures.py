"""Plans for models that see: what a step takes with pictures in its rows."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, LlamaConfig, Qwen2_5_VLConfig

import fastpeft
from fastpeft.errors import UserError
from fastpeft.memory.plan.choosing import CONTEXT, need
from fastpeft.memory.plan.largest import largest_of
from fastpeft.memory.plan.media import Pictures, _shaped, parse_image_size, pictures_of, pixels
from fastpeft.memory.plan.timing import Rates
from fastpeft.memory.policy import LayerPolicy, MemoryPolicy
from tests.commands import run

from .seeing import Both, config, predicted

WITHIN = 0.05
KEEP, RECOMPUTE = LayerPolicy(), LayerPolicy("recompute")
CASES: dict[str, tuple[Pictures, int]] = {
    "qwen2_5_vl": (Pictures(3, (112, 168)), 160),
    "qwen2_vl": (Pictures(2, (168, 84)), 160),
    "llava": (Pictures(1), 160),
    "gemma3": (Pictures(2), 160),
    "smolvlm": (Pictures(1), 160),
    "idefics3": (Pictures(2, (64, 128)), 160),
    "paligemma": (Pictures(1), 160),
    "internvl": (Pictures(1, (224, 336)), 200),
    "llava_next": (Pictures(1, (200, 150)), 480),
    "mistral3": (Pictures(1, (112, 84)), 160),
}
HELD_OUT: dict[str, tuple[Pictures, int]] = {
    "qwen3_vl": (Pictures(2, (128, 192)), 160),
    "llava_onevision": (Pictures(1, (200, 150)), 480),
}
"""Looked at only when all else was finished."""
OPTIONS: dict[str, Any] = {"gpu_memory": "2GiB", "method": "lora", "rank": 4, "largest": False}


@cache
def both(name: str) -> Both:
    pictures, tokens = (CASES | HELD_OUT)[name]
    return Both(name, pictures, 2, tokens)


def test_peak() -> None:
    """Six pictures, told from one and two."""
    assert abs(both("qwen2_5_vl").ratio(RECOMPUTE) - 1) <= WITHIN


@pytest.mark.full
@pytest.mark.parametrize("policy", ["keep", "selective", "recompute", "offload"])
@pytest.mark.parametrize("name", [*CASES, *HELD_OUT])
def test_every_peak(name: str, policy: Any) -> None:
    assert abs(both(name).ratio(LayerPolicy(policy)) - 1) <= WITHIN


@pytest.mark.full
def test_many_pictures_take_what_is_told_from_two() -> None:
    """Beside a model of which every layer is traced, with all its pictures; with layers that do not all do the same."""
    told = predicted(config("qwen2_5_vl"), Pictures(3, (112, 168)), 2, 160)
    whole = predicted(config("qwen2_5_vl"), Pictures(3, (112, 168)), 2, 160, whole=True)
    mixed = (RECOMPUTE,) * 8 + (KEEP,) * 4
    whole._warm(mixed, 160)
    whole._traces[2, 160, mixed] = whole._trace(mixed, 2, 160, 6)
    for each in (KEEP, RECOMPUTE):
        whole._traces[2, 160, (each,) * 12] = whole._trace((each,) * 12, 2, 160, 6)
    for policies in ((KEEP,) * 12, (RECOMPUTE,) * 12, mixed):
        assert told.peak(policies, 2, 160).size == pytest.approx(whole.peak(policies, 2, 160).size, rel=0.01)


def test_a_plan_with_pictures() -> None:
    """Their tokens are among the row's; layers that see are counted by what they see."""
    offload = MemoryPolicy(LayerPolicy("offload"))
    plan = fastpeft.plan(config("llava"), seq=128, images=1, policy=offload, **OPTIONS)
    assert plan.settings["task"] == "image-text-to-text" and plan.settings["image_tokens"] == 64
    assert plan.bytes["pictures"] == 3 * 112 * 112 * 4
    assert plan.bytes["host"] == 2 * (6 * 65 * 128 + 6 * 128 * 256)
    assert "layers 0-5 are those that see the pictures" in str(plan)
    parts = [size for name, size in plan.bytes.items() if name not in ("total", "host") and "of it" not in name]
    assert sum(parts) == plan.bytes["total"]


@pytest.mark.full
def test_rows_of_text_alone() -> None:
    plan = fastpeft.plan(config("llava"), seq=128, **OPTIONS)
    assert plan.settings["task"] == "image-text-to-text" and "pictures" not in plan.bytes
    assert "rows of text alone" in str(plan)


@pytest.mark.full
def test_the_longest_rows_and_the_most_of_them() -> None:
    """Rows bring their pictures along: they are not told from tokens."""
    model = predicted(config("llava"), Pictures(1), 1, 96)

    def total(rows: int, tokens: int) -> int:
        return need(model, MemoryPolicy(RECOMPUTE), rows, tokens, capacity, Rates()).total

    capacity = CONTEXT + (300 << 20)
    tokens, rows = largest_of(model, (RECOMPUTE,), capacity, None)
    assert total(1, tokens) <= capacity and total(rows, 96) <= capacity < total(rows + 1, 96)
    assert largest_of(model, (RECOMPUTE,), CONTEXT, None) == (0, 0)


@pytest.mark.full
def test_a_plan_is_carried_out() -> None:
    model = get_peft_model(
        AutoModelForImageTextToText.from_config(config("llava")), LoraConfig(target_modules="all-linear")
    )
    plan = fastpeft.plan(model, seq=96, images=1, policy=MemoryPolicy(RECOMPUTE), gpu_memory="1GiB", largest=False)
    fastpeft.accelerate(model, memory=plan)
    assert [row.op for row in fastpeft.report(model).rows if row.kind == "memory"] == ["recompute"] * 12


@pytest.mark.full
def test_sizes_of_pictures() -> None:
    """Qwen-VL's are rounded to patches that are merged; SmolVLM's are split into tiles, and one of the whole."""
    qwen = predicted(config("qwen2_5_vl"), Pictures(1, (100, 150)), 1, 64).batches
    assert qwen.each == 4 * 5 and qwen.nbytes(2) == 2 * 8 * 10 * 3 * 2 * 14**2 * 4
    tiled = predicted(config("smolvlm"), Pictures(1, (100, 200)), 1, 64).batches
    assert tiled.each == (2 * 4 + 1) * 4
    shaped = predicted(config("internvl"), Pictures(1, (224, 336)), 1, 200).batches
    assert shaped.each == (2 * 3 + 1) * 16 and shaped.nbytes(1) == 7 * 3 * 112**2 * 4
    assert [_shaped(size, 448) for size in ((448, 448), (1024, 1024), (448, 5000), (300, 900))] == [1, 10, 12, 4]
    assert parse_image_size("448x336") == (448, 336) and parse_image_size("448") == 448
    assert pictures_of(0, None) is None and pictures_of(2, 448) == Pictures(2, (448, 448))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"images": -1}, "images: expected 0 to"),
        ({"images": 1, "image_size": (1, 2, 3)}, "image_size: expected height and width of 1 to"),
        ({"image_size": 448}, "image_size: expected images to be given with it, got 0"),
        (
            {"images": 1, "image_size": 448},
            "image_size: LlavaForConditionalGeneration makes every picture 112x112, got",
        ),
        ({"images": 2}, "seq: expected at least 133, for 2 pictures of 64 tokens, got 128"),
    ],
)
def test_what_cannot_be_planned(options: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, UserError), match=said):
        fastpeft.plan(config("llava"), seq=128, **OPTIONS, **options)


def test_pictures_for_a_model_of_text_or_in_another_form() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(UserError, match="images: expected 0 for causal-lm, got 1"):
        fastpeft.plan(LlamaConfig(vocab_size=64, **sizes), seq=128, images=1, **OPTIONS)
    described = config("paligemma")
    described.image_grid_pinpoints = [[224, 224]]
    model = predicted(config("paligemma"), Pictures(1), 1, 96).batches.model
    with pytest.raises(
        UserError, match="images: PaliGemmaForConditionalGeneration takes pictures in a form that no plan"
    ):
        pixels(model, described, None, 1)
    with pytest.raises(UserError, match="images: expected at most 1 for llava_onevision, got 2"):
        fastpeft.plan(config("llava_onevision"), seq=480, images=2, **OPTIONS)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    described: Qwen2_5_VLConfig = config("qwen2_5_vl")
    described.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    described.save_pretrained(tmp_path)
    words = ["plan", str(tmp_path), "--seq", "64", "--method", "lora", "--gpu-memory", "8GiB", "--no-largest", "--json"]
    answer = run(capsys, *words, "--images", "2", "--image-size", "56x84")
    found = json.loads(answer.out)["plans"][0]
    assert answer.code == 0 and found["settings"]["images"] == 2 and found["settings"]["image_tokens"] == 6
    assert found["settings"]["image_size"] == "56x84" and found["bytes"]["pictures"] > 0
    wrong = run(capsys, *words, "--images", "2", "--image-size", "large")
    assert wrong.code == 2 and "--image-size: expected pixels, such as 448 or HEIGHTxWIDTH, got 'large'" in wrong.err
