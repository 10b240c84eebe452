"""An adapter merged into its base: a model that needs neither PEFT nor fastpeft."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fastpeft.errors import UserError
from fastpeft.models import tuned


def merge(source: tuned.Source, dtype: Any, *, decode: bool) -> Any:
    """Base + adapter as one plain transformers model on the CPU.

    The sum is made in float32, layer by layer, and rounded once. A base in 4 or 8 bits is decoded first and never
    quantised again.

    Args:
        source: an adapter.
        dtype: torch.float16, bfloat16 or float32, of the result.
        decode: merge into the values that the base's quantised storage stands for, on which the adapter was trained;
            without, into the checkpoint's own.

    Raises:
        UserError: no adapter; base or adapter cannot be loaded; the adapter cannot be merged; a weight overflows.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    if source.adapter is None:
        raise UserError(f"ADAPTER: expected an adapter's folder or ID, got {source.name}, which is a whole model")
    quantization = source.model.quantization or "none"
    base = tuned.load_base(source, torch.device("cpu"), dtype, quantization if decode else "none")
    if getattr(base, "hf_quantizer", None) is not None:
        base = base.dequantize(dtype)
    model = tuned.attach(source, base)
    if not hasattr(model, "merge_and_unload"):
        raise UserError(f"ADAPTER: {model.active_peft_config.peft_type.value} adapters cannot be merged")
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            weight = getattr(layer.get_base_layer(), "weight", None)
            if weight is None or not weight.is_floating_point():
                continue
            weight.data = weight.data.float()
            layer.merge()
            weight = layer.get_base_layer().weight
            weight.data = weight.data.to(dtype)
    merged = model.merge_and_unload()
    for name, parameter in merged.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
            if not torch.isfinite(parameter).all():
                raise UserError(f"--dtype: expected one that holds {name}, got {str(dtype).removeprefix('torch.')}")
    merged.config.dtype = dtype
    return merged


def save(model: Any, tokenizer: Any, target: Path, *, overwrite: bool) -> None:
    """All of it or nothing: written beside the target, then renamed.

    Raises:
        UserError: the target is there, and `overwrite` is not set.
    """
    check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        beside.chmod(0o777 & ~_umask())
        if target.exists():
            shutil.rmtree(target)
        beside.rename(target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def check_target(target: Path, overwrite: bool) -> None:
    """Raise UserError if something is in the way."""
    if target.exists() and not target.is_dir():
        raise UserError(f"OUTPUT: expected a folder or a new name, got a file: {target}")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(f"OUTPUT: {target} is not empty; --overwrite replaces it")


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now
