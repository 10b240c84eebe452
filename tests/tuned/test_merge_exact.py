"""A merged weight is the fp64 sum of base and update, rounded once: for every kind of adapter and of base."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from fastpeft import merging
from fastpeft.models import tuned
from tests.integration import mixtures
from tests.integration.models import make_base, trained

full = pytest.mark.full
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
DENSE: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "LoRA": (make_base, {"target_modules": ALL}),
    "rsLoRA, ranks and alphas by module": (
        make_base,
        {"target_modules": ALL, "use_rslora": True, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"down_proj": 1}},
    ),
    "DoRA": (make_base, {"target_modules": ALL, "use_dora": True}),
    "embeddings and a tied head": (
        lambda: make_base(tie_word_embeddings=True),
        {"target_modules": ["embed_tokens", "q_proj"]},
    ),
    "a tied head alone": (lambda: make_base(tie_word_embeddings=True), {"target_modules": ["lm_head", "q_proj"]}),
    "a head": (make_base, {"target_modules": ["lm_head", "q_proj"]}),
    "Conv1D": (lambda: make_base("gpt2"), {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "Conv1D, DoRA": (
        lambda: make_base("gpt2"),
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "biases": (lambda: make_base("qwen2"), {"target_modules": ["q_proj"], "lora_bias": True}),
    "experts": (
        lambda: mixtures.MIXTURES["mixtral"](),
        {"target_modules": ["o_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
}


def saved(folder: Path, base: PreTrainedModel, dtype: torch.dtype, config: dict[str, Any]) -> tuned.Source:
    """Base and adapter on disk, as after training."""
    base.to(dtype).save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    model = trained(get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **config})))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder / "adapter")
    return tuned.find(str(folder / "adapter"))


def exact(adapter: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums in fp64, of the adapter's files and the base's weights by name."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = {
        name.removeprefix("base_model.model."): t.double()
        for name, t in load_file(adapter / "adapter_model.safetensors").items()
    }
    sums = {name: weight.double() for name, weight in weights.items()}
    for name, a in tensors.items():
        module, _, kind = name.partition(".lora_")
        if kind not in ("A.weight", "embedding_A"):
            continue
        last = module.rpartition(".")[2]
        rank = config["rank_pattern"].get(last, config["r"])
        alpha = config["alpha_pattern"].get(last, config["lora_alpha"])
        scaling = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        b = tensors[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
        if ".experts" in module:  # the outer wrapper, of down_proj, holds the inner one
            path = module.removesuffix(".base_layer")
            stack = f"{path}.{'gate_up_proj' if module.endswith('.base_layer') else 'down_proj'}"
            experts, _, width = sums[stack].shape
            a, b = a.view(experts, -1, width), b.view(b.shape[0], -1, experts)
            sums[stack] = sums[stack] + scaling * torch.einsum("ore,eri->eoi", b, a)
            continue
        weight, update = f"{module}.weight", scaling * b @ a
        if kind == "embedding_A" or config["fan_in_fan_out"]:
            update = update.T
        sums[weight] = sums[weight] + update
        if config["use_dora"]:
            across = 0 if config["fan_in_fan_out"] else 1
            factor = tensors[f"{module}.lora_magnitude_vector"].flatten() / sums[weight].norm(dim=across)
            sums[weight] = sums[weight] * (factor if across == 0 else factor[:, None])
        if config["lora_bias"]:
            sums[f"{module}.bias"] = sums[f"{module}.bias"] + scaling * tensors[f"{module}.lora_B.bias"]
    return sums


def assert_rounded_once(merged: Any, sums: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Half a unit in the last place of the result, and the roundings of a product of a few ranks in fp32."""
    found = merged.state_dict()
    assert found.keys() == sums.keys()
    for name, value in found.items():
        wanted = sums[name]
        assert value.dtype == dtype and value.shape == wanted.shape
        info = torch.finfo(dtype)
        slack = 32 * torch.finfo(torch.float32).eps * wanted.abs().max() + info.smallest_normal * info.eps
        beyond = (value.double() - wanted).abs() - info.eps / 2 * wanted.abs() - slack
        assert beyond.max() <= 0, f"{name}: {beyond.max():.2e} beyond one rounding"


OFTEN = ("LoRA", "embeddings and a tied head", "experts")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param(kind, dtype, marks=() if kind in OFTEN and dtype is torch.bfloat16 else full)
        for kind in DENSE
        for dtype in (torch.bfloat16, torch.float16)
    ],
)
def test_dense(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, config = DENSE[kind]
    source = saved(tmp_path, make(), dtype, config)
    weights = tuned.load_base(source, torch.device("cpu"), dtype, "none")[0].state_dict()
    merged = merging.merge(source, dtype, decode=True)
    sums = exact(tmp_path / "adapter", weights)
    assert_rounded_once(merged, sums, dtype)
    assert any(not torch.equal(value, weights[name]) for name, value in merged.state_dict().items())


@pytest.mark.parametrize(
    ("quantization", "dora"),
    [("nf4", False), *(pytest.param(*case, marks=full) for case in (("nf4", True), ("int8", False), ("int8", True)))],
)
def test_quantised(quantization: str, dora: bool, tmp_path: Path) -> None:
    """What the base's bits stand for, and the update."""
    source = saved(tmp_path, make_base(), torch.bfloat16, {"target_modules": ALL, "use_dora": dora})
    source = replace(source, model=replace(source.model, quantization=quantization, dtype="bfloat16"))
    base = tuned.load_base(source, torch.device("cpu"), torch.bfloat16, quantization)[0]
    weights = base.dequantize(torch.bfloat16).state_dict()
    merged = merging.merge(source, torch.bfloat16, decode=True)
    assert_rounded_once(merged, exact(tmp_path / "adapter", weights), torch.bfloat16)
