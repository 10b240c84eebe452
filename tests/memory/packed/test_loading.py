"""fastpeft.load gives what transformers gives, whether it packs the weights or finds them packed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import fastpeft
from fastpeft.config import ModelSection
from fastpeft.integrations import packed_loading
from fastpeft.memory.packed import cache as packed_cache
from fastpeft.memory.packed.files import Packed
from fastpeft.models.bases import load_base

from .checkpoints import MODELS, check_same, checkpoint, plain

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
full = pytest.mark.full


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the weights that bitsandbytes quantises from here on."""
    import transformers.integrations.bitsandbytes as home

    names: list[str] = []
    convert = home.Bnb4bitQuantize.convert

    def counted(self: Any, input_dict: dict[str, Any], **more: Any) -> Any:
        names.extend(input_dict)
        return convert(self, input_dict, **more)

    monkeypatch.setattr(home.Bnb4bitQuantize, "convert", counted)
    return names


@pytest.mark.parametrize(
    ("name", "quant_type", "nested", "dtype"),
    [
        ("llama", "nf4", True, BF16),
        ("t5", "fp4", False, F32),
        ("bert", "nf4", False, F16),
        ("tied", "fp4", True, F32),
        *(
            pytest.param(name, quant_type, nested, dtype, marks=full)
            for name in MODELS
            for quant_type in ("nf4", "fp4")
            for nested in (True, False)
            for dtype in (BF16, F16, F32)
        ),
    ],
)
def test_the_bits_are_those_of_transformers(
    tmp_path: Path, quantised: list[str], name: str, quant_type: str, nested: bool, dtype: torch.dtype
) -> None:
    path = checkpoint(tmp_path, name)
    expected = plain(name, path, quant_type, nested, dtype)
    options = {"quantization": quant_type, "double_quant": nested, "auto_class": MODELS[name][0]}
    for first in (True, False):
        quantised.clear()
        check_same(fastpeft.load(path, dtype=dtype, device="cpu", **options), expected)
        assert bool(quantised) == first, "the second time all weights are found packed"


def test_a_training_step_and_saving_are_the_same(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    fastpeft.load(path, device="cpu")
    models = [plain("llama", path, "nf4", True, F32), fastpeft.load(path, device="cpu")]
    steps = []
    for model in models:
        torch.manual_seed(1)
        tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
        ids = torch.arange(16).view(2, 8)
        for _ in range(2):
            optimizer.zero_grad()
            tuned(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        steps.append({n: p.detach() for n, p in tuned.named_parameters() if p.requires_grad})
        tuned.unload()
    assert steps[0].keys() == steps[1].keys() and all(torch.equal(steps[0][n], steps[1][n]) for n in steps[0])
    models[1].save_pretrained(tmp_path / "saved")
    again = MODELS["llama"][0].from_pretrained(tmp_path / "saved", device_map={"": "cpu"})
    wanted = models[0].state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in again.state_dict().items())


def test_other_settings_and_other_files_are_packed_anew(tmp_path: Path, quantised: list[str]) -> None:
    path = checkpoint(tmp_path)

    def packs(**options: Any) -> bool:
        quantised.clear()
        fastpeft.load(path, device="cpu", **options)
        return bool(quantised)

    assert packs() and not packs()
    assert packs(double_quant=False) and packs(cache=False)
    assert packs(skip=("lm_head", "q_proj")) is False and packs(skip=("q_proj",)), "only the head is new"
    assert quantised == ["lm_head.weight"]
    MODELS["llama"][1]().save_pretrained(path, max_shard_size="60KB")
    assert packs()


def test_int8_and_none_are_transformers_own(tmp_path: Path, packed_weights: Path) -> None:
    path = checkpoint(tmp_path)
    whole = fastpeft.load(path, quantization="none", device="cpu", dtype=BF16)
    assert {p.dtype for p in whole.parameters()} == {BF16} and not hasattr(whole, "is_loaded_in_4bit")
    assert fastpeft.load(path, quantization="int8", device="cpu").is_loaded_in_8bit
    assert not any(path in one.read_text() for one in packed_weights.glob("*/manifest.json"))


def test_loading_from_the_cache_reads_no_weight_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(tmp_path)
    fastpeft.load(path, device="cpu")
    read: list[tuple[int, ...]] = []

    class Watched(packed_loading._Slice):
        def __getitem__(self, index: Any) -> Any:
            value = super().__getitem__(index)
            read.append(tuple(value.shape))
            return value

    monkeypatch.setattr(packed_loading, "_Slice", Watched)
    fastpeft.load(path, device="cpu")
    assert {shape for shape in read if shape != (0,)} == {(48, 64), (64,)}, "embeddings, the head and norms"


def test_an_interrupted_load_is_gone_on_with(
    tmp_path: Path, quantised: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(tmp_path)
    monkeypatch.setattr(packed_cache, "FILE_BYTES", 1)
    add, added = packed_cache.PackedCache.add, []

    def interrupted(self: packed_cache.PackedCache, weight: Packed) -> None:
        if len(added) == 5:
            raise KeyboardInterrupt
        added.append(weight.target)
        add(self, weight)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(packed_cache.PackedCache, "add", interrupted)
        fastpeft.load(path, device="cpu")
    quantised.clear()
    model = fastpeft.load(path, device="cpu")
    assert len(quantised) == 14 - 5 and not set(quantised) & set(added)
    check_same(model, plain("llama", path, "nf4", True, F32))


def test_damage_costs_one_warning_and_no_bit(
    tmp_path: Path, packed_weights: Path, quantised: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = checkpoint(tmp_path)
    fastpeft.load(path, device="cpu")
    (manifest,) = (one for one in packed_weights.glob("*/manifest.json") if path in one.read_text())
    (file,) = manifest.parent.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-9] ^= 4
    file.write_bytes(data)
    quantised.clear()
    model = fastpeft.load(path, device="cpu")
    assert len(quantised) == 14 and [r.levelname for r in caplog.records if r.name == "fastpeft"] == ["WARNING"]
    assert "its content is not what was written" in caplog.text
    check_same(model, plain("llama", path, "nf4", True, F32))
    quantised.clear()
    fastpeft.load(path, device="cpu")
    assert not quantised


@pytest.mark.parametrize("fault", ["no state", "no absmax", "short nested", "flat codes"])
def test_a_whole_file_of_wrong_parts_is_not_taken(
    tmp_path: Path, quantised: list[str], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    parts_of = packed_loading._parts

    def wrong(weight: Any) -> dict[str, Any]:
        parts = parts_of(weight)
        if fault == "flat codes":
            return {**parts, "": parts[""].view(-1)}
        if fault == "short nested":
            return {**parts, ".nested_absmax": parts[".nested_absmax"][:0]}
        return {name: part for name, part in parts.items() if fault.removeprefix("no ") not in name}

    path, options = checkpoint(tmp_path), {"device": "cpu", "cache_dir": tmp_path / "cache"}
    monkeypatch.setattr(packed_loading, "_parts", wrong)
    fastpeft.load(path, **options)
    quantised.clear()
    model = fastpeft.load(path, **options)
    assert len(quantised) == 14
    check_same(model, plain("llama", path, "nf4", True, F32))


@pytest.mark.parametrize("name", ["../other.safetensors", "/tmp/other.safetensors", "a/../../b", "C:\\x", "..\\x"])
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "fine", "b": name}}))
    with pytest.raises(ValueError, match=r"index\.json: expected names of files beside it, got '"):
        fastpeft.load(tmp_path)


@pytest.mark.parametrize("text", ["[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{", ""])
def test_an_index_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="expected an index with a weight_map of names, got another file"):
        fastpeft.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "q4"}, r"quantization: expected one of nf4, fp4, int8, none, got 'q4'"),
        ({"dtype": "bfloat16"}, r"dtype: expected a floating torch.dtype or None, got 'bfloat16'"),
        ({"dtype": torch.int8}, r"dtype: expected a floating torch.dtype or None, got torch.int8"),
        ({"auto_class": "llama"}, r"auto_class: expected a model class of transformers, got 'llama'"),
        ({"device_map": "auto"}, r"device_map: expected to be left out; device, quantization and skip say it"),
        ({"skip": "lm_head"}, r"skip: expected a list of modules' names, got 'lm_head'"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastpeft.load("nowhere", **options)


def test_pickles_are_read_on_request_only(tmp_path: Path) -> None:
    model = MODELS["llama"][1]()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        fastpeft.load(tmp_path, device="cpu")
    loaded = fastpeft.load(tmp_path, device="cpu", use_safetensors=False)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_the_commands_load_so_unless_told_otherwise(tmp_path: Path, quantised: list[str]) -> None:
    section = ModelSection(name=checkpoint(tmp_path))

    def base(section: ModelSection) -> Any:
        quantised.clear()
        return load_base(section, "causal-lm", torch.device("cpu"), F32, "nf4")[0]

    expected = base(replace(section, packed_cache=False))
    assert quantised and base(section) and quantised
    check_same(base(section), expected)
    assert not quantised
