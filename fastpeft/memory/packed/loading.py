"""Loading a model whose frozen weights are quantised, packed once and for all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, get_args

import torch

from ...integrations.versions import require_core

Quantization = Literal["nf4", "fp4", "int8", "none"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
_INDEX_BYTES = 64 << 20
_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_OWN = ("device_map", "quantization_config", "state_dict")


def load(
    name_or_path: str | Path,
    *,
    quantization: Quantization = "nf4",
    auto_class: Any = None,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
    double_quant: bool = True,
    skip: Sequence[str] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache: bool = True,
    cache_dir: str | Path | None = None,
    mapped: bool = False,
    **options: Any,
) -> Any:
    """The model that transformers' `from_pretrained` gives, bit for bit; its 4-bit weights are packed only once.

    transformers' own loader runs. It reads tensor by tensor and quantises each on its device, so that host memory holds
    one of them, and the model if it stays there. The first call writes what was packed to files of 64 MiB, and a later
    one reads those in place of the checkpoint's 16-bit weights; one that was killed is gone on with. All else, such as
    embeddings and norms, is read from the checkpoint each time. Equivalent:

        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        auto_class.from_pretrained(name, dtype=dtype, device_map={"": device}, quantization_config=nf4)

    Args:
        name_or_path: a folder, or an ID on the hub.
        quantization: storage of the linear layers: "nf4", "fp4" (bitsandbytes, 4 bits), "int8" (LLM.int8) or "none".
            The last two are not cached. A checkpoint that is stored quantised stays as it is.
        auto_class: a class of transformers; AutoModelForCausalLM if left out.
        device: where the model goes; this process's GPU, or the CPU where there is none.
        dtype: of what is not quantised, and of products; bfloat16 on a GPU that has it, else float16; float32 on a CPU.
        double_quant: the scales in 8 bits, too (4-bit only).
        skip: names of modules that are not quantised, in place of transformers' own choice, which is the head.
        revision: of a hub's repository: branch, tag or commit.
        trust_remote_code: run the repository's own code; such models are not cached.
        cache: keep and take packed weights.
        cache_dir: where; `fastpeft/packed` in the user's cache folder if left out. `fastpeft cache` lists it and
            clears it.
        mapped: leave packed weights in the cache's files, mapped into memory, in place of copies: the system reads them
            when they are used, and takes the memory back when it needs it. For streamed layers where the host has less
            memory than the model takes (`MemoryPolicy.host_memory`). Only of 4-bit weights on the CPU.
        options: for `from_pretrained`, such as num_labels, attn_implementation, token, subfolder. Only safetensors are
            read unless `use_safetensors=False`, or None, is among them: other files are pickles.

    Returns:
        A model of transformers, in evaluation mode: its modules, configuration and quantiser are as ever.

    Raises:
        ValueError: an argument that cannot be served; a file outside of the folder in a checkpoint's index; a
            config.json with numbers beyond any model's, or that names code; an adapter in place of a model.
        OSError: the checkpoint cannot be found or read.
        ImportError: transformers, or bitsandbytes where it is needed, is missing or too old.
    """
    require_core()
    from transformers import AutoModelForCausalLM

    from ...models.devices import pick_device, pick_dtype

    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization: expected one of {', '.join(QUANTIZATIONS)}, got {quantization!r}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: expected a floating torch.dtype or None, got {dtype!r}")
    if not hasattr(auto_class or AutoModelForCausalLM, "from_pretrained"):
        raise ValueError(f"auto_class: expected a model class of transformers, got {auto_class!r}")
    if own := [name for name in _OWN if name in options]:
        raise ValueError(f"{own[0]}: expected to be left out; device, quantization and skip say it")
    if isinstance(skip, str):
        raise ValueError(f"skip: expected a list of modules' names, got {skip!r}")
    name = str(name_or_path)
    if Path(name).is_dir():
        check_index(Path(name, options.get("subfolder", "")))
    if "config" not in options:
        _check_files(name, trust_remote_code, {"revision": revision, **options})
    place = pick_device() if device is None else torch.device(device)
    dtype = pick_dtype("auto", place) if dtype is None else dtype
    if mapped and (quantization not in ("nf4", "fp4") or not cache or place.type != "cpu"):
        raise ValueError(
            f"mapped: expected False unless 4-bit weights are loaded to the CPU with a cache, got True with "
            f"quantization {quantization!r}, cache {cache!r} and device {place}"
        )
    options = {"use_safetensors": True, "dtype": dtype, "device_map": {"": place}, **options}
    options |= {"revision": revision, "trust_remote_code": trust_remote_code}
    bits = bits_and_bytes(quantization, double_quant, dtype, skip)
    kind = auto_class or AutoModelForCausalLM
    if bits is not None:
        options["quantization_config"] = bits
    if not cache or quantization not in ("nf4", "fp4"):
        return kind.from_pretrained(name, **options)
    from ...integrations.packed_loading import from_pretrained
    from .entries import user_folder

    return from_pretrained(kind, name, user_folder() if cache_dir is None else Path(cache_dir), mapped, **options)


def bits_and_bytes(quantization: str, double_quant: bool, dtype: torch.dtype, skip: Sequence[str] | None = None) -> Any:
    """bitsandbytes' configuration; None for "none"."""
    if quantization == "none":
        return None
    from transformers import BitsAndBytesConfig

    skipped = None if skip is None else list(skip)
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


def _check_files(name: str, trusted: bool, options: dict[str, Any]) -> None:
    """Raise ValueError for a model whose files ask for more than a model: see `check_base`."""
    from ...errors import UserError
    from ...models.untrusted import check_base

    where = {key: options[key] for key in _WHERE if key in options}
    try:
        check_base(name, "name_or_path", trusted, **where)
    except UserError as error:
        raise ValueError(str(error)) from error


def check_index(folder: Path) -> None:
    """Raise ValueError if an index of shards names a file outside of its folder."""
    for path in sorted(folder.glob("*.index.json")):
        if (size := path.stat().st_size) > _INDEX_BYTES:
            raise ValueError(f"{path}: expected at most {_INDEX_BYTES} bytes, got {size}")
        try:
            files = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
            names = [PureWindowsPath(file) for file in files] + [PurePosixPath(file) for file in files]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: expected an index with a weight_map of names, got another file") from error
        for name in names:
            if name.anchor or ".." in name.parts:
                raise ValueError(f"{path}: expected names of files beside it, got {str(name)!r}")
