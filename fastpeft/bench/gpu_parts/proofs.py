"""Norms and rotations of models are recognised on a GPU too, where they are tried with its kernels and its autocast."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from unittest import mock

from fastpeft.bench.recorder import Check, Recorder

order = 15
time_limit_s = 90
needs = ("peft",)

NORMS = {
    "llama": "LlamaRMSNorm",
    "t5": "T5LayerNorm",
    "olmo2": "Olmo2RMSNorm",
    "gemma2": "Gemma2RMSNorm",
    "qwen3_next": "Qwen3NextRMSNormGated",
}
ROTATIONS = ("llama", "cohere", "glm", "gpt_oss", "deepseek_v3")
FUNCTION = "apply_rotary_pos_emb"
TRIES = 5
"""Of each norm, with other weights: none may fail by chance."""


def run(recorder: Recorder, depth: str) -> None:
    recorder.run_checks("proofs", _checks(recorder.device))


dry_run = run


def _checks(device: str) -> Iterator[Check]:
    for model in NORMS:
        yield f"norm of {model}", partial(_norm, model, device)
    for model in ROTATIONS:
        yield f"rotation of {model}", partial(_rotation, model, device)


def _norm(model: str, device: str) -> None:
    import torch

    from fastpeft.layers import norm_proof
    from fastpeft.layers.norm_structure import candidates

    kind = getattr(import_module(f"transformers.models.{model}.modeling_{model}"), NORMS[model])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for _ in range(TRIES):
            module = kind(256).to(device, dtype)
            torch.nn.init.normal_(module.weight)
            with mock.patch.dict(norm_proof._KNOWN, clear=True):
                found = norm_proof.proved(module, candidates(module))
            assert not isinstance(found, str), f"{dtype}: {found}"


def _rotation(model: str, device: str) -> None:
    import torch

    from fastpeft.layers.rotary_structure import proved

    function = getattr(import_module(f"transformers.models.{model}.modeling_{model}"), FUNCTION)
    found = proved(torch.nn.Linear(1, 1, device=device), {FUNCTION: function})  # whose device is that of the trial
    assert not isinstance(found, str), found
