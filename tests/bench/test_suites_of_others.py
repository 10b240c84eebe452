"""Test suites of other libraries, over accelerated models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastpeft.bench.suites.__main__ import main
from fastpeft.bench.suites.hub import make_hub

SUITE = """
from peft import LoraConfig, get_peft_model
from torch import nn


def layer():
    return get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"])).base_model.model[0]


def test_that_passes():
    assert layer().r == {"default": 8}


def test_of_what_fastpeft_changes():
    assert type(layer()).__module__.startswith("peft")


def test_that_fails():
    raise AssertionError
"""


def test_the_tiny_models_are_loaded_by_their_names(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = "peft-internal-testing/tiny-random-gpt2"
    make_hub(tmp_path, f'model_id = "{name}"')
    assert [entry.name for entry in tmp_path.iterdir()] == ["models--peft-internal-testing--tiny-random-gpt2"]
    model = AutoModelForCausalLM.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)
    ids = tokenizer("Where is it?", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "Where is it?"
    assert torch.isfinite(model(ids).logits).all()


@pytest.mark.full
def test_a_test_that_fails_with_fastpeft_alone_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "test_suite.py"
    file.write_text(SUITE)
    assert main([str(file)]) == 1
    printed = capfd.readouterr().out
    assert "3 run, 1 passed, 0 skipped or expected to fail, 1 failed without fastpeft too, 1 with fastpeft" in printed
    assert printed.splitlines()[-1].endswith("test_suite.py::test_of_what_fastpeft_changes")
    assert main([str(file), "-k", "passes"]) == 0
    file.write_text("import no_such_module")
    with pytest.raises(SystemExit, match="pytest could not run these tests: it ended with code 2"):
        main([str(file)])


def test_no_path_is_refused() -> None:
    with pytest.raises(SystemExit, match="expected the path of a file or folder of tests, got '-k lora'"):
        main(["-k", "lora"])
