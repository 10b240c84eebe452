"""Adapters and stored tensors: what says of them what they are, without a model."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import save

from benchmarks.fuzz.making import as_json, broken
from benchmarks.fuzz.targets.rows import MODEL
from benchmarks.fuzz.watching import Target
from fastpeft import serving
from fastpeft.errors import UserError
from fastpeft.memory.packed.files import Damaged, contents
from fastpeft.models import tuned
from fastpeft.models.new_tokens import make_room
from fastpeft.models.untrusted import check_adapter_weights
from fastpeft.strategies.distillation.stored import FORMAT, StoredTeacher
from fastpeft.strategies.few_shot.heads import WEIGHTS, LinearHead

ADAPTER = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(MODEL), "r": 4, "lora_alpha": 8}
CONFIG |= {"target_modules": ["q_proj"], "use_rslora": False, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {}}
CONFIG |= {"modules_to_save": None, "bias": "none", "init_lora_weights": True, "revision": None, "use_dora": False}
PACKED = {"weights": '{"weight": {"source": "weight", "parts": [""]}, "bias": {"source": "bias", "parts": [""]}}'}
ABOUT = {"rows": "0", "teacher": "0", "k": "2", "max_length": "8", "format": FORMAT}


def _tensors(shapes: dict[str, list[int]], dtype: torch.dtype, about: dict[str, str]) -> bytes:
    found: bytes = save({name: torch.ones(shape, dtype=dtype) for name, shape in shapes.items()}, about)
    return found


SHAPES = st.sampled_from(
    (
        *({ADAPTER: [4, 8]}, {"weight": [2, 3], "bias": [2]}, {"weight": [2], "bias": [3]}, {}, {ADAPTER: [0, 8]}),
        *({"logits": [3, 2], "words": [3, 2], "starts": [2]}, {"logits": [], "words": [3], "starts": [9]}),
        {"base_model.model.lm_head.weight": [600, 8]},
    )
)
DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.int64, torch.float8_e4m3fn))
WHOLE = st.builds(_tensors, SHAPES, DTYPES, st.sampled_from((ABOUT, {}, PACKED, {"format": "x"})))


def read_config(path: Path) -> None:
    """What `merge`, `generate` and `verify` ask of an adapter's folder before they load anything."""
    folder = path.parent / "adapter"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes(path.read_bytes())
    (folder / "adapter_model.safetensors").write_bytes(save({ADAPTER: torch.ones(4, 8)}))
    with suppress(UserError, ValueError):
        assert all(serving.refused_by_vllm(folder))
    serving.note(folder)
    source = tuned.find(str(folder), base=str(MODEL))
    assert source.adapter is not None


def read_tensors(path: Path) -> None:
    """The same bytes as an adapter's weights, packed weights, a few-shot head and a teacher's stored logits."""
    folder, data = path.parent / "adapter", path.read_bytes()
    folder.mkdir(exist_ok=True)
    for name in ("adapter_model.safetensors", WEIGHTS):
        (folder / name).write_bytes(data)
    base: Any = torch.nn.Module()
    base.get_input_embeddings = lambda: SimpleNamespace(weight=torch.ones(500, 8))
    with suppress(Damaged):
        contents(path)
    with suppress(ValueError):
        LinearHead.load(folder)
    with suppress(UserError):
        StoredTeacher(path, {name: value for name, value in ABOUT.items() if name != "format"}, [{"input_ids": [1]}], 8)
    check_adapter_weights(folder, LoraConfig(r=1), base, "MODEL")
    make_room(base, lambda: 0, folder)


PLACE = r"adapter_config\.json|adapter_model\.safetensors|tensors\.safetensors|MODEL: "
TARGETS = (
    Target("adapters' configurations", "config.json", as_json(st.just(CONFIG)), read_config, (UserError,), PLACE),
    Target("stored tensors", "tensors.safetensors", broken(WHOLE), read_tensors, (UserError,), PLACE),
)
