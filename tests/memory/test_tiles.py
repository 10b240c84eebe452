"""Layers whose MLPs compute some tokens at a time: the same step within rounding, at the memory of a tile."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import LayerPolicy, MemoryPolicy
from fastpeft.layers.mlp import FastMlp
from fastpeft.memory.trace.live import LiveBytes
from fastpeft_kernels.weights import DenseWeight
from tests.integration.models import batch, checkpointed, make, make_base, with_lora
from tests.integration.quantised import make_quantised, quantised_truth
from tests.integration.reports import mlp_rows
from tests.integration.steps import Step, assert_step_close, step, truth
from tests.memory.test_policies import full, seeded, started

TILED = ("selective", "recompute", "offload")


def tiled(model: nn.Module, how: Any = "recompute", tile: int = 3, **others: Any) -> nn.Module:
    return fastpeft.accelerate(model, memory=LayerPolicy(how, tile=tile, **others))


def assert_rounds_alike(ours: Step, other: Step) -> None:
    """The same loss; adapters' gradients but for the order of their sums."""
    torch.testing.assert_close(ours.loss, other.loss)
    torch.testing.assert_close(ours.gradients, other.gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", *full("t5", "qwen3", "gemma2", "gpt2", "phi3", "bart")])
@pytest.mark.parametrize(("how", "tile"), [("recompute", 3), *full(*product(TILED, (1, 5, 1000)))])
def test_a_step_is_peft_s(name: str, how: str, tile: int) -> None:
    model = make(name)
    given = batch(model)
    exact, peft = truth(model, given), step(model, given)
    tiled(model, how, tile)
    for _ in range(2):  # the first finds the siblings
        assert_step_close(step(model, given), peft, exact)


@pytest.mark.parametrize("use_reentrant", [False, *full(True)])
def test_a_quantised_base_under_autocast_in_16_bits(use_reentrant: bool) -> None:
    model = make_quantised(dtype=torch.bfloat16, prepared=False)
    given = batch(model)
    exact = quantised_truth(model, given)
    with torch.autocast("cpu", torch.bfloat16):
        peft = step(model, given)
        checkpointed(tiled(model), use_reentrant)  # type: ignore[arg-type]
        for _ in range(2):
            assert_step_close(step(model, given), peft, exact)


@pytest.mark.parametrize("how", ["offload", *full("selective", "recompute")])
def test_the_same_elements_are_dropped(how: str) -> None:
    model, given, wanted = started()
    for policy in (LayerPolicy(how, tile=3), MemoryPolicy((LayerPolicy(how, tile=5), LayerPolicy()))):  # type: ignore[arg-type]
        fastpeft.accelerate(model, memory=policy)
        found = seeded(model, given)
        assert_rounds_alike(found, wanted)
        assert not found.equals(wanted), "no tiles"
    assert seeded(fastpeft.accelerate(model), given).equals(wanted)


def test_streamed_layers() -> None:
    model, given, wanted = started()
    tiled(model, "offload", streamed=True)
    assert_rounds_alike(seeded(model, given), wanted)


def test_nothing_of_all_tokens_is_as_wide_as_the_mlp() -> None:
    """Of a whole step: all but one of the differences between the peaks is gate, up and what is made of them."""
    tokens, hidden, width = 256, 32, 512
    sizes = {"hidden_size": hidden, "intermediate_size": width, "head_dim": 8, "max_position_embeddings": tokens}
    model = with_lora(make_base("llama", num_hidden_layers=1, **sizes)).train()
    ids = torch.randint(3, 90, (1, tokens))
    peaks = []
    for tile in (0, 16):
        tiled(model, tile=tile)
        step(model, {"input_ids": ids, "labels": ids})
        live = LiveBytes("cpu")
        with live:
            step(model, {"input_ids": ids, "labels": ids})
        peaks.append(live.peak)
    assert peaks[0] - peaks[1] > 2 * 4 * tokens * width
    assert peaks[1] < 4 * tokens * width + 3 * 4 * hidden * width * 2 + 40 * 4 * tokens * hidden


def test_the_report_and_what_is_not_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given, _ = started("llama", lora_dropout=0.0)
    tiled(model, tile=4)
    rows = [row for row in fastpeft.report(model).rows if row.kind == "memory"]
    assert {row.op for row in rows} == {"recompute, MLP in tiles of 4 tokens"} and not any(row.note for row in rows)
    assert {row.op for row in mlp_rows(model)} == {"lora_mlp, 4 tokens at a time"}
    monkeypatch.setattr(DenseWeight, "row_by_row", False)
    whole = step(model, given)
    assert all("not in tiles: weights whose product looks at all tokens at once" in r.note for r in mlp_rows(model))
    assert whole.equals(step(tiled(model, tile=0), given))
    assert {row.op for row in mlp_rows(fastpeft.accelerate(model))} == {"lora_mlp"}
    assert not any(m.fastpeft_tile for m in model.modules() if isinstance(m, FastMlp))


def test_a_model_without_such_mlps_says_so() -> None:
    model = tiled(make("bert"), "selective")
    notes = {row.note for row in fastpeft.report(model).rows if row.kind == "memory"}
    assert notes == {"no MLP that is one op: nothing is computed again"}
    notes = {row.note for row in fastpeft.report(tiled(model)).rows if row.kind == "memory"}
    assert notes == {"no MLP that is one op: no tiles"}


@pytest.mark.parametrize("tile", [-1, 2.5, True])
def test_what_is_no_tile(tile: Any) -> None:
    with pytest.raises(ValueError, match=f"tile: expected 0 or more tokens, got {tile}"):
        LayerPolicy("recompute", tile=tile)


def test_keep_has_no_tiles() -> None:
    with pytest.raises(ValueError, match='tile: expected 0 with activations="keep", which keeps gate and up'):
        LayerPolicy(tile=4)
