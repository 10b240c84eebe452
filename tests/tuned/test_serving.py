"""Adapters in PEFT's format, and what vLLM is known not to take of them."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

import fastpeft
from fastpeft.cli import app
from fastpeft.config import LoraSection
from fastpeft.models.adapters import attach_adapter
from fastpeft.serving import note, refused_by_vllm
from tests.integration import mixtures
from tests.integration.models import make_base, trained

full = pytest.mark.full
LORA = r"base_model\.model\.model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj\.lora_[AB]\.weight"
EMBEDDING = r"base_model\.model\.model\.embed_tokens\.(lora_embedding_[AB]|base_layer\.weight)"

KINDS: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "lora": ({}, (LORA,), ""),
    "rslora": ({"use_rslora": True, "alpha": 3.0}, (LORA,), ""),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, (LORA, EMBEDDING), ""),
    "dora": ({"use_dora": True}, (LORA, r".*_proj\.lora_magnitude_vector"), "DoRA"),
    "bias": ({"target_modules": ["q_proj"], "extra": {"lora_bias": True}}, (LORA, r".*lora_B\.bias"), "trained biases"),
    "head": (
        {"modules_to_save": ["lm_head"]},
        (LORA, r"base_model\.model\.lm_head\.weight"),
        "modules that are saved whole (lm_head)",
    ),
    "tokens": (
        {"target_modules": ["q_proj"], "extra": {"trainable_token_indices": [3, 4]}},
        (LORA, r"base_model\.model\.model\.embed_tokens\.token_adapter\.trainable_tokens_delta"),
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta, which is no weight of LoRA",
    ),
    "ranks": (
        {"r": 4, "alpha": 8.0, "extra": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 4}}},
        (LORA,),
        "scalings of modules of their own (1, 4)",
    ),
    "ranks, one scaling": (
        {"r": 4, "alpha": 8.0, "extra": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}}},
        (LORA,),
        "",
    ),
    "pissa": (
        {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
        (LORA,),
        "an adapter that was taken out of its base (pissa), which vLLM would add to the whole of it",
    ),
    "experts": (
        {"target_modules": ["o_proj"], "extra": {"target_parameters": ["experts.down_proj"]}},
        (LORA, r".*\.mlp\.experts\.lora_[AB]\.weight"),
        "stacked parameters of experts (target_parameters)",
    ),
}
"""Of options that change an adapter's files: the lora section, names of tensors, what vLLM refuses."""


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in ("lora", "dora", "ranks") else full) for k in KINDS])
def test_files_are_of_pefts_format(kind: str, tmp_path: Path) -> None:
    """Keys that LoraConfig has, tensors that PEFT takes all of, and the same numbers when they are loaded."""
    options, names, reason = KINDS[kind]
    base = mixtures.MIXTURES["mixtral"]() if kind == "experts" else make_base("qwen2")
    plain = copy.deepcopy(base)
    model = trained(attach_adapter(base, LoraSection(**options), "causal-lm", seed=0))
    fastpeft.accelerate(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config.keys() == {field.name for field in dataclasses.fields(LoraConfig)} - {"runtime_config"} | {
        "auto_mapping",
        "peft_version",
    }
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(any(re.fullmatch(form, name) for form in names) for name in tensors), list(tensors)
    assert all(any(re.fullmatch(form, name) for name in tensors) for form in names)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    again = PeftModel.from_pretrained(plain, tmp_path).eval()
    ids = torch.arange(3, 13)[None]
    torch.testing.assert_close(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert refused_by_vllm(tmp_path) == ([reason] if reason else [])
    wanted = f"vLLM does not take this adapter ({reason}); fastpeft merge makes a model"
    assert note(tmp_path) == (wanted if reason else None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"r": 1024}, "rank 1024, above 512"),
        ({"peft_type": "LOHA"}, "the method LOHA"),
        ({"alora_invocation_tokens": [5, 6]}, "the LoRA variant alora_invocation_tokens"),
        ({"use_qalora": True}, "the LoRA variant use_qalora"),
        ({"layer_replication": [[0, 1]]}, "replicated layers"),
        ({"bias": "all"}, "trained biases"),
    ],
)
def test_of_adapters_of_others(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    save_file({"base_model.model.x.lora_A.weight": torch.ones(8, 2)}, tmp_path / "adapter_model.safetensors")
    assert refused_by_vllm(tmp_path) == [reason]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert refused_by_vllm(tmp_path) == [] and note(tmp_path) is None


def test_nothing_is_said_of_what_is_no_decoders_adapter(tmp_path: Path) -> None:
    assert note(tmp_path) is None
    (tmp_path / "adapter_config.json").write_text(json.dumps({"task_type": "SEQ_CLS", "use_dora": True}))
    assert note(tmp_path) is None


@pytest.mark.parametrize("dora", [True, False])
def test_a_run_ends_with_what_vllm_refuses(
    dora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "use_dora": dora}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.x.lora_A.weight": torch.ones(8, 2)}, tmp_path / "adapter_model.safetensors")
    monkeypatch.setattr("fastpeft.strategies.run.train", lambda *_, **__: SimpleNamespace(summary="trained"))
    assert app.run(["train", "--output-dir", str(tmp_path)]) == 0
    said = "vLLM does not take this adapter (DoRA); fastpeft merge makes a model" in capsys.readouterr().err
    assert said == dora
