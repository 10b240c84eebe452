"""The benchmarks of projections and MLPs: every peer of a CPU computes the case, over the same tensors."""

from __future__ import annotations

import os

import pytest
import torch

from fastpeft.bench.ops import ceilings, lora, mlp, models, quant
from fastpeft.bench.ops.case import OpCase
from fastpeft.bench.ops.checking import results
from fastpeft.bench.ops.models import Shape
from fastpeft.bench.ops.run import Runner
from fastpeft.bench.recorder import Recorder
from fastpeft.bench.records import RecordFile, environment

TINY = Shape("tiny", 64, 128, 2, 1, 32, 100)
PLAIN = Shape("plain", 64, 128, 2, 2, 32, 100, "relu", gated=False, biased=True)
JOINED = Shape("joined", 64, 96, 2, 2, 32, 100, "gelu", joined=True)
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr(ceilings, "_SIZES", {"cpu": (2**12, 32)})
    recorder = Recorder(RecordFile(os.devnull, environment("cpu")), "bench", "cpu", "quick")
    return Runner(recorder.add, "cpu", "quick", 1)


@pytest.mark.parametrize(
    "case",
    [
        lora.case(TINY, lora.SIBLINGS, "dense", (4,), 24, F32),
        lora.case(TINY, lora.SIBLINGS, "nf4", (4,), 24, BF16),
        lora.case(PLAIN, lora.ONE, "nf4", (4, 2, 4), 24, F32),
        mlp.case(TINY, "nf4", 4, 24, F32),
        mlp.case(TINY, "dense", 4, 24, BF16),
        mlp.case(PLAIN, "dense", 4, 24, F32),
        mlp.case(JOINED, "dense", 4, 24, F32),
    ],
    ids=lambda case: f"{case.op} {case.name} {case.dtype}",
)
def test_every_peer_of_a_cpu_is_timed(case: OpCase, runner: Runner) -> None:
    outcome = runner.run([case])
    left = {r.peer: r.settings["reason"] for r in outcome.records if r.metric == "left out"}
    timed = {(r.peer, r.settings["direction"]) for r in outcome.records if r.metric == "time"}
    peers = {"fastpeft", "fastpeft layers", "peft", "torch", "torch again"}
    assert not outcome.failures
    assert timed == {(peer, direction) for peer in peers for direction in ("forward", "backward", "both")}
    assert set(left) == set(case.peers) - peers and all("needs a GPU" in left[name] for name in {"unsloth"} & set(left))


@pytest.mark.full
@pytest.mark.parametrize(
    "case",
    [
        lora.case(TINY, lora.SIBLINGS, "nf4", (4, 2), 24, F32),
        mlp.case(JOINED, "nf4", 4, 24, F32),
        quant.case(TINY, BF16),
    ],
    ids=lambda case: case.op,
)
def test_torch_compile_is_a_peer(case: OpCase, runner: Runner) -> None:
    runner._peers = ["torch.compile"]
    outcome = runner.run([case])
    assert {r.peer for r in outcome.records if r.metric == "time"} == {"torch.compile", "torch.compile again"}


def test_all_adapters_and_the_input_get_gradients() -> None:
    case = lora.case(TINY, lora.SIBLINGS, "nf4", (4, 2), 8, BF16)
    inputs = case.make("cpu", case.dtype, 0)
    assert len(inputs.wanted) == 1 + 3 * 2 * 2 and len(inputs.dys) == 3
    gradients = results(case.reference(inputs), inputs)[3:]
    assert all(g.shape == t.shape and g.norm() > 0 for g, t in zip(gradients, inputs.wanted, strict=True))


def test_floors_count_the_definition_s_products() -> None:
    case = lora.case(TINY, lora.ONE, "dense", (4,), 24, F32)
    frozen, update = 2 * 24 * 64 * 64, 2 * 24 * 4 * (64 + 64)
    x, weight, adapters = 4 * 24 * 64, 4 * 64 * 64, 4 * 4 * (64 + 64)
    forward, backward, both = (case.floors[each] for each in ("forward", "backward", "both"))
    assert (forward.flops, backward.flops) == (frozen + update, frozen + 2 * update)
    assert forward.bytes == 2 * x + weight + adapters
    assert backward.bytes == x + (x + weight + adapters) + (x + adapters)
    assert (both.flops, both.bytes) == (2 * frozen + 3 * update, 4 * x + weight + 2 * adapters)


def test_shapes_are_those_of_the_published_configurations() -> None:
    """By transformers' own defaults, which are those of the base models."""
    import transformers as t

    for shape, config in ((models.BERT_BASE, t.BertConfig()), (models.MODERNBERT_BASE, t.ModernBertConfig())):
        sizes = config.hidden_size, config.intermediate_size, config.num_attention_heads, config.vocab_size
        assert sizes == (shape.hidden, shape.intermediate, shape.heads, shape.vocab)
    for shape in (value for value in vars(models).values() if isinstance(value, Shape)):
        assert shape.heads % shape.kv_heads == 0 and shape.kind in ("silu", "gelu", "gelu_tanh", "relu")
