"""What of an adapter other programs do not read: told from its files, without loading it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fastpeft.structured import convert

LARGEST_RANK = 512
"""Of `--max-lora-rank`; without that option vLLM takes 16."""

_VARIANTS = (
    "alora_invocation_tokens", "kasa_config", "monteclora_config", "use_bdlora", "arrow_config", "use_qalora",
)  # fmt: skip
_CONFIG_FILE, _WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_MOST = 1 << 31
_KINDS: dict[str, Any] = {
    "r": int,
    "lora_alpha": float,
    "rank_pattern": dict[str, int] | None,
    "alpha_pattern": dict[str, float] | None,
    "modules_to_save": list[str] | None,
}
_TAKEN_OUT_OF_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
_WEIGHTS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_PASSED_OVER = (
    ".embed_tokens.base_layer.weight",
    ".lm_head.base_layer.weight",
)  # PEFT saves the tables themselves, too


def note(folder: Path) -> str | None:
    """A line for the end of a run, where it left a decoder's adapter that vLLM does not take; else None."""
    try:
        reasons = refused_by_vllm(folder) if _config(folder).get("task_type") == "CAUSAL_LM" else []
    except (OSError, ValueError):
        return None
    return f"vLLM does not take this adapter ({'; '.join(reasons)}); fastpeft merge makes a model" if reasons else None


def refused_by_vllm(folder: Path) -> list[str]:
    """Why vLLM does not load an adapter, or would compute something else; empty where nothing is known against it.

    These are the rules of vLLM's own reader of adapters (`vllm.lora.peft_helper`, `vllm.lora.utils`). Which modules of
    which models it can adapt, only vLLM knows.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        OSError: they cannot be read.
        ValueError: one of them is something else; its name, what was expected and what came are in the message.
    """
    from safetensors import SafetensorError, safe_open

    config = _config(folder)
    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"the method {kind}"]
    found = []
    if config.get("use_dora"):
        found.append("DoRA")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        found.append("trained biases")
    if names := config.get("modules_to_save"):
        found.append(f"modules that are saved whole ({', '.join(names)})")
    if config.get("target_parameters"):
        found.append("stacked parameters of experts (target_parameters)")
    found += [f"the LoRA variant {name}" for name in _VARIANTS if config.get(name)]
    begun = str(config.get("init_lora_weights")).lower()
    if begun.startswith(_TAKEN_OUT_OF_THE_BASE):
        found.append(f"an adapter that was taken out of its base ({begun}), which vLLM would add to the whole of it")
    if config.get("layer_replication"):
        found.append("replicated layers")
    if other := sorted(_scalings(config) - {_scaling(config, config["r"], config["lora_alpha"])}):
        found.append(f"scalings of modules of their own ({', '.join(f'{value:g}' for value in other)})")
    if (rank := max([config["r"], *(config.get("rank_pattern") or {}).values()])) > LARGEST_RANK:
        found.append(f"rank {rank}, above {LARGEST_RANK}")
    try:
        with safe_open(str(folder / _WEIGHTS_FILE), "pt") as file:
            strange = [name for name in file.keys() if not name.endswith(_WEIGHTS + _PASSED_OVER)]  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise ValueError(f"{_WEIGHTS_FILE}: {error}") from error
    if strange and not found:
        found.append(f"{strange[0]}, which is no weight of LoRA")
    return found


def _config(folder: Path) -> dict[str, Any]:
    """What is in adapter_config.json, of the types that PEFT gives it; errors as `refused_by_vllm`."""
    try:
        found: dict[str, Any] = convert(
            dict[str, Any], json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8")), "top level"
        )
        for name, kind in _KINDS.items():
            if name in found:
                found[name] = convert(kind, found[name], name)
        if found.get("peft_type") == "LORA":
            ranks = [found.get("r", 0), *(found.get("rank_pattern") or {}).values()]
            if min(ranks) < 1 or max(ranks) > _MOST or "lora_alpha" not in found:
                raise ValueError(f"expected lora_alpha, and ranks of 1 to {_MOST}, got {ranks}")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{_CONFIG_FILE}: {error}") from error
    return found


def _scalings(config: dict[str, Any]) -> set[float]:
    """Of all modules that a pattern names; vLLM has one scaling, of `r` and `lora_alpha`."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    return {
        _scaling(config, ranks.get(name, config["r"]), alphas.get(name, config["lora_alpha"]))
        for name in ranks.keys() | alphas.keys()
    }


def _scaling(config: dict[str, Any], rank: int, alpha: float) -> float:
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
