"""Plans for models that hear: Whisper, which writes what it heard, and encoders that classify it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSpeechSeq2Seq, LlamaConfig

import fastpeft
from fastpeft.errors import UserError
from fastpeft.memory.plan.predicting import Span
from fastpeft.memory.plan.sound import sound
from fastpeft.memory.policy import LayerPolicy, MemoryPolicy
from tests.commands import run

from .seeing import Both, config, predicted

WITHIN = 0.05
CASES: dict[str, tuple[int, float | None]] = {"whisper": (64, None), "wav2vec2": (1, 2.0)}
HELD_OUT: dict[str, tuple[int, float | None]] = {"speech_to_text": (64, 4.0), "hubert": (1, 2.0)}
"""Looked at only when all else was finished."""
OPTIONS: dict[str, Any] = {"gpu_memory": "2GiB", "method": "lora", "rank": 4, "largest": False}


@cache
def both(name: str) -> Both:
    tokens, seconds = (CASES | HELD_OUT)[name]
    return Both(name, None, 2, tokens, seconds)


def test_peak() -> None:
    assert abs(both("whisper").ratio(LayerPolicy()) - 1) <= WITHIN


@pytest.mark.full
@pytest.mark.parametrize("policy", ["keep", "selective", "recompute", "offload"])
@pytest.mark.parametrize("name", [*CASES, *HELD_OUT])
def test_every_peak(name: str, policy: Any) -> None:
    assert abs(both(name).ratio(LayerPolicy(policy)) - 1) <= WITHIN


def test_a_plan_of_whisper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The encoder's layers hear 150 positions of each row, whatever is written; bf16 under autocast."""
    config("whisper").save_pretrained(tmp_path)
    words = ["plan", str(tmp_path), "--seq", "32", "--batch", "3", "--method", "lora", "--gpu-memory", "8GiB"]
    found = json.loads(run(capsys, *words, "--no-largest", "--json").out)["plans"][0]
    assert (
        found["settings"]["task"] == "speech-seq2seq" and found["bytes"]["sound"] == -(-3 * 16 * 300 * 4 // 512) * 512
    )
    assert "layers 0-5 are those that hear the recordings" in found["notes"] and "experts" not in str(found["notes"])
    wrong = run(capsys, *words, "--seconds", "7")
    said = "seconds: WhisperForConditionalGeneration makes every recording 3 seconds long, got 7"
    assert wrong.code == 2 and said in wrong.err


@pytest.mark.full
def test_what_layers_get() -> None:
    model = predicted(config("whisper"), None, 3, 32)
    assert model.spans(3, 32) == [Span(3, 150, 256)] * 6 + [Span(3, 32, 256)] * 6
    with pytest.raises(UserError, match="seq: expected at most 200, the model's last position, got 201"):
        fastpeft.plan(config("whisper"), seq=201, **OPTIONS)


@pytest.mark.full
def test_a_plan_is_carried_out() -> None:
    base = AutoModelForSpeechSeq2Seq.from_config(config("whisper"))
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"]))
    policy = MemoryPolicy((LayerPolicy("recompute"),) * 6 + (LayerPolicy(),) * 6)
    plan = fastpeft.plan(model, seq=32, policy=policy, gpu_memory="1GiB", largest=False)
    fastpeft.accelerate(model, memory=plan)
    rows = [row.op for row in fastpeft.report(model).rows if row.kind == "memory"]
    assert rows == ["recompute"] * 6 + ["keep"] * 6


@pytest.mark.full
def test_wav2vec2_hears_the_wave() -> None:
    """Without leaving layers out by chance, as its configuration has it."""
    described = config("wav2vec2")
    described.layerdrop = 0.9
    plan = fastpeft.plan(described, seq=1, batch=2, seconds=2, **OPTIONS)
    assert plan.settings["task"] == "audio-classification" and plan.settings["seconds"] == "2"
    assert plan.bytes["sound"] == 2 * 2 * 16000 * 4
    model = predicted(described, None, 2, 1, seconds=2)
    assert model.spans(2, 1)[-6:] == [Span(2, 99, 256)] * 6
    assert len([each for each in model.peak((LayerPolicy(),) * 13, 2, 1).saved if each]) == 13


def test_what_cannot_be_planned() -> None:
    with pytest.raises(ValueError, match="seconds: expected more than 0, and 86400 at the most, got 0"):
        fastpeft.plan(config("wav2vec2"), seq=1, seconds=0, **OPTIONS)
    ctc = config("wav2vec2")
    ctc.architectures = ["Wav2Vec2ForCTC"]
    with pytest.raises(UserError, match="task: expected another than CTC's, whose loss needs values"):
        fastpeft.plan(ctc, seq=1, **OPTIONS)
    text = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(UserError, match="seconds: expected none for causal-lm, got 3"):
        fastpeft.plan(text, seq=8, seconds=3, **OPTIONS)
    with pytest.raises(UserError, match="MODEL: Linear takes sound in a form that no plan is made for"):
        sound(torch.nn.Linear(2, 2), text, 1, None)
