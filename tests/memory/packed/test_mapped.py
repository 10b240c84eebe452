"""Packed weights that stay in the cache's files, loaded so and streamed from there."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

import fastpeft
from fastpeft import LayerPolicy, MemoryPolicy
from fastpeft.memory.packed import cache as packed_cache
from fastpeft.memory.packed.files import Packed, contents, write
from fastpeft.memory.streaming import host_store, stowing
from tests.integration.steps import Step, step
from tests.memory.streaming.test_streaming import ring_of

from .checkpoints import check_same, checkpoint, plain

F32 = torch.float32


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and matrices of these models are small."""
    monkeypatch.setattr(packed_cache, "FILE_BYTES", 1 << 13)
    monkeypatch.setattr(stowing, "SMALLEST", 16)


def codes(model: Any) -> list[torch.Tensor]:
    return [p.data for p in model.parameters() if hasattr(p, "quant_state")]


def tuned(model: Any, memory: MemoryPolicy) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return fastpeft.accelerate(get_peft_model(model, config).train(), memory=memory)


def taken(model: Any) -> Step:
    ids = torch.arange(16).view(2, 8)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    model(**inputs)  # finds the siblings
    return step(model, inputs)


def check_equal(a: Step, b: Step) -> None:
    assert torch.equal(a.loss, b.loss) and a.gradients.keys() == b.gradients.keys() != set()
    assert all(torch.equal(a.gradients[name], b.gradients[name]) for name in a.gradients)


def test_packed_weights_stay_in_their_files(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    expected = plain("llama", path, "nf4", True, F32)
    for _ in range(2):  # packed in this run, and found packed
        model = fastpeft.load(path, device="cpu", mapped=True)
        check_same(model, expected)
        assert codes(model) and all(map(host_store.is_mapped, codes(model)))


@pytest.mark.parametrize("how", ["keep", "recompute"])
def test_streamed_from_the_files(tmp_path: Path, how: Any) -> None:
    path = checkpoint(tmp_path)
    expected = taken(tuned(fastpeft.load(path, device="cpu"), MemoryPolicy(LayerPolicy(how))))
    base = fastpeft.load(path, device="cpu", mapped=True)
    before = {t.data_ptr() for layer in base.model.layers for t in codes(layer)}
    model = tuned(base, MemoryPolicy(LayerPolicy(how, streamed=True), host_memory=0))
    ring = ring_of(model)
    hosts = [stowed.host for bundle in ring.bundles for stowed in bundle.stowed]
    assert {host.data_ptr() for host in hosts} >= before and ring.room.taken == 0
    check_equal(taken(model), expected)
    check_equal(taken(copy.deepcopy(model)), expected)
    check_equal(taken(fastpeft.accelerate(model)), expected)


def test_host_memory_is_taken_as_far_as_it_may_be(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    model = fastpeft.load(path, device="cpu", mapped=True)
    wanted = [codes(layer) for layer in model.model.layers]
    some = sum(t.nbytes for t in wanted[0])
    model = tuned(model, MemoryPolicy(LayerPolicy(streamed=True), host_memory=some))
    ring = ring_of(model)
    assert 0 < ring.room.taken <= some
    mapped = [[host_store.is_mapped(stowed.host) for stowed in bundle.stowed] for bundle in ring.bundles]
    assert not mapped[0][0] and any(mapped[1]), "first come, first served"


def test_what_is_written_is_kept_and_the_files_are_not_touched(tmp_path: Path, packed_weights: Path) -> None:
    path = checkpoint(tmp_path)
    model = tuned(
        fastpeft.load(path, device="cpu", mapped=True), MemoryPolicy(LayerPolicy(streamed=True), host_memory=0)
    )
    before = taken(model)
    model.merge_adapter()
    merged = model.eval()(input_ids=torch.arange(8)[None]).logits
    assert torch.equal(merged, model(input_ids=torch.arange(8)[None]).logits)
    model.unmerge_adapter()
    assert not torch.equal(taken(model.train()).loss, before.loss), "4 bits lose what merging rounds"
    files = list(packed_weights.rglob("*.safetensors"))
    assert files and all(hashlib.sha256(file.read_bytes()).hexdigest() == file.stem for file in files)


def test_pages_of_the_layer_after_next_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned(
        fastpeft.load(checkpoint(tmp_path), device="cpu", mapped=True),
        MemoryPolicy(LayerPolicy(streamed=True), ring=1, host_memory=0),
    )
    ring, asked = ring_of(model), list[int]()
    places = {stowed.host.data_ptr(): i for i, bundle in enumerate(ring.bundles) for stowed in bundle.stowed}
    monkeypatch.setattr(stowing, "read_ahead", lambda host: asked.append(places[host.data_ptr()]))
    taken(model)
    assert list(dict.fromkeys(asked)) == [1, 0], "the second while the first computes, and back"


def test_a_full_disk_leaves_weights_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path)
    monkeypatch.setattr(packed_cache, "SPARE_BYTES", 1 << 60)
    model = fastpeft.load(path, device="cpu", mapped=True)
    check_same(model, plain("llama", path, "nf4", True, F32))


def test_an_entry_that_does_not_fit_is_not_mapped(tmp_path: Path, packed_weights: Path) -> None:
    path = checkpoint(tmp_path)
    known = set(packed_weights.rglob("*.safetensors"))
    fastpeft.load(path, device="cpu")
    for file in set(packed_weights.rglob("*.safetensors")) - known:
        with safe_open(file, framework="pt") as old:
            weights = [
                Packed(target, source, {part: old.get_tensor(target + part).clone() for part in parts})
                for target, (source, parts) in contents(file).items()
            ]
        file.unlink()
        for weight in weights:
            weight.parts[""].zero_()
            weight.parts[".absmax"].resize_(1)
        write(file.parent, weights)
    check_same(fastpeft.load(path, device="cpu", mapped=True), plain("llama", path, "nf4", True, F32))


def test_weights_that_are_not_cached_are_said_to_be_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored = tmp_path / "stored"
    fastpeft.load(checkpoint(tmp_path), device="cpu").save_pretrained(stored)
    fastpeft.load(stored, device="cpu", mapped=True)
    assert "none of them stays in a mapped file" in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantization": "none"}, "with quantization 'none', cache True and device cpu"),
        ({"cache": False}, "with quantization 'nf4', cache False and device cpu"),
        ({"device": "meta"}, "with quantization 'nf4', cache True and device meta"),
    ],
)
def test_where_nothing_can_be_mapped(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"mapped: expected False unless .*{said}"):
        fastpeft.load(checkpoint(tmp_path), **{"device": "cpu", "mapped": True, **options})


def test_host_memory_is_checked() -> None:
    with pytest.raises(ValueError, match="host_memory: expected 0 or more bytes or None, got -1"):
        MemoryPolicy(host_memory=-1)
