"""An adapter merged into its base: a model that needs neither PEFT nor fastpeft."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fastpeft.errors import UserError
from fastpeft.models import tuned
from fastpeft.paths import can_be_made, umask

MARK = "fastpeft.json"
"""Lists what `save` wrote: a folder that holds nothing else may be replaced."""


def merge(source: tuned.Source, dtype: Any, *, decode: bool) -> Any:
    """Base + adapter as one plain transformers model on the CPU.

    The sum is made in float32, layer by layer, and every weight is rounded once. Meanwhile the checkpoint is held in
    its own dtype where that is the result's, else in float32. A base in 4 or 8 bits is decoded first and never
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
    if decode and quantization != "none":
        # The storage's values depend on the dtype that was quantised, so it must be the one of the training.
        held = getattr(torch, source.model.dtype, dtype)
    else:
        quantization, held = "none", dtype if source.config.dtype is dtype else torch.float32
    base, fresh = tuned.load_base(source, torch.device("cpu"), held, quantization)
    if getattr(base, "hf_quantizer", None) is not None:
        base = _decoded(base, held)
    if held is not dtype:
        base = base.float()  # else what the adapter leaves alone would be rounded to one 16-bit form, then to another
    model = tuned.attach(source, base)
    tuned.check_values(source, fresh)
    _untie(model.get_base_model())
    if not hasattr(model, "merge_and_unload"):
        raise UserError(f"ADAPTER: {model.active_peft_config.peft_type.value} adapters cannot be merged")
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            _merge_layer(layer)
    merged = model.merge_and_unload()
    for name, parameter in merged.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
            if not torch.isfinite(parameter).all():
                raise UserError(f"--dtype: expected one that holds {name}, got {str(dtype).removeprefix('torch.')}")
    merged.config.dtype = dtype
    return merged


def _decoded(base: Any, dtype: Any) -> Any:
    """A model whose weights are stored in few bits as a plain one."""
    try:
        base = base.dequantize(dtype)
    except NotImplementedError as error:
        raise UserError(f"ADAPTER: its base cannot be decoded: {error}") from error
    # Saving would undo what loading did to the weights, and fail at their storage, which cannot be made again.
    undone = [
        conversion
        for conversion in getattr(base, "_weight_conversions", None) or ()
        if not any(".integrations." in type(step).__module__ for step in getattr(conversion, "operations", ()))
    ]
    base._weight_conversions = undone
    return base


def _merge_layer(layer: Any) -> None:
    """Sum in float32; the layer's own weights come back in the dtype that they had."""
    weights = {name: weight for name, weight in layer.get_base_layer().named_parameters() if weight.is_floating_point()}
    before = {name: weight.dtype for name, weight in weights.items()}
    for weight in weights.values():
        weight.data = weight.data.float()
    try:
        layer.merge()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(f"ADAPTER: PEFT cannot merge it: {error}") from error
    for name, weight in layer.get_base_layer().named_parameters():
        weight.data = weight.data.to(before.get(name, weight.dtype))


def _untie(base: Any) -> None:
    """An adapter on the embeddings changes them only, so a head that shares their weight needs its own."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    tables = [base.get_input_embeddings(), base.get_output_embeddings()]
    if None in tables or not any(isinstance(table, BaseTunerLayer) for table in tables):
        return
    embeddings, head = (t.get_base_layer() if isinstance(t, BaseTunerLayer) else t for t in tables)
    if embeddings.weight is head.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        for config in (base.config, base.config.get_text_config()):
            config.tie_word_embeddings = False


def save(model: Any, tokenizer: Any, target: Path, *, overwrite: bool) -> None:
    """All of it or nothing: written beside the target, then renamed.

    Raises:
        UserError: the target is there, and `overwrite` is not set.
    """
    target = target.resolve()
    check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        (beside / MARK).write_text(json.dumps({"files": _files(beside)}, indent=1) + "\n", encoding="utf-8")
        beside.chmod(0o777 & ~umask())
        _put_in_place(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def check_target(target: Path, overwrite: bool) -> None:
    """Raise UserError if something is in the way, or the folder cannot be made."""
    if target.exists() and not target.is_dir():
        raise UserError(f"OUTPUT: expected a folder or a new name, got a file: {target}")
    if not can_be_made(target.absolute().parent):  # written beside it first
        raise UserError(f"OUTPUT: expected a folder that can be written, got {target}")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"OUTPUT: {target} is not empty; --overwrite replaces it")
    try:
        others = sorted({*_files(target)} - {MARK, *json.loads((target / MARK).read_text(encoding="utf-8"))["files"]})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"OUTPUT: expected a merged model to replace, got {target}, which is none") from None
    if others:
        raise UserError(f"OUTPUT: expected nothing but a merged model to replace, got {target}, with {others[0]}")


def _files(folder: Path) -> list[str]:
    """All within, by their paths from the folder."""
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir()]


def _put_in_place(new: Path, target: Path) -> None:
    """The old folder is deleted when the new one has its name, and put back if that fails."""
    if not target.exists():
        new.rename(target)
        return
    aside = new.with_name(f"{new.name}-old")
    target.rename(aside)
    try:
        new.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside)
