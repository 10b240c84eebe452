"""Streamed layers compute the bits of resident ones, with no more of them on the device than the ring has places."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import LayerPolicy, MemoryPolicy
from fastpeft.memory.layers import model_layers
from fastpeft.memory.streaming import stowing
from fastpeft.memory.streaming.layer import StreamedLayer
from fastpeft.memory.streaming.ring import Ring
from tests.integration.models import ARCHITECTURES, batch, checkpointed, make_base, with_lora
from tests.integration.quantised import make_quantised
from tests.integration.steps import Step, step
from tests.memory.test_policies import full, seeded

LAYERS = 3


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of these models are small."""
    monkeypatch.setattr(stowing, "SMALLEST", 16)


def started(name: str = "llama", **config: Any) -> tuple[Any, dict[str, Any], Step]:
    """An accelerated model that knows its siblings, a batch, and the step that has all on the device."""
    sizes = {"num_hidden_layers": LAYERS} if name in ("llama", "bert") else {}
    lora = {"lora_dropout": 0.3, **config.pop("lora", {})}
    if config:
        model: Any = make_quantised(name, lora=lora, sizes=sizes, **config)
    else:
        model = with_lora(make_base(name, **sizes), ARCHITECTURES[name].task, **lora).train()
    given = batch(model)
    step(fastpeft.accelerate(model), given)
    return model, given, seeded(model, given)


def streamed(model: Any, how: Any = "keep", ring: int = 2) -> Ring:
    fastpeft.accelerate(model, memory=MemoryPolicy(LayerPolicy(how, streamed=True), ring=ring))
    return ring_of(model)


def ring_of(model: nn.Module) -> Ring:
    (ring,) = {m.fastpeft_ring for m in model.modules() if isinstance(m, StreamedLayer)}
    return ring


def on_device(model: nn.Module) -> int:
    """Bytes of all parameters that have memory."""
    return sum(p.untyped_storage().nbytes() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "how", "ring"),
    [
        ("llama", "keep", 1),
        ("t5", "keep", 2),
        *[
            pytest.param(name, how, ring, marks=pytest.mark.full)
            for name in ("llama", "t5", "bert", "gpt2", "bart", "gemma2")
            for how in ("keep", "selective", "recompute", "offload")
            for ring in (1, 2, 3)
        ],
    ],
)
def test_the_same_bits(name: str, how: str, ring: int) -> None:
    model, given, wanted = started(name)
    before = on_device(model)
    places = streamed(model, how, ring)
    assert on_device(model) < before / 2
    assert seeded(model, given).equals(wanted)
    assert seeded(model, given).equals(wanted)
    sizes = sorted(bundle.nbytes for bundle in places.bundles)
    assert 0 < sizes[-1] <= places.peak <= sum(sizes[-ring:])
    assert on_device(fastpeft.accelerate(model)) == before
    assert seeded(model, given).equals(wanted)


@pytest.mark.parametrize(("how", "nested"), [("keep", True), *[pytest.param(how, nested, marks=pytest.mark.full)
    for how in ("keep", "recompute", "offload") for nested in (True, False)]])  # fmt: skip
def test_a_base_in_four_bits(how: str, nested: bool) -> None:
    """Scales are streamed with the weight."""
    model, given, wanted = started(double_quant=nested)
    ring = streamed(model, how)
    assert {stowed.name for bundle in ring.bundles for stowed in bundle.stowed} == {"weight", "absmax"}
    assert seeded(model, given).equals(wanted)


@pytest.mark.parametrize("name", [*full("llama", "bert")])
def test_layers_without_adapters_and_unfused_ones(name: str) -> None:
    """What torch's own linear layer saved for backward is read there."""
    model, given, wanted = started(name, lora={"layers_to_transform": [0, 2], "target_modules": ["q_proj", "query"]})
    streamed(model, "keep", 1)
    assert seeded(model, given).equals(wanted)
    fastpeft.accelerate(model, lora=False, mlp=False)
    plain = seeded(model, given)
    fastpeft.accelerate(model, lora=False, mlp=False, memory=MemoryPolicy(LayerPolicy("keep", streamed=True), ring=1))
    assert seeded(model, given).equals(plain)


@pytest.mark.full
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_of_a_trainer(use_reentrant: bool) -> None:
    model, given, wanted = started()
    fastpeft.accelerate(model, memory=MemoryPolicy(LayerPolicy("recompute", streamed=True)))
    assert seeded(checkpointed(model, use_reentrant), given).equals(wanted)


def test_each_layer_is_copied_while_the_one_before_it_computes() -> None:
    """A copy starts when the layer before it starts, in the place of the one that is done."""
    model, given, _ = started()
    ring = streamed(model, "recompute")
    step(model, given)
    ring.events = []
    step(model, given)
    forward = "use 0, use 1, empty 0, fill 2, use 2"  # two were left there by the step before
    backward = "use 2, use 2, use 1, empty 2, fill 0, use 1, use 0, use 0"
    assert [f"{what} {place}" for what, place in ring.events] == f"{forward}, {backward}".split(", ")


@pytest.mark.full
def test_several_forwards_before_backward() -> None:
    def losses(model: Any) -> dict[str, Any]:
        torch.manual_seed(3)
        model.zero_grad()
        sum(model(**given).loss for _ in range(2)).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model, given, _ = started()
    wanted = losses(model)
    streamed(model)
    found = losses(model)
    assert wanted and all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


@pytest.mark.full
def test_generation() -> None:
    model, given, _ = started()
    ids = {"input_ids": given["input_ids"][:1], "max_new_tokens": 4, "do_sample": False}
    wanted = model.eval().generate(**ids)
    ring = streamed(model)
    assert torch.equal(model.generate(**ids), wanted) and len(ring.filled) == 2


def test_what_a_model_is_asked_for_is_answered_from_the_host() -> None:
    """State dict, loading, merging, moving and other dtypes."""
    model, given, wanted = started()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shapes = {name: (p.shape, p.dtype, p.device) for name, p in model.named_parameters()}
    streamed(model, "recompute")

    def same(state: dict[str, Any]) -> bool:
        return state.keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in state.items())

    assert same(model.state_dict())
    assert {name: (p.shape, p.dtype, p.device) for name, p in model.named_parameters()} == shapes
    small = on_device(model)
    model.to("cpu")
    assert on_device(model) == small
    model.load_state_dict({name: value + 1 for name, value in before.items()})
    assert all(torch.equal(v, before[k] + 1) for k, v in model.state_dict().items())
    model.load_state_dict(before)
    assert same(model.state_dict()) and seeded(model, given).equals(wanted)
    model.double().float()
    assert same(model.state_dict()) and seeded(model, given).equals(wanted)
    ring_of(model).empty()
    assert on_device(model) == small


@pytest.mark.parametrize("four_bits", [False, pytest.param(True, marks=pytest.mark.full)])
def test_merging(four_bits: bool) -> None:
    """As resident layers do, and again from the host afterwards."""
    resident, given, _ = started(lora={"lora_dropout": 0.0}, **({"double_quant": True} if four_bits else {}))
    moved = copy.deepcopy(resident)
    ring = streamed(moved, "recompute")
    before = moved.state_dict()
    results = []
    for model in (resident, moved):
        model.merge_adapter()
        merged = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            loss = model(**given).loss
        model.unmerge_adapter()
        results.append((loss, merged, seeded(model, given), model.state_dict()))
    (loss, merged, after, state), (*ours,) = results
    assert torch.equal(ours[0], loss) and ours[2].equals(after)
    for wanted, found in ((merged, ours[1]), (state, ours[3])):
        assert wanted.keys() == found.keys() and all(torch.equal(v, found[k]) for k, v in wanted.items())
    assert before.keys() == merged.keys() and len(ring.filled) == 2
    ring.empty()
    assert all(bundle.stowed for bundle in ring.bundles)
    assert seeded(moved, given).equals(after)


@pytest.mark.parametrize("four_bits", [False, pytest.param(True, marks=pytest.mark.full)])
def test_copies_are_streamed_too_and_nothing_is_pickled(four_bits: bool) -> None:
    model, given, wanted = started(**({"double_quant": True} if four_bits else {}))
    streamed(model, "recompute")
    other = copy.deepcopy(model)
    ring = ring_of(other)
    assert ring is not ring_of(model) and len(ring.bundles) == LAYERS
    assert seeded(other, given).equals(wanted) and ring.peak == 2 * ring.bundles[0].nbytes
    with pytest.raises(TypeError, match="a streamed layer cannot be pickled"):
        pickle.dumps(model)
    pickle.dumps(fastpeft.restore(model))
    assert not any(name.startswith("fastpeft") for m in model.modules() for name in m.__dict__)


@pytest.mark.full
def test_only_some_layers() -> None:
    model, given, wanted = started()
    policies = [LayerPolicy("keep", streamed=place != 1) for place in range(LAYERS)]
    others = [LayerPolicy("keep", streamed=place == 1) for place in range(LAYERS)]
    fastpeft.accelerate(model, memory=MemoryPolicy(tuple(policies), ring=1))
    assert seeded(model, given).equals(wanted)
    before = ring_of(model)
    fastpeft.accelerate(model, memory=MemoryPolicy(tuple(others), ring=1))
    assert seeded(model, given).equals(wanted) and len(ring_of(model).bundles) == 1
    assert [isinstance(layer, StreamedLayer) for layer in model_layers(model).values()] == [False, True, False]
    assert before is not ring_of(model)
    rows = [row.op for row in fastpeft.report(model).rows if row.kind == "memory"]
    assert rows == ["keep", "keep, streamed", "keep"]


def test_accelerated_again_in_another_way() -> None:
    """Which MLPs are some is proved with their weights."""
    model, given, wanted = started()
    fastpeft.accelerate(model, mlp=False, memory=LayerPolicy(streamed=True))
    ring_of(model).empty()
    fastpeft.accelerate(model, memory=LayerPolicy(streamed=True))
    assert fastpeft.report(model).rows and seeded(model, given).equals(wanted)


def test_what_is_trained_or_shared_is_not_streamed() -> None:
    model, given, _ = started()
    first, second, *_ = model_layers(model).values()
    second.mlp.up_proj.base_layer.weight = first.mlp.up_proj.base_layer.weight
    first.mlp.down_proj.base_layer.weight.requires_grad_(True)
    wanted = seeded(model, given)
    ring = streamed(model)
    assert [len(bundle.stowed) for bundle in ring.bundles] == [5, 6, 7]
    notes = [row.note for row in fastpeft.report(model).rows if row.kind == "memory"]
    assert notes == ["1 frozen weights stay on the device: shared"] * 2 + [""]
    assert seeded(model, given).equals(wanted)
    first.mlp.gate_proj.base_layer.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="a streamed base weight is trained now"):
        model(**given)


@pytest.mark.full
def test_another_library_s_storage_stays() -> None:
    from tests.integration.bases import BASES, PROJECTIONS, quantise

    assert "LLM.int8" in BASES
    model = fastpeft.accelerate(with_lora(quantise(make_base(), "LLM.int8"), target_modules=PROJECTIONS).train())
    given = batch(model)
    step(model, given)
    wanted = seeded(model, given)
    streamed(model)
    assert seeded(model, given).equals(wanted)
    notes = {row.note for row in fastpeft.report(model).rows if row.kind == "memory"}
    assert notes == {"7 frozen weights stay on the device: Int8Params"}


def test_no_copies_in_fp8() -> None:
    with pytest.raises(ValueError, match="memory: expected no streamed layers with fp8_compute='both', whose copies"):
        fastpeft.accelerate(with_lora(make_base()), memory=LayerPolicy(streamed=True), fp8_compute="both")


@pytest.mark.full
def test_torch_compile_stops_at_streamed_layers() -> None:
    model, given, wanted = started(lora={"lora_dropout": 0.0})
    streamed(model)
    assert seeded(torch.compile(model, backend="eager"), given).loss == wanted.loss  # type: ignore[arg-type]


@pytest.mark.parametrize("call", [fastpeft.verify, lambda model: fastpeft.tune(model, [8])])
def test_what_reads_layers_apart_asks_for_resident_ones(call: Any) -> None:
    model = fastpeft.accelerate(with_lora(make_base()), memory=LayerPolicy(streamed=True))
    with pytest.raises(ValueError, match="model: expected layers on the device, got streamed ones"):
        call(model)
