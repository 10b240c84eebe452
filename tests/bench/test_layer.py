"""The benchmark of a decoder layer: its dry run, what it leaves out, and what its figures mean."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from fastpeft.bench import layer, layer_peers, unsloth_functions
from fastpeft.bench.gpu_parts import layer as part
from fastpeft.bench.layer_work import SIBLINGS, Case, Size, prepare, sharing
from fastpeft.bench.left_out import NotHereError
from fastpeft.bench.recorder import Recorder
from fastpeft.bench.records import RecordFile, environment, load
from fastpeft.bench.timer import interleaved, wall_ms

SMALL = Size(hidden=64, intermediate=128, kv=32, rows=2, tokens=16)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_dry_run_measures_every_peer_that_a_cpu_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "layer.jsonl"
    part.dry_run(Recorder(RecordFile(path, environment("cpu")), "layer", "cpu", "quick"), "quick")
    records = load(path)
    timed = {(r.case, r.peer) for r in records if r.metric == "forward and backward"}
    case = "layer dense r=8 fp32 adapters, autocast"
    ours = layer_peers.VARIANTS
    assert {peer for name, peer in timed if name == case} == {"frozen products", "frozen layer", "peft", *ours}
    assert {name for name, peer in timed if peer == "fastpeft"} == {name for name, _ in timed}
    left = {r.peer: r.settings["reason"] for r in records if r.metric == "left out" and r.case == case}
    assert set(left) == {"peft + liger", "unsloth functions"}
    errors = [r.error for r in records if r.metric == "forward and backward" and not r.peer.startswith("frozen")]
    assert all(error is not None and error <= layer.TOLERANCE for error in errors)
    printed = capsys.readouterr().out
    assert case in printed and "left out: needs a GPU" in printed


def test_a_wrong_result_of_ours_is_left_out_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: object) -> list[Tensor]:
        return [1.1 * result for result in right(*args)]

    right = layer_peers.Peer.__call__
    case = Case("linear", "dense", 8, True, SMALL)

    def some(peer: layer_peers.Peer) -> list[Tensor]:
        return wrong(peer) if peer.choices.get("lora_rank_products") == "library" else right(peer)

    monkeypatch.setattr(layer_peers.Peer, "__call__", some)
    recorder = Recorder(RecordFile(tmp_path / "layer.jsonl", environment("cpu")), "layer", "cpu", "quick")
    with pytest.raises(AssertionError, match="1 failed"):
        part._run(recorder, [case], 1)
    records = load(tmp_path / "layer.jsonl")
    left = {r.peer: r.settings["reason"] for r in records if r.metric == "left out"}
    assert "deviates from PEFT's by 1.0e-01" in left["fastpeft, cuBLAS"]
    assert "fastpeft, our kernels" in {r.peer for r in records if r.metric == "forward and backward"}


@pytest.mark.parametrize("work", ["layer", "linears"])
def test_the_frozen_products_are_those_of_the_layer(work: str) -> None:
    made = prepare(Case(work, "dense", 8, True, SMALL), "cpu")
    products = layer_peers.FrozenProducts(made)
    products()
    weights = {name.split(".")[-2]: weight for name, weight in made.frozen.named_parameters()}
    assert len(products.groups) == len(SIBLINGS)
    for (x, dx, pairs), names in zip(products.groups, SIBLINGS, strict=True):
        assert all(
            weight.data_ptr() == weights[name].data_ptr() for (weight, _), name in zip(pairs, names, strict=True)
        )
        for weight, y in pairs:
            torch.testing.assert_close(y, x @ weight.t())
        torch.testing.assert_close(
            dx.float(), sum(y.float() @ weight.float() for weight, y in pairs), atol=0.02, rtol=0.02
        )


def test_a_sharing_copy_has_the_same_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    other = sharing(model)
    assert other[0] is not model[0]
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), other.buffers(), strict=True))


def test_unsloth_s_modules_load_without_their_packages_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a package of the same layout, whose own `__init__` must not run."""
    for package in ("unsloth", "unsloth/kernels", "unsloth_zoo", "unsloth_zoo/temporary_patches"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('patches the process')\n")
    (tmp_path / "unsloth_zoo" / "utils.py").write_text("value = 3\n")
    path = tmp_path / "unsloth" / "kernels" / "fast_lora.py"
    path.write_text("from unsloth_zoo.utils import value\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = ("unsloth", "unsloth_zoo")
    try:
        unsloth_functions._load.cache_clear()
        path.write_text("from unsloth_zoo.utils import missing\n")
        with pytest.raises(NotHereError, match="ImportError: cannot import name 'missing'"):
            unsloth_functions.load()
        assert not [name for name in sys.modules if name.partition(".")[0] in names]
        path.write_text("from unsloth_zoo.utils import value  # there\n")
        unsloth_functions._load.cache_clear()
        assert unsloth_functions.load().value == 3
    finally:
        unsloth_functions._load.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] in names]:
            del sys.modules[name]


def test_a_layer_by_functions_of_unsloth_s_names() -> None:
    made = prepare(Case("layer", "dense", 8, True, SMALL), "cpu")
    functions = ModuleType("functions")
    functions.apply_lora_qkv = lambda layer, x, inplace: (layer.q_proj(x), layer.k_proj(x), layer.v_proj(x))  # type: ignore[attr-defined]
    functions.apply_lora_o = lambda layer, x: layer.o_proj(x)  # type: ignore[attr-defined]
    functions.apply_lora_mlp_swiglu = lambda mlp, x, inplace: mlp(x)  # type: ignore[attr-defined]
    base = made.peft.get_base_model()
    found = layer_peers.unsloth_forward(functions, base, *made.inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, made.peft(*made.inputs), strict=True))


def test_rounds_by_a_clock_of_their_own() -> None:
    seen: list[str] = []
    steps = {name: lambda name=name: seen.append(name) for name in ("a", "b")}  # type: ignore[misc]

    def clock(step: object) -> float:
        assert wall_ms(step) >= 0.0  # type: ignore[arg-type]
        return float(len(seen))

    samples = interleaved(steps, rounds=2, warmup=1, clock=clock)
    assert seen == ["a", "b", "b", "a", "a", "b"]
    assert samples == {"a": [4.0, 5.0], "b": [3.0, 6.0]}
