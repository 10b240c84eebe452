"""`fastpeft merge`: the merged model computes what base and adapter did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from fastpeft import merging
from fastpeft.cli import app
from fastpeft.models import tuned

from .conftest import SHIPPED, train

IDS = torch.arange(40)[None] + 5


def merge(*arguments: object) -> int:
    return app.run(["merge", *map(str, arguments), "--quiet"])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits.double()
    return found


def with_adapter(run: Path, dtype: torch.dtype) -> Tensor:
    """Of base and adapter; on a quantised base its decoded values."""
    return logits(tuned.load(tuned.find(str(run)), torch.device("cpu"), dtype))


@pytest.mark.parametrize("run", ["chat_run", "qlora_run"])
def test_in_float32_it_is_the_same_model(run: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(run)
    assert merge(folder, tmp_path / "merged", "--dtype", "float32") == 0
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    wanted = with_adapter(folder, torch.float32)
    base = logits(AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32))
    assert (merged - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (merged - base).abs().max() > 0.1 * wanted.abs().max()  # the adapter does something


@pytest.fixture(scope="module")
def half_run(tmp_path_factory: pytest.TempPathFactory, chats: Path) -> Path:
    """Over a checkpoint in bfloat16."""
    folder = tmp_path_factory.mktemp("half")
    AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.bfloat16).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(folder / "base")
    words = ("--data", chats, "--lr", 1e-2, "--max-steps", 2, "--batch-size", 1)
    return train(folder / "run", "--model", folder / "base", *words)


@pytest.mark.parametrize(
    ("run", "dtype"),
    [
        ("chat_run", torch.bfloat16),
        ("half_run", torch.bfloat16),
        ("half_run", torch.float16),
        ("qlora_run", torch.bfloat16),
    ],
)
def test_weights_are_rounded_once(run: str, dtype: torch.dtype, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(run)
    name = str(dtype).removeprefix("torch.")
    assert merge(folder, tmp_path / "exact", "--dtype", "float32") == 0
    assert merge(folder, tmp_path / "half", "--dtype", name) == 0
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "exact", dtype=torch.float32).state_dict()
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").state_dict()
    assert exact.keys() == half.keys()
    for name, weight in half.items():
        assert weight.dtype == dtype
        assert torch.equal(weight, exact[name].to(dtype)), name


def test_a_base_that_is_stored_in_4_bits(chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(SHIPPED, quantization_config=bits, device_map={"": "cpu"})
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(tmp_path / "base")
    words = ("--data", chats, "--lr", 1e-2, "--max-steps", 5, "--batch-size", 1)
    run = train(tmp_path / "run", "--model", tmp_path / "base", *words)
    (run / "config.yaml").unlink()  # as of another tool: the checkpoint itself tells
    capsys.readouterr()
    assert merge(run, tmp_path / "merged", "--dtype", "float32") == 0
    assert capsys.readouterr().out.endswith("float32, base decoded\n")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    wanted = with_adapter(run, torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    assert (logits(merged) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_the_storage_of_an_adapter_that_does_not_tell_can_be_said(qlora_run: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((qlora_run / name).read_bytes())
    assert merge(tmp_path, tmp_path / "merged", "--dtype", "float32", "--quantization", "nf4") == 0
    wanted = with_adapter(qlora_run, torch.float32)
    assert (
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) - wanted
    ).abs().max() < 1e-4 * wanted.abs().max()


def test_a_checkpoint_in_the_result_s_16_bits_is_not_held_in_32(
    half_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[torch.dtype] = []
    attach = tuned.attach

    def watched(source: tuned.Source, base: Any) -> Any:
        held.extend({parameter.dtype for parameter in base.parameters()})
        return attach(source, base)

    monkeypatch.setattr("fastpeft.models.tuned.attach", watched)
    merging.merge(tuned.find(str(half_run)), torch.bfloat16, decode=True)
    assert held == [torch.bfloat16]


def test_a_quantised_base_is_decoded_or_taken_as_it_was(qlora_run: Path, tmp_path: Path) -> None:
    assert merge(qlora_run, tmp_path / "decoded", "--dtype", "float32") == 0
    assert merge(qlora_run, tmp_path / "original", "--dtype", "float32", "--into", "original") == 0
    wanted = with_adapter(qlora_run, torch.float32)
    decoded, original = (logits(AutoModelForCausalLM.from_pretrained(tmp_path / n)) for n in ("decoded", "original"))
    assert (decoded - wanted).abs().max() < 1e-4 * wanted.abs().max() < 1e-1 * (original - wanted).abs().max()


def test_the_folder_is_a_plain_model(qlora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge(qlora_run, tmp_path / "merged") == 0
    wanted = f"{tmp_path}/merged: {qlora_run} merged into {SHIPPED}, bfloat16, base decoded from nf4\n"
    assert capsys.readouterr().out == wanted
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    assert {path.name for path in tmp_path.iterdir()} == {"merged"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    chat = [{"role": "user", "content": "Say yes."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == "yes yes yes"


def test_a_classifier_keeps_its_head_and_its_names(classifier_run: Path, tmp_path: Path) -> None:
    assert merge(classifier_run, tmp_path / "merged", "--dtype", "float32") == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        best = merged(**tokenizer("it is bad", return_tensors="pt")).logits.argmax().item()
    assert merged.config.id2label[best] == "bad"


def test_a_folder_that_is_in_use_is_replaced_on_request_only(
    chat_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(chat_run, tmp_path / "merged") == 0
    capsys.readouterr()
    assert merge(chat_run, tmp_path / "merged") == 2
    assert capsys.readouterr().err == f"fastpeft: OUTPUT: {tmp_path}/merged is not empty; --overwrite replaces it\n"
    assert merge(chat_run, tmp_path / "merged", "--dtype", "float16", "--overwrite") == 0
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "float16"
    assert {path.name for path in tmp_path.iterdir()} == {"merged"}


def test_what_is_not_a_merged_model_alone_is_not_deleted(
    chat_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoModelForCausalLM.from_pretrained(SHIPPED).save_pretrained(tmp_path / "model")
    assert merge(chat_run, tmp_path / "model", "--overwrite") == 2
    wanted = f"fastpeft: OUTPUT: expected a merged model to replace, got {tmp_path}/model, which is none\n"
    assert capsys.readouterr().err == wanted
    assert merge(chat_run, tmp_path / "merged") == 0
    (tmp_path / "merged/notes").mkdir()
    (tmp_path / "merged/notes/mine.txt").touch()
    capsys.readouterr()
    assert merge(chat_run, tmp_path / "merged", "--overwrite") == 2
    wanted = f"expected nothing but a merged model to replace, got {tmp_path}/merged, with notes/mine.txt\n"
    assert capsys.readouterr().err.endswith(wanted)
    assert (tmp_path / "model/model.safetensors").exists() and (tmp_path / "merged/notes/mine.txt").exists()


def test_nothing_is_left_when_saving_fails(chat_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("no space left")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        merge(chat_run, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("adapter", "output", "message"),
    [
        (str(SHIPPED), "out", f"ADAPTER: expected an adapter's folder or ID, got {SHIPPED}, which is a whole model"),
        ("nowhere/at/all", "out", "ADAPTER: expected a model's folder or its ID on the hub, got 'nowhere/at/all'"),
        ("nowhere/at/all", "file", "OUTPUT: expected a folder or a new name, got a file: file"),
        ("nowhere/at/all", "file/below", "OUTPUT: expected a folder that can be written, got file/below"),
        ("nowhere/at/all", "/proc/out", "OUTPUT: expected a folder that can be written, got /proc/out"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(
    adapter: str,
    output: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert merge(adapter, output) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"fastpeft: {message}") and shown.count("\n") == 1


def test_values_beyond_the_dtype_are_refused(
    chat_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    copied = tmp_path / "adapter"
    copied.mkdir()
    for path in chat_run.iterdir():
        if path.is_file():
            (copied / path.name).write_bytes(path.read_bytes())
    weights = load_file(copied / "adapter_model.safetensors")
    save_file({name: 1e4 * weight for name, weight in weights.items()}, copied / "adapter_model.safetensors")
    assert merge(copied, tmp_path / "merged", "--dtype", "float16") == 2
    assert "--dtype: expected one that holds model.layers.0." in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
